"""Run the command line: `python -m longctx` is the `longctx` command."""

import sys

from longctx.cli import main

if __name__ == "__main__":
    sys.exit(main())
