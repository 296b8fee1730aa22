"""``fusedcomm bench sampling`` from a checkout; the benchmark itself is in fusedcomm/cli/bench/sampling."""

import sys

from fusedcomm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "sampling", *sys.argv[1:]]))
