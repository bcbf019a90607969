"""``python -m camtrain``."""

import sys

from camtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
