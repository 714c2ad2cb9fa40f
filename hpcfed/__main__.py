"""`python -m hpcfed` is the command line."""

import sys

from hpcfed.cli import main

sys.exit(main())
