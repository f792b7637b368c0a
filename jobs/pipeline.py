"""`readapt run`, the whole chain, as an entry for `ray job submit`."""

import sys

from readapt_ray.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
