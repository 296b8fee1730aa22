"""AMD's aiter for the ops of attention: what of it keeps their promises, and how that is called.

Bound against the signatures of amd-aiter 0.1.20 and never run: there was no AMD hardware (docs/amd.md). What its
kernels do with data is said here as the sources of that version have it.

Called is ``indexer_k_quant_and_cache``, and only where ``FUSEDCOMM_BACKEND=aiter`` asks for it. It writes to any slot
that is not negative, past the end of the cache too, so those are made -1 before the call: three launches, and a tensor
of slots, where the library's own kernel is one launch. Its numbers are not to the bit those of the library: it
multiplies by 1 / scale, which can move a code by one step, and a NaN stays in its code and does not reach the scale.
Its first call compiles; it is to be made before a graph is captured.

Not called:

- ``cp_gather_indexer_k_quant_cache``: for a row after the last request it reads a request that nobody wrote, and it
  reads blocks without a look at whether the cache has them. Such rows are to be left as they are, and only the device
  knows which they are.
- ``fused_qk_norm_rope_cache_pts_quant_shuffle``: it returns no keys for tokens without a slot, and those of the others
  in the dtype of the cache; it looks up any position and writes to any slot that is not negative; and it reads the
  scales of a cache on the host, where they would have to be brought from the device first.
- ``fused_qk_rmsnorm``: it is wrong where k has other rows than q, as in grouped-query attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fusedcomm.aiter_package import ARCHS, Call, find_aiter, resolve, why_unusable
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops.attention.indexer_reference import HEAD_DIM, TOKEN_BYTES
from fusedcomm.ops.attention.paged import fp8_of
from fusedcomm.platform import FNUZ_ARCHS, device_facts

INDEXER_K_QUANT_AND_CACHE = Call(
    "aiter.ops.cache",
    "indexer_k_quant_and_cache",
    ("k", "kv_cache", "slot_mapping", "quant_block_size", "scale_fmt", "preshuffle"),
)
CONTRACT = (INDEXER_K_QUANT_AND_CACHE,)


def why_not(settings: Settings, arch: str) -> str:
    """Why aiter serves no op of attention on a device of this arch; empty if it may. Pure."""
    if settings.disable:
        return "FUSEDCOMM_DISABLE=1"
    if settings.disable_aiter:
        return "FUSEDCOMM_DISABLE_AITER=1"
    if not arch.startswith(ARCHS):
        return f"aiter serves gfx94x and gfx95x, not {'the CPU' if arch == 'cpu' else arch}"
    return ""


def why_not_write(kv_cache: torch.Tensor, fnuz: bool, arch: str) -> str:
    """Why aiter cannot write to a cache of the indexer on a device that it may serve; empty if it can. Pure."""
    num_blocks, block_size = kv_cache.shape[:2]
    if num_blocks > 1 and kv_cache.stride(0) != block_size * TOKEN_BYTES:
        return (
            f"aiter takes blocks of {block_size * TOKEN_BYTES} bytes with nothing between them, "
            f"not {kv_cache.stride(0)} bytes apart"
        )
    if fnuz != (arch in FNUZ_ARCHS):
        return f"aiter writes the FP8 format of the device ({fp8_of(arch in FNUZ_ARCHS)}), not {fp8_of(fnuz)}"
    return ""


def find(call: Call, settings: Settings, arch: str) -> Callable[..., Any]:
    """The function of a call, on a device of this arch. Imports aiter.

    Raises:
        SettingError: there is none to call here, with the reason.
    """
    if why := why_not(settings, arch) or why_unusable(find_aiter()):
        raise _cannot_serve(call, why)
    try:
        return resolve(call)
    except Exception as error:  # its import alone raises RuntimeError, and more, where something does not suit it
        raise _cannot_serve(call, f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def _cannot_serve(call: Call, why: str) -> SettingError:
    return SettingError(f"FUSEDCOMM_BACKEND: aiter cannot serve {call.function}: {why}")


@functools.cache
def _indexer_k_quant_and_cache(arch: str) -> Callable[..., Any]:
    """Looked for once: the environment, the package and its signature are not read again."""
    return find(INDEXER_K_QUANT_AND_CACHE, Settings.from_environ(), arch)


def _indexer_k_write(
    k: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, ue8m0: bool, preshuffle: bool, fnuz: bool
) -> None:
    """indexer_k_write of fusedcomm.ops.attention.indexer_reference; SettingError where aiter cannot serve the call."""
    arch = device_facts(kv_cache.device).arch
    write = _indexer_k_quant_and_cache(arch)
    if why := why_not_write(kv_cache, fnuz, arch):
        raise _cannot_serve(INDEXER_K_QUANT_AND_CACHE, why)
    num_blocks, block_size = kv_cache.shape[:2]
    if k.shape[0] == 0 or num_blocks == 0:
        return
    slots = torch.where(slot_mapping < num_blocks * block_size, slot_mapping, -1)
    scale_fmt = "ue8m0" if ue8m0 else ""  # a string, and not None
    write(k.contiguous(), kv_cache.view(fp8_of(fnuz)), slots, HEAD_DIM, scale_fmt, preshuffle)


def _nothing(*args: object) -> None:
    """What an operator that only writes to tensors of its caller makes of fake ones."""


_library = torch.library.Library("fusedcomm_aiter", "DEF")
_library.define(
    "indexer_k_write(Tensor k, Tensor(a!) kv_cache, Tensor slot_mapping, bool ue8m0, bool preshuffle, bool fnuz) -> ()"
)
for _key in ("CUDA", "CPU"):  # CUDA is HIP's key too; on the CPU it says why it cannot serve
    _library.impl("indexer_k_write", _indexer_k_write, _key)
torch.library.register_fake("fusedcomm_aiter::indexer_k_write", _nothing, lib=_library)

indexer_k_write = torch.ops.fusedcomm_aiter.indexer_k_write.default
