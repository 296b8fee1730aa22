"""What goes wrong with a checkpoint."""

from __future__ import annotations

from fusedcomm.errors import FusedCommError


class CheckpointError(FusedCommError, ValueError):
    """A checkpoint that cannot be loaded: its architecture, tensors or quantisation are not as expected."""
