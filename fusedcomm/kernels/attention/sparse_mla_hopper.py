"""The compiled kernel of sparse MLA decode for Hopper (csrc/gpu/hopper/sparse_mla.cu), in place of Triton's.

It serves by itself; what it does not take goes to Triton, and all of it with ``FUSEDCOMM_BACKEND=triton``.
"""

from __future__ import annotations

import functools

import torch

from fusedcomm import native
from fusedcomm.env import Settings
from fusedcomm.kernels.attention.sparse_mla_splits import MAX_SPLITS, Plan, choose_plan
from fusedcomm.platform import device_facts

MAX_ROWS = 65535  # of a grid's second dimension
OPERATOR = "fusedcomm::sparse_mla_decode_out"
MERGING_FORMS = (16, 32)  # heads of a block

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


@functools.lru_cache(maxsize=4096)
def plan(device: int, head_dim: int, rows: int, num_heads: int, num_tiles: int, num_splits: int | None) -> Plan:
    """How a call with these sizes is spread over a device; see choose_plan."""
    num_sms = device_facts(torch.device("cuda", device)).num_sms
    return choose_plan(rows, num_heads, num_tiles, num_sms, _active_clusters(device, head_dim), num_splits)


@functools.cache
def _active_clusters(device: int, head_dim: int) -> dict[int, tuple[int, ...]]:
    """How many clusters run at a time, as the driver says of this device: by the heads of a block and the splits."""
    ask = torch.ops.fusedcomm.sparse_mla_active_clusters.default
    return {
        heads: (0, *(ask(device, head_dim, heads, splits) for splits in range(1, MAX_SPLITS + 1)))
        for heads in MERGING_FORMS
    }


def decode(
    q: torch.Tensor,
    main: Keys,
    extra: Keys,
    attn_sink: torch.Tensor | None,
    scale: float,
    how: Plan,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Launches it on the current stream; splits that are not merged go to partial and lse, as of Triton's kernel."""
    apart = (partial, lse) if how.num_splits > 1 and not how.merged else (None, None)
    torch.ops.fusedcomm.sparse_mla_decode_out.default(
        q, *main, *extra, attn_sink, scale, how.block_heads, how.num_splits, out, *apart
    )
