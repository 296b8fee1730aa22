"""The two caches of sparse MLA, filled and read in plain torch by the definition of their layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm import platform
from fusedcomm.cli.bench.single.workload import Place

BLOCK_SIZE = 64
ROPE_DIM = 64
VALUE_DIM = 512
PATTERN_BLOCKS = 512
"""So many blocks hold values of their own; a larger cache repeats them. What counts for speed is where they lie."""


class Layout(NamedTuple):
    """One of the caches."""

    token_bytes: int
    num_values: int
    """FP8 values of a token."""
    group: int
    """Values a scale."""
    query_dim: int

    @property
    def num_scales(self) -> int:
        return self.num_values // self.group


V4 = Layout(584, 448, 64, 512)
"""A block: its tokens' 448 FP8 values and 64 bf16, then 8 bytes for each: 7 UE8M0 scales and one that is not used."""
V32 = Layout(656, 512, 128, 576)
"""A token: 512 FP8 values, 4 fp32 scales, 64 bf16."""


class TokenViews(NamedTuple):
    """Views of a cache ``[blocks, BLOCK_SIZE, n]``: FP8 codes, scales as they are stored, bf16."""

    codes: torch.Tensor
    scales: torch.Tensor
    rope: torch.Tensor


def new_cache(layout: Layout, tokens: int, place: Place) -> torch.Tensor:
    """Bytes ``[blocks, BLOCK_SIZE, token_bytes]``; the blocks of V4 lie a multiple of 576 bytes apart."""
    blocks = -(-tokens // BLOCK_SIZE)
    used = BLOCK_SIZE * layout.token_bytes
    stride = -(-used // 576) * 576 if layout is V4 else used
    memory = torch.empty(blocks, stride, dtype=torch.uint8, device=place.device)
    cache: torch.Tensor = memory[:, :used].unflatten(1, (BLOCK_SIZE, layout.token_bytes))
    _fill(layout, cache, place)
    return cache


def views(layout: Layout, cache: torch.Tensor) -> TokenViews:
    """The parts of each token."""
    blocks = cache.flatten(1)
    if layout is V4:
        data, scales = blocks.split([BLOCK_SIZE * 576, BLOCK_SIZE * 8], dim=1)
        codes, rope = data.unflatten(1, (BLOCK_SIZE, 576)).split([448, 128], dim=-1)
        return TokenViews(codes, scales.unflatten(1, (BLOCK_SIZE, 8))[..., :7], rope.view(torch.bfloat16))
    codes, scales, rope = blocks.unflatten(1, (BLOCK_SIZE, 656)).split([512, 16, 128], dim=-1)
    return TokenViews(codes, scales.view(torch.float32), rope.view(torch.bfloat16))


def dequantise(layout: Layout, cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys ``[..., query_dim]`` of tokens by their slots, as the lines of torch that a user would write."""
    parts = views(layout, cache)
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    values = parts.codes[block, offset].view(platform.fp8_dtype(cache.device)).float()
    scales = parts.scales[block, offset]
    if layout is V4:
        scales = torch.exp2(scales.float() - 127)
    values = values.unflatten(-1, (layout.num_scales, layout.group)) * scales.unsqueeze(-1)
    return torch.cat((values.flatten(-2).to(dtype), parts.rope[block, offset].to(dtype)), dim=-1)


def _fill(layout: Layout, cache: torch.Tensor, place: Place) -> None:
    blocks = min(len(cache), PATTERN_BLOCKS)
    fp8_dtype = platform.fp8_dtype(cache.device)
    limit = torch.finfo(fp8_dtype).max
    x = place.normal((blocks, BLOCK_SIZE, layout.num_scales, layout.group), 11, torch.float32)
    scale = x.abs().amax(-1) / limit
    if layout is V4:
        exponent = torch.ceil(torch.log2(scale))
        scale = torch.exp2(exponent)
    codes = (x / scale.unsqueeze(-1)).clamp(-limit, limit).to(fp8_dtype).view(torch.uint8).flatten(-2)
    rope = place.normal((blocks, BLOCK_SIZE, ROPE_DIM), 12)
    into = views(layout, cache)
    stored = (exponent + 127).to(torch.uint8) if layout is V4 else scale
    for first in range(0, len(cache), blocks):
        count = min(blocks, len(cache) - first)
        for part, source in zip(into, (codes, stored, rope), strict=True):
            part[first : first + count] = source[:count]
