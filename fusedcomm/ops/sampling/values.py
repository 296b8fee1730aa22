"""Looking at the values of arguments, with ``FUSEDCOMM_DEBUG=1`` alone: it waits for the device."""

from __future__ import annotations

import torch

from fusedcomm.ops.checks import has_address
from fusedcomm.ops.sampling.dispatch import values_are_checked


def sees_values(t: torch.Tensor) -> bool:
    """Whether the values of a tensor are to be checked: not where there are none, nor while a graph is captured."""
    if not values_are_checked() or not has_address(t):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def refuse(bad: torch.Tensor, values: torch.Tensor, name: str, expected: str) -> None:
    """A ValueError that shows the first of the values that are bad, if any is."""
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: expected {expected}, got {values[tuple(at)].item()!r} at {at}")
