"""The sparse MLA caches and decode in plain torch: the CPU path, and the yardstick of the kernels.

The functions are operators: arguments have been checked, caches come as bytes. Nothing here depends on data on the
host (no ``.item()``, no boolean indexing), so torch.compile and graph capture take it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.ops.attention.paged import decode, first_valid, power_of_two_exponent, quantise, ue8m0_value
from fusedcomm.ops.attention.sparse_mla_layout import LAYOUTS, VALUE_DIM, TokenBytes, token_views

_TILE = 64  # keys of one row that are looked at together
_CHUNK_BYTES = 64 << 20  # of the tiles that are in memory at a time


# ---- write ----


def sparse_mla_write(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, fnuz: bool) -> None:
    num_blocks, block_size = cache.shape[:2]
    if kv.shape[0] == 0 or num_blocks == 0:
        return
    known = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    source, slot = first_valid(known, slot_mapping)
    at = slot // block_size, slot % block_size
    for view, token in zip(token_views(cache), _as_stored(kv, cache.shape[2], fnuz), strict=True):
        # With no slot at all, all rows stand for slot 0 and put back what is there.
        view[at] = torch.where(known.any(), token[source], view[at])


def _as_stored(kv: torch.Tensor, token_bytes: int, fnuz: bool) -> TokenBytes:
    layout = LAYOUTS[token_bytes]
    nope, rope = kv[:, : layout.nope_dim], kv[:, layout.nope_dim :]
    groups = quantise(
        nope.unflatten(-1, (-1, layout.group_size)),
        fnuz,
        (lambda scale: ue8m0_value(power_of_two_exponent(scale))) if layout.has_ue8m0 else None,
    )
    if layout.has_ue8m0:
        scale = torch.nn.functional.pad(power_of_two_exponent(groups.scale).to(torch.uint8), (0, 1))
    else:
        scale = groups.scale.view(torch.uint8)
    return TokenBytes(groups.codes.flatten(-2), scale, rope.to(torch.bfloat16).contiguous().view(torch.uint8))


# ---- read ----


def read_keys(cache: torch.Tensor, slot: torch.Tensor, fnuz: bool) -> torch.Tensor:
    """The fp32 keys ``[..., 512 or 576]`` of slots of the cache; 0 for a slot that it has not."""
    num_blocks, block_size, token_bytes = cache.shape
    layout = LAYOUTS[token_bytes]
    known = (slot >= 0) & (slot < num_blocks * block_size)
    slot = torch.where(known, slot, 0).long()
    codes, scale, rope = (view[slot // block_size, slot % block_size] for view in token_views(cache))
    scale = ue8m0_value(scale[..., :-1]) if layout.has_ue8m0 else scale.view(torch.float32)
    nope = decode(codes, fnuz).unflatten(-1, (-1, layout.group_size)) * scale.unsqueeze(-1)
    keys = torch.cat((nope.flatten(-2), rope.view(torch.bfloat16).float()), dim=-1)
    return torch.where(known.unsqueeze(-1), keys, 0.0)  # whatever slot 0 holds


# ---- attention ----


class _Tiles(NamedTuple):
    """Lists of keys cut into tiles of one row each."""

    row: torch.Tensor
    """``[tiles]``."""
    slot: torch.Tensor
    """``[tiles, _TILE]``; -1 for none."""


class _State(NamedTuple):
    """What the keys so far have left (Milakov and Gimelshein, 2018); fp32."""

    m: torch.Tensor
    """``[B, H]``: the largest score; -inf before there is a key."""
    total: torch.Tensor
    """``[B, H]``: the sum of weights ``exp(score - m)``."""
    acc: torch.Tensor
    """``[B, H, 512]``: the weighted sum of values."""


def sparse_mla_decode_out(
    q: torch.Tensor,
    main_cache: torch.Tensor,
    main_indices: torch.Tensor,
    main_lens: torch.Tensor | None,
    main_indptr: torch.Tensor | None,
    extra_cache: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_lens: torch.Tensor | None,
    extra_indptr: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scale: float,
    num_splits: int | None,
    fnuz: bool,
    out: torch.Tensor,
) -> None:
    """``num_splits`` is for the kernels: this is one sum."""
    rows, num_heads = q.shape[:2]
    if rows == 0:
        return
    queries = q.float() * scale
    state = _State(
        queries.new_full((rows, num_heads), -torch.inf),
        queries.new_zeros((rows, num_heads)),
        queries.new_zeros((rows, num_heads, VALUE_DIM)),
    )
    state = _attend(queries, main_cache, _tiles(main_indices, main_lens, main_indptr), fnuz, state)
    if extra_cache is not None and extra_indices is not None:
        state = _attend(queries, extra_cache, _tiles(extra_indices, extra_lens, extra_indptr), fnuz, state)
    with_sink = state.total if attn_sink is None else state.total + torch.exp(attn_sink - _shift(state.m))
    # without any key the result is 0, whatever the sink
    out.copy_(state.acc / torch.where(state.total == 0, 1.0, with_sink).unsqueeze(-1))


def _tiles(indices: torch.Tensor, lens: torch.Tensor | None, indptr: torch.Tensor | None) -> _Tiles:
    """As many tiles as the lists could fill; tiles that they do not are of -1."""
    inside = torch.arange(_TILE, device=indices.device)
    if lens is not None:
        rows, size = indices.shape
        padded = torch.nn.functional.pad(indices, (0, -size % _TILE), value=-1)
        known = torch.arange(padded.shape[1], device=indices.device) < lens.unsqueeze(-1)
        slot = torch.where(known, padded, -1).view(-1, _TILE)
        row = torch.arange(rows, device=indices.device).repeat_interleave(padded.shape[1] // _TILE)
        return _Tiles(row, slot)
    assert indptr is not None
    size, rows = indices.shape[0], indptr.shape[0] - 1
    begin = indptr[:-1].clamp(0, size).long()
    length = (indptr[1:].clamp(max=size).long() - begin).clamp(min=0)
    tiles = (length + _TILE - 1) // _TILE
    end = tiles.cumsum(0)
    tile = torch.arange(size // _TILE + rows, device=indices.device)
    row = torch.searchsorted(end, tile, right=True)
    in_a_row = row < rows
    row = torch.where(in_a_row, row, 0)
    position = ((tile - end[row] + tiles[row]) * _TILE).unsqueeze(-1) + inside
    known = in_a_row.unsqueeze(-1) & (position < length[row].unsqueeze(-1))
    if size == 0:
        return _Tiles(row, torch.full_like(position, -1))
    at = torch.where(known, begin[row].unsqueeze(-1) + position, 0)
    return _Tiles(row, torch.where(known, indices[at], -1))


def _attend(queries: torch.Tensor, cache: torch.Tensor, tiles: _Tiles, fnuz: bool, state: _State) -> _State:
    num_slots = cache.shape[0] * cache.shape[1]
    if num_slots == 0:
        return state
    num_heads, head_dim = queries.shape[1:]
    tile_bytes = 4 * (2 * _TILE * head_dim + 2 * num_heads * (head_dim + _TILE))
    size = max(_CHUNK_BYTES // tile_bytes, 1)
    for first in range(0, tiles.row.shape[0], size):
        row, slot = tiles.row[first : first + size], tiles.slot[first : first + size]
        keys = read_keys(cache, slot, fnuz)
        known = ((slot >= 0) & (slot < num_slots)).unsqueeze(1)
        scores = torch.where(known, torch.bmm(queries[row], keys.transpose(1, 2)), -torch.inf)
        to = row.unsqueeze(-1).expand(-1, num_heads)
        m = state.m.scatter_reduce(0, to, scores.amax(-1), "amax")
        shift = _shift(m)
        weights = torch.exp(scores - shift[row].unsqueeze(-1))
        alpha = torch.exp(state.m - shift)
        total = (state.total * alpha).index_add(0, row, weights.sum(-1))
        values = torch.bmm(weights, keys[..., :VALUE_DIM])
        state = _State(m, total, (state.acc * alpha.unsqueeze(-1)).index_add(0, row, values))
    return state


def _shift(m: torch.Tensor) -> torch.Tensor:
    """What scores are taken relative to: the largest one, or 0 where there is none."""
    return torch.where(m == -torch.inf, 0.0, m)
