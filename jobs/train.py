"""`readapt train` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
