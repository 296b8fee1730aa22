"""The Triton kernels of the QK and MLA ops behind the signatures of fusedcomm.ops.attention.qk_reference.

They are torch operators (``torch.ops.fusedcomm_triton``) registered by hand, as in fusedcomm.kernels.operators.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from fusedcomm import kernels
from fusedcomm.kernels.attention.qk import qk_rmsnorm_kernel

_TILE = 1024  # elements that a program holds: 8 heads of 128
_ELEMENTS_A_THREAD = 8  # a load of 16 bytes in bf16


def _qk_rmsnorm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:
    heads_q, heads_k, head_dim = q.shape[1], k.shape[1], q.shape[2]
    tile = _tile(max(heads_q, heads_k), head_dim)
    arguments = (q, k, q_weight, k_weight, q_out, k_out, *_outer(q), *_outer(k), *_outer(q_out), *_outer(k_out))
    options = {"NUM_HEADS_Q": heads_q, "NUM_HEADS_K": heads_k, "HEAD_DIM": head_dim, **tile}
    pieces = sum(triton.cdiv(heads, tile["BLOCK_HEADS"]) for heads in (heads_q, heads_k))
    _launch(qk_rmsnorm_kernel, (q.shape[0], pieces), q.device, tile, *arguments, eps, weight_bias, **options)


# ---- launching ----


def _tile(num_heads: int, head_dim: int) -> dict[str, int]:
    """How many heads and elements a program takes: powers of two, as many heads as make a tile."""
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = max(min(triton.next_power_of_2(num_heads), _TILE // block_dim), 1)
    return {"BLOCK_DIM": block_dim, "BLOCK_HEADS": block_heads}


def _outer(x: torch.Tensor) -> tuple[int, ...]:
    """All strides but the last one, which is 1."""
    return x.stride()[:-1]


def _launch(
    kernel: Any, grid: tuple[int, int], device: torch.device, tile: dict[str, int], *arguments: Any, **options: Any
) -> None:
    if 0 in grid:
        return
    lanes = 64 if torch.version.hip else 32
    elements = tile["BLOCK_DIM"] * tile["BLOCK_HEADS"]
    options |= {"num_warps": max(elements // (_ELEMENTS_A_THREAD * lanes), 1), "enable_fp_fusion": False}
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):  # Triton launches on the current device and its current stream
        kernel[grid](*arguments, **options)


# ---- registration ----


def _nothing(*args: object) -> None:
    """What an operator that only writes to tensors of its caller makes of fake ones."""


_library = torch.library.Library("fusedcomm_triton", "FRAGMENT")
for _function, _schema in (
    (
        _qk_rmsnorm,
        "qk_rmsnorm_out(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, float weight_bias, "
        "Tensor(a!) q_out, Tensor(b!) k_out) -> ()",
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _function, "CUDA")  # HIP's key too
    if kernels.available("cpu"):
        _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"fusedcomm_triton::{_name}", _nothing, lib=_library)

qk_rmsnorm_out = torch.ops.fusedcomm_triton.qk_rmsnorm_out.default
