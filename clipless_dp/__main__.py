"""``python -m clipless_dp``."""

import sys

from clipless_dp.cli import main

if __name__ == "__main__":
    sys.exit(main())
