"""`hpcfed sweep`, for those who start from a clone: python launch/sweep.py submit SWEEP.yaml."""

import sys

from hpcfed.app.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
