"""`readapt embed` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["embed", *sys.argv[1:]]))
