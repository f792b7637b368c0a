"""`readapt doctor` as an entry for `ray job submit`; give it --cluster."""

import sys

from readapt_ray.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
