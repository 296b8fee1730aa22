"""The indexer's paged cache as views of its bytes, by the definition of its layouts, for plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

HEAD_DIM = 128
TOKEN_BYTES = HEAD_DIM + 4
BLOCK_SIZE = 64
TILE = 16
LAYOUTS = {"plain": False, "preshuffled": True}


class CacheViews(NamedTuple):
    """Views of a cache ``[blocks, BLOCK_SIZE, 132]`` of bytes."""

    codes: torch.Tensor
    """FP8 codes: plain ``[blocks, BLOCK_SIZE, 128]``; preshuffled ``[blocks, BLOCK_SIZE / 16, 16, 8, 16]``: tile and
    offset of the token, tile and offset of the element."""
    scales: torch.Tensor
    """fp32 ``[blocks, BLOCK_SIZE]``."""


def views(cache: torch.Tensor, preshuffle: bool) -> CacheViews:
    """The views of a cache without padding."""
    blocks = cache.flatten(1)
    codes, scales = blocks.split([BLOCK_SIZE * HEAD_DIM, BLOCK_SIZE * 4], dim=1)
    if preshuffle:
        codes = codes.unflatten(1, (BLOCK_SIZE // TILE, HEAD_DIM // TILE, TILE, TILE)).transpose(2, 3)
    else:
        codes = codes.unflatten(1, (BLOCK_SIZE, HEAD_DIM))
    return CacheViews(codes, scales.view(torch.float32))


def token_codes(codes: torch.Tensor, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The codes ``[T, 128]`` of tokens by their place."""
    if codes.dim() == 3:
        return codes[block, offset]
    return codes[block, offset // TILE, offset % TILE].flatten(1)


def quantise(k: torch.Tensor, fp8_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (bytes) and scales that are powers of two, as a user would write it."""
    limit = torch.finfo(fp8_dtype).max
    rows = k.float()
    scale = torch.exp2(torch.ceil(torch.log2(rows.abs().amax(-1).clamp(min=1e-4) / limit)))
    codes = (rows / scale.unsqueeze(-1)).clamp(-limit, limit).to(fp8_dtype).view(torch.uint8)
    return codes, scale


def write(k: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, preshuffle: bool, fp8_dtype: torch.dtype) -> None:
    """Quantises ``k [T, 128]`` and scatters it; every slot is one of the cache."""
    codes, scale = quantise(k, fp8_dtype)
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    into = views(cache, preshuffle)
    if preshuffle:
        into.codes[block, offset // TILE, offset % TILE] = codes.unflatten(1, (HEAD_DIM // TILE, TILE))
    else:
        into.codes[block, offset] = codes
    into.scales[block, offset] = scale


def num_blocks(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_SIZE)


def new_cache(blocks: int, device: torch.device) -> torch.Tensor:
    """Bytes ``[blocks, BLOCK_SIZE, 132]``, not written yet."""
    return torch.empty(blocks, BLOCK_SIZE, TOKEN_BYTES, dtype=torch.uint8, device=device)


def shuffled_blocks(blocks: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """All blocks in a random order, int64: requests get them as an allocator has them free."""
    return torch.randperm(blocks, generator=generator, device=device)
