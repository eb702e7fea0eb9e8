"""`python -m benchmarks.comparison`."""

import sys

from benchmarks.comparison.compare import main

if __name__ == "__main__":
    sys.exit(main())
