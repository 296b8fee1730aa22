"""``fusedcomm bench attention`` from a checkout; the benchmark itself is in fusedcomm/cli/bench/attention."""

import sys

from fusedcomm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
