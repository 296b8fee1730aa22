"""Entry of a rank started by torchrun or mpiexec: python -m harness."""

from harness.worker import main

main()
