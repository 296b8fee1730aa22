"""Sizes and waiting times of the shared-memory collectives, measured (benchmarks/bench_collectives.py --tune)."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 4096


@dataclass(frozen=True)
class Tuning:
    """Bytes and nanoseconds; the same on all ranks, because it follows from facts that they share."""

    piece_bytes: int
    one_shot_max_bytes: int
    chunk_bytes: int
    spins: int
    yield_ns: int


def slot_bytes(buffer_mb: int) -> int:
    """One of the two slots of a slab, a multiple of the page size."""
    return buffer_mb * (1 << 20) // 2 // PAGE * PAGE


def choose_tuning(world_size: int, cores: int, slot: int) -> Tuning:
    """The tuning for ranks that share ``cores`` cores (the smallest count that a rank reported)."""
    if world_size > cores:
        # Every round costs each rank a turn on a core: as few rounds as fit, and no spinning on a core that the rank
        # waited for needs. Yielding beats sleeping on an idle machine and loses badly on a busy one.
        return Tuning(piece_bytes=slot, one_shot_max_bytes=64 << 10, chunk_bytes=64 << 10, spins=0, yield_ns=0)
    # Pieces that stay in the second-level cache between the copy in and the sum.
    piece = min(slot, 256 << 10)
    two_shot_from = (1 << 62) if world_size <= 2 else 256 << 10
    return Tuning(
        piece_bytes=piece, one_shot_max_bytes=two_shot_from, chunk_bytes=32 << 10, spins=2000, yield_ns=50_000
    )
