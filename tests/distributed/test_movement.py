"""all_gather, reduce_scatter, broadcast and barrier on real ranks: any dimension, any dtype, both ways of moving."""

from __future__ import annotations

import time
from typing import Any

import pytest
import spec
import torch
import torch.distributed as dist
from cases import make
from harness import RankPool
from ranked import bits, input_of, raises, works

from fusedcomm import GroupCoordinator, Settings

SUMMED = (torch.bfloat16, torch.float16, torch.float32)
MOVED = (
    *SUMMED,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
)
SHAPES = [(4,), (3, 5), (2, 3, 7), (1, 1, 1, 1), (1000, 33)]
SHARED = Settings()
PROCESS_GROUP = Settings(disable=True, deterministic=True)


def any_bytes(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Data of any dtype; every bit pattern but for bool."""
    if dtype is torch.bool:
        return make(seed, shape, torch.float32, "ordinary") > 0
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def gathers(settings: Settings) -> None:
    with GroupCoordinator(settings=settings) as group:
        for seed, dtype in enumerate(MOVED):
            for shape in SHAPES:
                parts = [any_bytes(seed * 16 + r, shape, dtype) for r in range(group.world_size)]
                for dim in range(-len(shape), len(shape)):
                    got = group.all_gather(parts[group.rank], dim=dim)
                    assert got.dtype is dtype
                    want = torch.cat([p.view(torch.uint8).view(*shape, -1) for p in parts], dim % len(shape))
                    assert got.shape == want.shape[:-1]
                    assert bits(got) == bits(want), f"{dtype} {shape} dim {dim}"
        got = group.all_gather(torch.arange(6).view(2, 3))  # dim is -1
        assert got.shape == (2, 3 * group.world_size)
        transposed = torch.arange(6).view(2, 3).t() + group.rank
        want = torch.cat([torch.arange(6).view(2, 3).t() + r for r in range(group.world_size)], 0)
        assert torch.equal(group.all_gather(transposed, dim=0), want)
        for shape, dim in (((0, 4), 0), ((0, 4), 1), ((3, 0), 1)):
            size = list(shape)
            size[dim] *= group.world_size
            assert list(group.all_gather(torch.empty(shape), dim=dim).shape) == size


@pytest.mark.parametrize("settings", [SHARED, PROCESS_GROUP], ids=["shared", "process_group"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_gather(ranks: RankPool, world_size: int, settings: Settings) -> None:
    ranks(world_size).run(gathers, settings)


def scatters(settings: Settings) -> None:
    with GroupCoordinator(settings=settings) as group:
        size = group.world_size
        for seed, dtype in enumerate(SUMMED):
            for shape, dim in [
                ((size,), 0),
                ((2 * size, 5), 0),
                ((5, 3 * size), 1),
                ((5, 3 * size), -1),
                ((2, size, 7), 1),
            ]:
                parts = [input_of(seed, r, shape, dtype) for r in range(size)]
                total = spec.rank_order_sum(parts)
                share = shape[dim] // size
                got = group.reduce_scatter(parts[group.rank], dim=dim)
                want = total.take(range(group.rank * share, (group.rank + 1) * share), axis=dim)
                assert got.is_contiguous()
                spec.assert_same(got, want, f"{dtype} {shape} dim {dim}")
        x = input_of(9, group.rank, (4 * size, 6), torch.float32)
        assert torch.equal(group.reduce_scatter(x), group.reduce_scatter(x, dim=0))
        # what is scattered and gathered again is the sum
        assert torch.equal(group.all_gather(group.reduce_scatter(x), dim=0), group.all_reduce(x))
        strided = input_of(9, group.rank, (6, 4 * size), torch.float32).t()
        want = group.reduce_scatter(strided.contiguous())
        assert torch.equal(group.reduce_scatter(strided), want)
        assert group.reduce_scatter(torch.empty(0, 8)).shape == (0, 8)
        negative = torch.full((size, 4), -0.0)
        assert not torch.signbit(group.reduce_scatter(negative)).any()


@pytest.mark.parametrize("settings", [SHARED, PROCESS_GROUP], ids=["shared", "process_group"])
@pytest.mark.parametrize("world_size", [3, 8])
def test_reduce_scatter(ranks: RankPool, world_size: int, settings: Settings) -> None:
    ranks(world_size).run(scatters, settings)


def broadcasts(settings: Settings) -> None:
    with GroupCoordinator(settings=settings) as group:
        for seed, dtype in enumerate(MOVED):
            for shape in [*SHAPES, (0, 4)]:
                for src in range(group.world_size):
                    x = any_bytes(seed * 16 + group.rank, shape, dtype)
                    assert group.broadcast(x, src) is x
                    assert bits(x) == bits(any_bytes(seed * 16 + src, shape, dtype)), f"{dtype} {shape} src {src}"
        x = torch.full((3,), group.rank)
        group.broadcast(x)  # src is 0
        assert (x == 0).all()


@pytest.mark.parametrize("settings", [SHARED, PROCESS_GROUP], ids=["shared", "process_group"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_broadcast(ranks: RankPool, world_size: int, settings: Settings) -> None:
    ranks(world_size).run(broadcasts, settings)


def nobody_passes_before_all_are_there(settings: Settings) -> None:
    with GroupCoordinator(settings=settings) as group:
        for late in range(group.world_size):
            dist.barrier()
            start = time.monotonic()
            if group.rank == late:
                time.sleep(0.15)
            group.barrier()
            assert time.monotonic() - start >= 0.14


@pytest.mark.parametrize("settings", [SHARED, PROCESS_GROUP], ids=["shared", "process_group"])
def test_barrier(ranks: RankPool, settings: Settings) -> None:
    ranks(3).run(nobody_passes_before_all_are_there, settings)


def bad_arguments(settings: Settings) -> None:
    """Refused with argument, expected and got, on one rank alone: the others do not notice, the next call works."""
    with GroupCoordinator(settings=settings) as group:
        size = group.world_size
        x = torch.ones(2 * size, 4)
        cases: list[tuple[Any, tuple[str, ...]]] = [
            (lambda: group.all_gather(x, dim=2), ("dim: expected between -2 and 1", "got 2")),
            (lambda: group.all_gather(x, dim=-3), ("dim: expected", "got -3")),
            (lambda: group.all_gather("x"), ("x: expected a torch.Tensor", "got str")),
            (lambda: group.all_gather(torch.tensor(1.0)), ("x: expected", "scalar")),
            (lambda: group.all_gather(x.to("meta")), ("x: expected a tensor on cpu", "meta")),
            (lambda: group.reduce_scatter(x, dim=5), ("dim: expected", "got 5")),
            (lambda: group.reduce_scatter(torch.ones(2 * size + 1, 4)), ("divisible by", f"got {2 * size + 1}")),
            (lambda: group.reduce_scatter(x.long()), ("x: expected dtype", "int64")),
            (lambda: group.reduce_scatter(x.to("meta")), ("x: expected a tensor on cpu", "meta")),
            (lambda: group.broadcast(x, src=size), (f"src: expected a rank between 0 and {size - 1}", f"got {size}")),
            (lambda: group.broadcast(x, src=-1), ("src: expected", "got -1")),
            (lambda: group.broadcast(x.t()), ("x: expected a contiguous tensor", "got strides")),
            (lambda: group.broadcast([1]), ("x: expected a torch.Tensor", "got list")),
        ]
        for call, parts in cases:
            if group.rank == 1:
                raises(ValueError, call, *parts)
            works(group)
        for call, parts in cases:  # and by all at once
            raises(ValueError, call, *parts)
        works(group)


@pytest.mark.parametrize("settings", [SHARED, PROCESS_GROUP], ids=["shared", "process_group"])
def test_bad_arguments(ranks: RankPool, settings: Settings) -> None:
    ranks(3).run(bad_arguments, settings)
