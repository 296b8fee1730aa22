"""``fusedcomm bench decode`` from a checkout; the benchmark itself is in fusedcomm/cli/bench/gpu."""

import sys

from fusedcomm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "decode", *sys.argv[1:]]))
