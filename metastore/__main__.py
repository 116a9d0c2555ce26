"""``python -m metastore``: the commands."""

import sys

from metastore.cli import main

if __name__ == "__main__":
    sys.exit(main())
