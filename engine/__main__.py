"""`python -m engine` is the `focus` command."""

import sys

from engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
