"""``python -m dfkde_sklearn``: the command line, as `dfkde`."""

import sys

from dfkde_sklearn._cli import main

if __name__ == "__main__":
    sys.exit(main())
