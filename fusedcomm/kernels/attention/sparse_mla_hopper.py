"""The compiled kernel of sparse MLA decode for Hopper (csrc/gpu/hopper/sparse_mla.cu), in place of Triton's.

It serves by itself; what it does not take goes to Triton, and all of it with ``FUSEDCOMM_BACKEND=triton``.
"""

from __future__ import annotations

import functools

import torch

from fusedcomm import native
from fusedcomm.env import Settings
from fusedcomm.platform import device_facts

MAX_ROWS = 65535  # of a grid's second dimension
OPERATOR = "fusedcomm::sparse_mla_decode_out"

Keys = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""A cache, indices into it, and their lengths or where rows begin; or nothing."""


@functools.cache
def is_wanted() -> bool:
    """Whether ``FUSEDCOMM_BACKEND`` leaves it the choice, or asks for it; read once."""
    return Settings.from_environ().backend in (None, "native")


def takes(q: torch.Tensor, out: torch.Tensor, fnuz: bool) -> bool:
    """Whether it is wanted, is there, and takes queries and a result like these."""
    if not is_wanted() or device_facts(q.device).arch != "sm_90" or native.load_gpu() is None:
        return False
    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CUDA"):  # built for other architectures
        return False
    is_aligned = q.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
    fits = q.shape[0] <= MAX_ROWS and q.is_contiguous() and out.is_contiguous()
    return fits and is_aligned and not fnuz


def block_heads(num_heads: int) -> int:
    """How many heads a block takes; a multiprocessor has one block at a time."""
    return 16 if num_heads <= 16 else 32 if num_heads <= 32 else 64


def decode(
    q: torch.Tensor,
    main: Keys,
    extra: Keys,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Launches it on the current stream; results of several splits go to partial and lse, as of Triton's kernel."""
    several = (partial, lse) if num_splits > 1 else (None, None)
    torch.ops.fusedcomm.sparse_mla_decode_out.default(q, *main, *extra, attn_sink, scale, num_splits, out, *several)
