"""The process of ``fusedcomm bench attention``."""

from fusedcomm.cli.bench.attention.catalogue import ATTENTION
from fusedcomm.cli.bench.single.worker import main

if __name__ == "__main__":
    main(ATTENTION)
