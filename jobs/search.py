"""`readapt search` as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["search", *sys.argv[1:]]))
