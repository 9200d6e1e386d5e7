"""`python -m siftrl` is `siftrl`."""

import sys

from siftrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
