"""`readapt synthesize` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["synthesize", *sys.argv[1:]]))
