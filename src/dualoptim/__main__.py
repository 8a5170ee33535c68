"""`python -m dualoptim`."""

import sys

from .cli import main

sys.exit(main())
