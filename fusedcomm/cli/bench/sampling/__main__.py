"""The process of ``fusedcomm bench sampling``."""

from fusedcomm.cli.bench.sampling.catalogue import SAMPLING
from fusedcomm.cli.bench.single.worker import main

if __name__ == "__main__":
    main(SAMPLING)
