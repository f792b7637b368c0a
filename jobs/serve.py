"""`readapt serve` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
