"""`readapt bridge` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["bridge", *sys.argv[1:]]))
