"""``fusedcomm bench collectives`` from a checkout; the benchmark itself is in fusedcomm/cli/bench."""

import sys

from fusedcomm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "collectives", *sys.argv[1:]]))
