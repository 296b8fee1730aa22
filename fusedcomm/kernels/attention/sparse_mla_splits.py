"""How sparse MLA decode is spread over a device: what a program takes, and into how many parts keys are split."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

MAX_SPLITS = 16
_START = 2
"""What a program takes beside its tiles, in tiles: three loads that wait for each other, queries, a result."""
_REDUCTION = 3
"""What the second launch takes, in tiles."""


class Tile(NamedTuple):
    """What a program takes; see sparse_mla_decode_kernel."""

    heads: int
    keys: int
    num_warps: int
    merged: bool
    in_registers: bool
    programs: int
    """That run on a multiprocessor at the same time."""


def tile_of(num_heads: int, arch: str) -> Tile:
    """The tile for heads and an architecture (``"cpu"`` takes that of sm_90).

    sm_90, as compiled by Triton 3.6 for 656 bytes a token:

    - 64 heads of 64 keys. The result takes 128 registers of each of 256 threads, the next keys 40; queries, keys and
      the exchange of weights 153 KB. So one program fits, with 255 registers and nothing spilled in the loop. wgmma
      takes 64 rows at least, and keys and values from memory: one copy of the tile, one product over all its columns.
    - 16 heads fill a quarter of wgmma, so they go by mma.sync, with keys as its right operand, straight out of the
      registers that they were dequantised in. What limits such a program is the shared memory, which queries cross once
      a warp and tile: four warps of 255 registers, 87 KB, two programs at a time.
    - 32 heads: the same by eight warps.

    AMD: each piece of keys goes through 8 KB of LDS to the registers of MFMA, of which there are 512: a wavefront a
    SIMD. 64 keys, so that each of 256 threads loads 16 bytes. With more than 16 heads Triton 3.6 spills up to 40
    registers, 3.9 none.
    Others have the smallest tile, which fits their 99 KB of shared memory.
    """
    if arch.startswith("gfx"):
        heads = 16 if num_heads <= 16 else 32 if num_heads <= 32 else 64
        return Tile(heads, keys=64, num_warps=4, merged=False, in_registers=False, programs=1)
    if num_heads > 32 and arch in ("sm_90", "cpu"):
        return Tile(64, keys=64, num_warps=8, merged=True, in_registers=False, programs=1)
    if num_heads > 16 and arch in ("sm_90", "cpu"):
        return Tile(32, keys=64, num_warps=8, merged=False, in_registers=True, programs=1)
    return Tile(16, keys=64, num_warps=4, merged=False, in_registers=True, programs=2)


@functools.lru_cache(maxsize=4096)
def choose_splits(num_programs: int, num_tiles: int, num_slots: int) -> int:
    """Into how many parts to split the keys of each row, 1 to 16: what is done soonest, counted in tiles.

    ``num_programs``: of one split; ``num_tiles``: that a row may have; ``num_slots``: programs that run at a time.
    """

    def duration(splits: int) -> int:
        waves = math.ceil(num_programs * splits / num_slots)
        return waves * (math.ceil(num_tiles / splits) + _START) + (_REDUCTION if splits > 1 else 0)

    return min(range(1, max(min(MAX_SPLITS, num_tiles), 1) + 1), key=duration)


# ---- the compiled kernel for Hopper ----


class Plan(NamedTuple):
    """How a call of the compiled kernel is spread over a device."""

    block_heads: int
    """16, 32 or 64: heads of a block."""
    num_splits: int
    merged: bool
    """Whether a cluster of blocks merges the splits, in the same launch."""


class _Form(NamedTuple):
    """What a block takes, in microseconds: fits what an H200 took for 1 to 32 tiles a block, to 10% (2026-11-21)."""

    start: float
    tile: float
    """64 keys."""


_FORMS = {16: _Form(5.4, 2.0), 32: _Form(8.5, 2.1), 64: _Form(5.5, 2.8)}
_MERGE, _SHARE = 0.4, 3.5
"""What it takes to merge splits in a cluster, in microseconds: beside its share of the results, and for all of them."""
_REDUCE = 1.3
"""What the second launch takes beside its bytes, in microseconds."""
_BYTES_PER_US = 2.5e6
_PARTIAL_BYTES = 2 * 4 * 512
"""Of a head and split: written and read."""


def choose_plan(
    rows: int,
    num_heads: int,
    num_tiles: int,
    num_sms: int,
    active_clusters: Mapping[int, Sequence[int]],
    num_splits: int | None = None,
) -> Plan:
    """What is done soonest, with ``num_splits`` splits if that is given, otherwise with 1 to 16 of them.

    ``num_tiles``: of 64 keys, that a row may have. ``active_clusters[block_heads][splits]``: how many clusters that
    merge so many splits run at a time; 0 where there are none.
    """

    def duration(plan: Plan) -> float:
        form = _FORMS[plan.block_heads]
        per_split = rows * math.ceil(num_heads / plan.block_heads)
        block = form.start + math.ceil(num_tiles / plan.num_splits) * form.tile
        if plan.merged:
            return (
                math.ceil(per_split / active_clusters[plan.block_heads][plan.num_splits]) * block
                + _MERGE
                + _SHARE / plan.num_splits
            )
        waves = math.ceil(per_split * plan.num_splits / num_sms)
        if plan.num_splits == 1:
            return waves * block
        return waves * block + _REDUCE + rows * num_heads * plan.num_splits * _PARTIAL_BYTES / _BYTES_PER_US

    def candidates() -> Iterator[Plan]:
        most = max(min(MAX_SPLITS, num_tiles), 1)
        for splits in range(1, most + 1) if num_splits is None else (num_splits,):
            for block_heads in _FORMS:
                clusters = active_clusters.get(block_heads, ())
                if 1 < splits < len(clusters) and clusters[splits] > 0:
                    yield Plan(block_heads, splits, merged=True)
                yield Plan(block_heads, splits, merged=False)

    return min(candidates(), key=duration)
