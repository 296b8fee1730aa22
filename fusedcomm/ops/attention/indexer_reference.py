"""The indexer's cache and logits in plain torch: the CPU path, and the yardstick of the kernels.

The functions are operators: arguments have been checked, caches come as bytes. Nothing here depends on data on the
host (no ``.item()``, no boolean indexing), so torch.compile and graph capture take it.
"""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.paged import (
    block_bytes,
    byte_index,
    decode,
    first_valid,
    quantise,
    round_up_to_power_of_two,
)

HEAD_DIM = 128
"""Elements of a key of the indexer."""
SCALE_BYTES = 4
TOKEN_BYTES = HEAD_DIM + SCALE_BYTES
TILE = 16
"""Tokens, and elements, of a tile of the preshuffled layout."""
_PIECE = 4096  # tokens of the context whose scores are held at a time


def value_positions(offset: torch.Tensor, preshuffle: bool) -> torch.Tensor:
    """Where in its block the 128 values of the token at ``offset [...]`` lie: ``[..., 128]``."""
    o, c = offset.unsqueeze(-1), torch.arange(HEAD_DIM, device=offset.device)
    if preshuffle:
        return o // TILE * (TILE * HEAD_DIM) + c // TILE * (TILE * TILE) + o % TILE * TILE + c % TILE
    return o * HEAD_DIM + c


def scale_positions(offset: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where in its block the 4 bytes of the scale lie: ``[..., 4]``."""
    byte = torch.arange(SCALE_BYTES, device=offset.device)
    return block_size * HEAD_DIM + offset.unsqueeze(-1) * SCALE_BYTES + byte


def indexer_k_write(
    k: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, ue8m0: bool, preshuffle: bool, fnuz: bool
) -> None:
    num_blocks, block_size = kv_cache.shape[:2]
    if k.shape[0] == 0 or num_blocks == 0:
        return
    groups = quantise(k.unsqueeze(1), fnuz, round_up_to_power_of_two if ue8m0 else None)
    token = torch.cat((groups.codes.squeeze(1), groups.scale.view(torch.uint8)), dim=-1)
    known = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    source, slot = first_valid(known, slot_mapping)
    offset = slot % block_size
    block = (slot // block_size).unsqueeze(-1)
    at = torch.cat((value_positions(offset, preshuffle), scale_positions(offset, block_size)), dim=-1)
    index = byte_index(kv_cache, block, at)
    # With no slot at all, all rows stand for slot 0 and put back what is there.
    kv_cache[index] = torch.where(known.any(), token[source], kv_cache[index])


def indexer_k_gather(
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    preshuffle: bool,
) -> None:
    num_rows, num_requests = dst_k.shape[0], block_table.shape[0]
    if 0 in (num_rows, num_requests, block_table.shape[1], kv_cache.shape[0]):
        return
    row = torch.arange(num_rows, dtype=torch.int32, device=dst_k.device)
    request = torch.searchsorted(cu_seq_lens, row, right=True) - 1  # the last that begins at or before the row
    known = (request >= 0) & (request < num_requests)
    request = torch.where(known, request, 0)
    values, scale, found = _read(kv_cache, block_table, request, row.long() - cu_seq_lens[request], preshuffle)
    known &= found
    dst_k.copy_(torch.where(known.unsqueeze(-1), values, dst_k))
    dst_scale.copy_(torch.where(known, scale, dst_scale))


def indexer_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    preshuffle: bool,
    fnuz: bool,
) -> None:
    batch, next_n, num_heads = q.shape[:3]
    length = out.shape[1]
    if 0 in (batch, length, kv_cache.shape[0], block_table.shape[1]):
        out.fill_(-torch.inf)
        return
    visible = context_lens
    if visible.dim() == 1:  # the last query sees the whole context, each before it one token fewer
        visible = visible.unsqueeze(-1) + torch.arange(1 - next_n, 1, device=q.device)
    queries = decode(q, fnuz).view(batch, next_n * num_heads, HEAD_DIM)
    rows = out.view(batch, next_n, length)
    for first in range(0, length, _PIECE):  # bounds the memory, not the speed
        token = torch.arange(first, min(first + _PIECE, length), device=q.device)
        request = torch.arange(batch, device=q.device).unsqueeze(-1).expand(-1, len(token))
        codes, scale, found = _read(kv_cache, block_table, request, token.expand(batch, -1), preshuffle)
        scores = torch.bmm(queries, decode(codes, fnuz).transpose(1, 2)).relu_()
        scores = scores.view(batch, next_n, num_heads, -1) * weights.view(batch, next_n, num_heads, 1)
        logits = scores.sum(2) * scale.unsqueeze(1)
        seen = found.unsqueeze(1) & (token < visible.unsqueeze(-1))
        rows[..., first : first + _PIECE] = torch.where(seen, logits, -torch.inf)


def _read(
    kv_cache: torch.Tensor, block_table: torch.Tensor, request: torch.Tensor, token: torch.Tensor, preshuffle: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[..., 128]`` and scales ``[...]`` of tokens of requests, and whether the tables have a block for them."""
    num_blocks, block_size = kv_cache.shape[:2]
    column = token // block_size
    listed = (token >= 0) & (column < block_table.shape[1])
    block = block_table[request, torch.where(listed, column, 0)].long()
    found = listed & (block >= 0) & (block < num_blocks)
    block = torch.where(found, block, 0).unsqueeze(-1)
    offset = torch.where(found, token % block_size, 0)
    blocks = block_bytes(kv_cache)
    codes = blocks[block, value_positions(offset, preshuffle)]
    scale = blocks[block, scale_positions(offset, block_size)].view(torch.float32).squeeze(-1)
    return codes, scale, found
