"""``python -m swiftwan`` is the command line."""

import sys

from swiftwan.cli import main

sys.exit(main())
