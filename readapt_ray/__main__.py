"""Run the command `readapt` as `python -m readapt_ray`."""

import sys

from readapt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
