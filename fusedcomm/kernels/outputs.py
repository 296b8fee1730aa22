"""Memory for what a quantising operator writes."""

from __future__ import annotations

import torch

from fusedcomm.native import empty_quant


def new_quant(
    x: torch.Tensor, group_size: int, column_major: bool, packed: bool, fnuz: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """empty_quant of fusedcomm.native in memory as csrc/bind/arguments.cpp allocates it.

    Where scales lie in columns, the memory of both tensors goes on to a multiple of four rows: products take them as
    they are, and nothing has to be copied to pad them. Code that is compiled allocates what the tensors hold and no
    more, for a compiler may move them.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if not (column_major or packed) or rows % 4 == 0 or torch.compiler.is_compiling():
        return empty_quant(x, group_size, column_major, packed, fnuz)
    padded = rows + -rows % 4
    groups = x.shape[-1] // group_size
    fp8 = x.new_empty((padded, x.shape[-1]), dtype=torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)
    columns, dtype = ((groups + 3) // 4, torch.int32) if packed else (groups, torch.float32)
    scale = x.new_empty((columns, padded), dtype=dtype).t()
    return fp8[:rows].view(x.shape), scale[:rows]
