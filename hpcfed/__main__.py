"""`python -m hpcfed` is the command line."""

import sys

from hpcfed.app.cli import main

sys.exit(main())
