"""Sizes and waiting times of the custom collectives, as measured (docs/tuning.md says how and where)."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 4096
KIB = 1 << 10


@dataclass(frozen=True)
class Tuning:
    """Bytes and nanoseconds; the same on all ranks, because it follows from facts that they share."""

    piece_bytes: int
    """What one round moves at most."""
    one_shot_max_bytes: int
    """Up to here every rank sums for itself; above, the ranks share the work (two-shot)."""
    min_chunk_bytes: int
    max_chunk_bytes: int
    """What a rank takes at a time of the shared work."""
    spins: int
    """Polls before a waiting rank gives up its core."""
    yield_ns: int
    """How long it offers its core to others before it sleeps."""


def slot_bytes(buffer_mb: int) -> int:
    """One of the two slots of a slab, a multiple of the page size."""
    return buffer_mb * KIB * KIB // 2 // PAGE * PAGE


def choose_tuning(world_size: int, cores: int, slot: int) -> Tuning:
    """The tuning for ranks that share ``cores`` cores (the smallest count that a rank reported).

    Two-shot wins wherever there is a sum worth sharing: it reads each input once, and a rank that has no core at the
    moment holds nobody up. A piece is a slot; the default slab makes it a megabyte, which stays in the caches between
    the copy in and the sum. That pays even where each round costs every rank a turn on a core.
    """
    busy = world_size > cores
    return Tuning(
        piece_bytes=slot,
        one_shot_max_bytes=KIB,
        min_chunk_bytes=KIB,
        max_chunk_bytes=32 * KIB,
        # A core that the awaited rank needs is given up at once. Yielding it is faster than sleeping on an idle machine
        # (by a sixth) and far slower on a busy one (tenfold).
        spins=0 if busy else 2000,
        yield_ns=0 if busy else 50_000,
    )


@dataclass(frozen=True)
class GpuTuning:
    """Bytes; the same on all ranks, because it follows from facts that they share."""

    one_shot_max_bytes: int
    """Up to here every rank pushes its input to all and sums for itself; above, ranks own rows (two-shot)."""


_EXTRA_HOP_BYTES = 400_000
"""What a link carries in the time of two-shot's second hop: 1.2 µs at 335 GB/s, from the crossing on 4 H200s."""
_MOST_ONE_SHOT_BYTES = 4 * KIB * KIB
"""Where two-shot moves no less (two ranks); a message that fills the links gains nothing from more one-shot slots."""


def choose_gpu_tuning(world_size: int) -> GpuTuning:
    """The tuning for ``world_size`` GPUs.

    For a message of S bytes, one-shot moves (W - 1) S out of each rank in one hop, two-shot 2 (W - 1) / W S in two.
    They cross where the difference, (W - 1) (W - 2) / W S, is what a link carries in the time of a hop.
    """
    saved = (world_size - 1) * (world_size - 2) / world_size
    crossing = _EXTRA_HOP_BYTES / saved if saved else _MOST_ONE_SHOT_BYTES
    return GpuTuning(int(min(crossing, _MOST_ONE_SHOT_BYTES)))
