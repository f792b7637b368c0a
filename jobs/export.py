"""`readapt export` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
