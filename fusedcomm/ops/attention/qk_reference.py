"""The QK and MLA ops in plain torch: the CPU path, and the yardstick of the kernels.

The arithmetic is that of fusedcomm.ops.reference for RMSNorm (Zhang and Sennrich, 2019) and of rotary embeddings (Su et
al., 2021): fp32, each product rounded, one rounding to the dtype of the input after the norm and one after the
rotation, which are those of the unfused ops. Functions ending in ``_out`` are operators: arguments have been checked.
The host never waits for data, so torch.compile and graph capture take them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.ops.attention.paged import first_valid
from fusedcomm.ops.reference import rms_norm


def rope(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, neox: bool) -> torch.Tensor:
    """Rotates the first R elements of ``x [T, ..., D]`` by ``cos_sin [P, R]`` at ``positions [T]``.

    In fp32, rounded once to the dtype of x. A position outside of the table makes them NaN.
    """
    rotary_dim = cos_sin.shape[1]
    known = (positions >= 0) & (positions < cos_sin.shape[0])
    table = cos_sin[torch.where(known, positions, 0)].float()
    table = torch.where(known.unsqueeze(-1), table, torch.nan)
    cos, sin = table.view(-1, *[1] * (x.dim() - 2), rotary_dim).chunk(2, dim=-1)
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    a, b = rotated.chunk(2, dim=-1) if neox else (rotated[..., 0::2], rotated[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.cat((a, b), dim=-1) if neox else torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def qk_rmsnorm_out(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:
    q_out.copy_(rms_norm(q, q_weight, eps, weight_bias=weight_bias))
    k_out.copy_(rms_norm(k, k_weight, eps, weight_bias=weight_bias))


def qk_norm_rope_out(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    weight_bias: float,
    neox: bool,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    heads = qkv.unflatten(-1, (-1, q_out.shape[2]))
    q, k, v = heads.split([q_out.shape[1], k_out.shape[1], k_out.shape[1]], dim=1)
    k_out.copy_(rope(rms_norm(k, k_weight, eps, weight_bias=weight_bias), cos_sin, positions, neox))
    q_out.copy_(rope(rms_norm(q, q_weight, eps, weight_bias=weight_bias), cos_sin, positions, neox))
    if v_out is not None:
        v_out.copy_(v)
    if k_cache is None or v_cache is None or slot_mapping is None:
        return
    shuffled = k_cache.dim() == 5
    block_size = k_cache.shape[3] if shuffled else k_cache.shape[1]
    if k_cache.shape[0] == 0 or qkv.shape[0] == 0:
        return
    places = find_places(slot_mapping, k_cache.shape[0], block_size)
    keys, values = as_stored(k_out, k_cache.dtype, k_scale), as_stored(v, v_cache.dtype, v_scale)
    k_bytes, v_bytes = as_bytes(k_cache), as_bytes(v_cache)
    block, offset, every = places.block, places.offset, slice(None)
    if not shuffled:
        put(k_bytes, (block, offset), keys, places)
        put(v_bytes, (block, offset), values, places)
        return
    pack = k_cache.shape[4]
    put(k_bytes, (block, every, every, offset), keys.unflatten(-1, (-1, pack)), places)
    put(v_bytes, (block, every, offset // pack, every, offset % pack), values, places)


def kv_materialize_out(
    kv: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    weight_bias: float,
    neox: bool,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    k, v = kv.transpose(0, 1).unbind(2)
    for keys, weight, out in zip(k, k_weight, k_out, strict=True):
        out.copy_(rope(rms_norm(keys, weight, eps, weight_bias=weight_bias), cos_sin, positions, neox))
    v_out.copy_(v)


def mla_prepare_out(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_scale: torch.Tensor | None,
    neox: bool,
    q_out: torch.Tensor,
) -> None:
    q_out.copy_(torch.cat((q_nope, rope(q_pe, cos_sin, positions, neox)), dim=-1))
    num_blocks, block_size = kv_cache.shape[:2]
    if num_blocks == 0 or q_nope.shape[0] == 0:
        return
    key = torch.cat((k_nope, rope(k_pe, cos_sin, positions, neox)), dim=-1)
    places = find_places(slot_mapping, num_blocks, block_size)
    put(as_bytes(kv_cache), (places.block, places.offset), as_stored(key, kv_cache.dtype, k_scale), places)


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """An FP8 tensor as uint8, which can be indexed everywhere; any other as it is."""
    return t.view(torch.uint8) if t.element_size() == 1 else t


def as_stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x as a cache of this dtype holds it: as it is, or the bytes of ``clamp(x / scale)`` in FP8."""
    if dtype == x.dtype:
        return x
    y = x.float() if scale is None else x.float() / scale.view(())
    limit = torch.finfo(dtype).max
    return y.clamp(-limit, limit).to(dtype).view(torch.uint8)


class Places(NamedTuple):
    """Where tokens go in a paged cache: as many writes as tokens, and none that differ in one place."""

    is_any: torch.Tensor
    """bool: without it there is nothing to write, and what is in slot 0 is written there again."""
    source: torch.Tensor
    """``[T]``: whose keys and values are written. A token without a slot repeats what another one writes."""
    block: torch.Tensor
    offset: torch.Tensor


def find_places(slot_mapping: torch.Tensor, num_blocks: int, block_size: int) -> Places:
    """Of tokens with these slots; any that the cache has not is left out."""
    known = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    source, slot = first_valid(known, slot_mapping)
    return Places(known.any(), source, slot // block_size, slot % block_size)


def put(cache: torch.Tensor, at: tuple[torch.Tensor | slice, ...], values: torch.Tensor, places: Places) -> None:
    """``cache[at] = values[places.source]``, if there is any."""
    cache[at] = torch.where(places.is_any, values[places.source], cache[at])
