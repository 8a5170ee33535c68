"""The command, `dualoptim` or `python -m dualoptim`: it first checks for the packages that it needs."""

import os
import sys


def main() -> int:
    """Run the command line; the exit status."""
    try:
        try:
            from .cli import main as run
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            needs = f"the command line needs the package {package}; pip install 'dualoptim[unlearn]'"
            print(f"dualoptim: error: {needs}", file=sys.stderr)
            return 2
        return run()
    except KeyboardInterrupt:  # before the command line takes it, and after
        print("dualoptim: stopped", file=sys.stderr, flush=True)
        os._exit(130)  # where it came inside of exec(), Python would end by the signal instead


if __name__ == "__main__":  # and not in a process that is spawned from this one
    sys.exit(main())
