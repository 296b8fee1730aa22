"""What the QK ops return, and the paged cache that they write."""

from __future__ import annotations

from typing import NamedTuple

import torch


class QK(NamedTuple):
    """Queries ``[T, Hq, D]`` and keys ``[T, Hk, D]``."""

    q: torch.Tensor
    k: torch.Tensor


class QKV(NamedTuple):
    """Queries ``[T, Hq, D]``, keys and values ``[T, Hk, D]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class KV(NamedTuple):
    """Keys and values, ``[L, N, Hk, D]`` each."""

    k: torch.Tensor
    v: torch.Tensor


class PagedKV(NamedTuple):
    """The paged cache of one layer: slot ``s`` is the token at offset ``s % block`` of block ``s // block``.

    Two layouts, told apart by the number of dimensions:

    - plain: k and v ``[blocks, block, Hk, D]``;
    - shuffled: k ``[blocks, Hk, D / x, block, x]``, v ``[blocks, Hk, block / x, D, x]`` (x is the last dimension of the
      tensors; kernels that read the cache want 16 bytes of them).

    Only the last dimension has to have a stride of 1: blocks may be padded, k and v may be views of one tensor.
    """

    k: torch.Tensor
    """In the dtype of the keys, or FP8: float8_e4m3fn, float8_e4m3fnuz, or uint8 for the bytes of the device's FP8."""
    v: torch.Tensor
    """Of the dtype of k."""
    k_scale: torch.Tensor | None = None
    """fp32, one element, on the device; for FP8 only, None is 1. What is stored stands for ``fp8 * scale``."""
    v_scale: torch.Tensor | None = None
    """As k_scale."""

    @property
    def is_shuffled(self) -> bool:
        """Whether the layout is the shuffled one."""
        return self.k.dim() == 5

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.k.shape[3] if self.is_shuffled else self.k.shape[1]
