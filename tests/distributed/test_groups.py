"""Groups: how they begin and end, several at once, and every launcher."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool, run_ranks
from ranked import check_all_reduce, check_norm, check_quant, input_of, raises, works

import fusedcomm
from fusedcomm import FusedCommError, GroupClosedError, GroupCoordinator, Settings

# ---- several groups ----


def all_checks(group: GroupCoordinator, seed: int) -> None:
    check_all_reduce(group, seed, (5, 1001), torch.bfloat16)
    check_norm(group, seed + 1, (4, 384), torch.float16)
    check_quant(group, seed + 2, (3, 256), torch.float32)
    everything = group.all_gather(torch.tensor([float(group.global_rank)]))
    assert everything.tolist() == [float(r) for r in group.ranks]


def halves_and_pairs() -> None:
    """TP 4 × 2: consecutive groups of four, interleaved pairs across them, and the world, all alive at once."""
    me, world = dist.get_rank(), dist.get_world_size()
    half = [r for r in range(world) if r // 4 == me // 4]
    pair = [me % 4, me % 4 + 4]
    with GroupCoordinator(half) as tp, GroupCoordinator(pair) as across, GroupCoordinator() as everyone:
        assert (tp.world_size, across.world_size, everyone.world_size) == (4, 2, 8)
        assert (tp.rank, across.rank, everyone.rank) == (me % 4, me // 4, me)
        assert (tp.ranks, across.ranks) == (tuple(half), tuple(pair))
        assert tp.is_first_rank == (me % 4 == 0)
        assert tp.is_last_rank == (me % 4 == 3)
        for seed in range(10):
            all_checks(tp, 10 * seed)
            all_checks(across, 10 * seed + 500)
            if seed % 3 == 0:
                all_checks(everyone, 10 * seed + 900)
            all_checks(tp, 10 * seed + 5)
        # one half may be far ahead of the other
        for seed in range(30 * (me // 4)):
            check_all_reduce(tp, seed, (3, 64), torch.float32)
        everyone.barrier()
        tp.close()
        all_checks(across, 7)
        all_checks(everyone, 8)


def test_halves_and_pairs_at_once(ranks: RankPool) -> None:
    ranks(8).run(halves_and_pairs)


def only_its_members() -> None:
    """Ranks 1 and 3 make a group; 0 and 2 never hear of it."""
    me = dist.get_rank()
    if me in (1, 3, 5):
        with GroupCoordinator([5, 3, 1]) as group:  # the order of the ranks is that of the world
            assert group.ranks == (1, 3, 5)
            assert group.rank == (1, 3, 5).index(me)
            assert group.global_rank == me
            all_checks(group, 1)
    if me == 2:
        with GroupCoordinator([2]) as alone:
            assert alone.world_size == 1
            assert alone.control_group is None
            works(alone)


def test_a_subgroup_needs_only_its_members(ranks: RankPool) -> None:
    ranks(6).run(only_its_members)


def the_same_ranks_again() -> None:
    for seed in range(5):
        with GroupCoordinator(settings=Settings(buffer_mb=1)) as first, GroupCoordinator() as second:
            all_checks(second, seed)
            all_checks(first, seed)
    # histories that differ by rank: some have made more groups than others
    me = dist.get_rank()
    for _ in range(3 if me < 2 else 0):
        GroupCoordinator([0, 1]).close()
    with GroupCoordinator() as group:
        works(group)


def test_groups_of_the_same_ranks(ranks: RankPool) -> None:
    ranks(3).run(the_same_ranks_again)


def world_group_is_untouched() -> None:
    before = dist.group.WORLD
    names = set(dist.distributed_c10d._world.pg_names.values())
    with GroupCoordinator() as group:
        works(group)
        assert group.control_group is not None
        assert group.control_group is not before
        assert group.device_group is not before
        x = torch.ones(3)
        dist.all_reduce(x)  # the world group goes on working beside it
        assert (x == dist.get_world_size()).all()
        works(group)
    assert dist.is_initialized()
    assert dist.group.WORLD is before
    assert set(dist.distributed_c10d._world.pg_names.values()) == names
    x = torch.ones(3)
    dist.all_reduce(x)
    assert (x == dist.get_world_size()).all()


def test_the_world_group_is_untouched(ranks: RankPool) -> None:
    ranks(2).run(world_group_is_untouched)


# ---- init_distributed ----


def already_initialised() -> None:
    group = fusedcomm.init_distributed()
    works(group)
    raises(FusedCommError, fusedcomm.init_distributed, "already")
    assert fusedcomm.get_tp_group() is group
    works(group)
    fusedcomm.destroy_distributed()
    fusedcomm.destroy_distributed()
    assert group.closed
    raises(GroupClosedError, lambda: group.all_reduce(torch.ones(3)), "closed")
    raises(FusedCommError, fusedcomm.get_tp_group, "init_distributed()")
    assert dist.is_initialized(), "it was not ours to end"
    works(fusedcomm.init_distributed())
    fusedcomm.get_tp_group().close()
    works(fusedcomm.init_distributed())  # a closed group may be followed by another


def test_an_initialised_torch_distributed_is_used(ranks: RankPool) -> None:
    ranks(3).run(already_initialised)


def tensor_parallel_pairs() -> None:
    me = dist.get_rank()
    group = fusedcomm.init_distributed(tp_size=2, timeout=30)
    assert group.ranks == (me // 2 * 2, me // 2 * 2 + 1)
    assert group.settings.timeout_s == 30
    all_checks(group, 3)
    fusedcomm.destroy_distributed()
    raises(ValueError, lambda: fusedcomm.init_distributed(tp_size=4), "tp_size: expected a divisor", "(6)", "got 4")
    raises(ValueError, lambda: fusedcomm.init_distributed(tp_size=0), "tp_size: expected a divisor", "got 0")
    raises(ValueError, lambda: fusedcomm.init_distributed(tp_size=-2), "tp_size: expected", "got -2")
    raises(ValueError, lambda: fusedcomm.init_distributed(device="cuda"), "device: expected cpu", "cuda")
    works(fusedcomm.init_distributed())


def test_tp_size_and_bad_arguments(ranks: RankPool) -> None:
    ranks(6).run(tensor_parallel_pairs)


def own_distributed(launcher: str) -> tuple[int, int, int]:
    assert not dist.is_initialized()
    with fusedcomm.init_distributed() as group:
        assert dist.is_initialized() == (group.world_size > 1)
        all_checks(group, 1)
        facts = (group.rank, group.world_size, group.local_rank)
    fusedcomm.destroy_distributed()
    assert not dist.is_initialized(), "it was ours to end"
    for late in range(4):  # again, another rank late each time: nobody may meet it as it was the time before
        time.sleep(0.5 * (late % facts[1] == facts[0]))
        works(fusedcomm.init_distributed())
        fusedcomm.destroy_distributed()
    return facts


@pytest.mark.parametrize(("launcher", "world_size"), [("torchrun", 2), ("spawn", 3), ("slurm", 3)])
def test_launchers(launcher: str, world_size: int) -> None:
    facts = run_ranks(world_size, own_distributed, launcher, launcher=launcher)
    assert facts == [(r, world_size, r) for r in range(world_size)]


def test_alone() -> None:
    assert run_ranks(1, own_distributed, "bare", launcher="bare") == [(0, 1, 0)]


def under_mpi() -> tuple[int, int, int]:
    assert "RANK" not in os.environ
    assert "MASTER_ADDR" not in os.environ
    group = fusedcomm.init_distributed()
    from mpi4py import MPI

    assert group.rank == MPI.COMM_WORLD.Get_rank()
    for seed in range(3):
        all_checks(group, 10 * seed)
    # MPI goes on working beside it
    assert MPI.COMM_WORLD.allreduce(1) == group.world_size
    fusedcomm.destroy_distributed()
    assert not dist.is_initialized()
    works(fusedcomm.init_distributed(tp_size=4))
    facts = (group.rank, group.world_size, group.local_rank)
    fusedcomm.destroy_distributed()
    return facts


def test_mpiexec(mpiexec: str) -> None:
    assert run_ranks(8, under_mpi, launcher="mpiexec", timeout=120) == [(r, 8, r) for r in range(8)]


# ---- one rank ----


def check_alone(group: GroupCoordinator) -> None:
    assert (group.rank, group.world_size, group.local_rank, group.global_rank) == (0, 1, 0, 0)
    assert group.ranks == (0,)
    assert group.is_first_rank
    assert group.is_last_rank
    assert group.device == torch.device("cpu")
    assert group.device_group is None
    assert group.control_group is None
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        for shape in ((5, 1280), (0, 128), (256,), (2, 3, 128)):
            for kind in ("ordinary", "specials", "zeros"):
                check_all_reduce(group, seed, shape, dtype, kind)
                check_norm(group, seed, shape, dtype, kind)
                check_quant(group, seed, shape, dtype, kind, emit_bf16=True)
    x = input_of(1, 0, (4, 6), torch.float32)
    assert torch.equal(group.all_gather(x), x)
    assert torch.equal(group.reduce_scatter(x), x)
    assert group.broadcast(x) is x
    group.barrier()
    with group.graph_capture():
        group.all_reduce(x)
    result = group.all_reduce(x)
    assert result.data_ptr() != x.data_ptr()
    group.close()
    group.close()
    for call in (lambda: group.all_reduce(x), group.barrier, lambda: group.all_gather(x), lambda: group.broadcast(x)):
        raises(GroupClosedError, call, "closed")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(disable=True),
        Settings(backend="torch"),
        Settings(debug=True),
        Settings(deterministic=True),
        Settings(disable_fused_ar_quant=True),
        Settings(disable_fused_ar_norm=True, disable_custom_ar=True),
    ],
    ids=lambda settings: ",".join(
        f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default
    ),
)
def test_a_group_of_one_needs_nothing(settings: Settings, recwarn: Any) -> None:
    group = GroupCoordinator(settings=settings)
    assert not dist.is_initialized()
    assert "memfd:fusedcomm" not in Path("/proc/self/maps").read_text()
    check_alone(group)
    # one rank has nothing to fall back from
    assert not [str(w.message) for w in recwarn.list if "process group" in str(w.message)]


def test_with_closes_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), GroupCoordinator() as group:
        raise ZeroDivisionError
    assert group.closed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": []}, r"ranks: expected"),
        ({"ranks": [1]}, r"ranks: expected .*got \(1,\)"),
        ({"ranks": [0, 0]}, r"ranks: expected different ranks .*got \(0, 0\)"),
        ({"ranks": [-1, 0]}, r"ranks: expected .*got \(-1, 0\)"),
        ({"device": "cuda"}, r"device: expected cpu .*got cuda"),
        ({"device": "meta"}, r"device: expected cpu .*got meta"),
        ({"timeout": 0}, r"timeout: expected .*got 0"),
        ({"timeout": -1.0}, r"timeout: expected .*got -1"),
        ({"timeout": float("nan")}, r"timeout: expected .*got nan"),
        ({"timeout": float("inf")}, r"timeout: expected .*got inf"),
        ({"timeout": 1e12}, r"timeout: expected .*got 1"),
    ],
)
def test_bad_arguments_of_a_group(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupCoordinator(**arguments)


def test_repr_says_who_and_in_what_state() -> None:
    group = GroupCoordinator()
    assert repr(group) == "GroupCoordinator(rank=0, world_size=1, device=cpu, open)"
    group.close()
    assert "closed" in repr(group)
