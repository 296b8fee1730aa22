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


_GPU_TUNING: dict[tuple[str, int], GpuTuning] = {}
"""What was measured: by architecture and world size."""


def choose_gpu_tuning(arch: str, world_size: int) -> GpuTuning:
    """The tuning for ``world_size`` GPUs of one architecture; where none was measured, what the traffic suggests.

    One-shot moves (W - 1) * S bytes a rank in one hop, two-shot 2 * (W - 1) / W * S in two.
    """
    default = GpuTuning((512 if world_size <= 4 else 256) * KIB)
    return _GPU_TUNING.get((arch, world_size), default)
