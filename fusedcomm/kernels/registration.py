"""Functions that launch Triton kernels as torch operators (``torch.ops.fusedcomm_triton``).

So torch.compile and fake tensors take them as they take the compiled library's. They are registered by hand: the
dispatcher's way to Python costs four microseconds, where ``torch.library.custom_op`` costs tens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedcomm import kernels

_library = torch.library.Library("fusedcomm_triton", "FRAGMENT")


def register(function: Callable[..., None], schema: str) -> Any:
    """The operator of this schema, which only writes to tensors of its caller; ``function`` is what it does."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CUDA")  # HIP's key too
    if kernels.available("cpu"):
        _library.impl(name, function, "CPU")
    torch.library.register_fake(f"fusedcomm_triton::{name}", _nothing, lib=_library)
    return getattr(torch.ops.fusedcomm_triton, name).default


def _nothing(*args: object) -> None:
    """There is nothing to make of fake tensors."""
