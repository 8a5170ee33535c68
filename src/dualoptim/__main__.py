"""`python -m dualoptim`."""

import sys

from .cli import main

if __name__ == "__main__":  # and not where a process of its own is started from here
    sys.exit(main())
