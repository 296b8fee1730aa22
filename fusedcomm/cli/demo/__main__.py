"""``python -m fusedcomm.cli.demo``."""

import sys

from fusedcomm.cli.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
