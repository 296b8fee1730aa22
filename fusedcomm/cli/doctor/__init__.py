"""``fusedcomm doctor``: what is here, what is wrong with it, and whether the collectives work on real ranks."""

from fusedcomm.cli.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
