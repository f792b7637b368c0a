"""`readapt drift` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["drift", *sys.argv[1:]]))
