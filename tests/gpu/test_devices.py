"""Which GPUs a process sees and by which names; that groups leave nothing behind."""

from __future__ import annotations

import gc
import os
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from ranked import new_group, works
from trials import OPS, Case, Findings, Prepared, varied

from fusedcomm import GroupCoordinator, Settings
from fusedcomm.comm.custom_gpu import GpuCustomAllReduce
from fusedcomm.comm.tuning import choose_gpu_tuning
from fusedcomm.native import load, load_gpu

ENV = {"FUSEDCOMM_TIMEOUT_S": "12"}


# ---- CUDA_VISIBLE_DEVICES ----


def with_visible_devices(index: int, stage: str | None) -> tuple[str, str]:
    """Every operation on the GPU of this index among those that this process sees; the stage, and its reasons."""
    where = torch.device("cuda", index)
    torch.cuda.set_device(where)
    dist.init_process_group("gloo")
    findings = Findings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = GroupCoordinator(device=where, settings=Settings(deterministic=True, timeout_s=12))
    with group:
        assert group.device == where
        plan = group.explain("all_reduce", (4, 128), torch.float32)
        for seed, op in enumerate(OPS):
            for rows in (1, 200):
                prepared = Prepared(group, varied(seed, op, (rows, 2048), torch.bfloat16))
                findings.check(prepared.case, prepared.complaint(prepared.call(group)))
        group.check()
    dist.destroy_process_group()
    findings.settle(f"with CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
    assert stage is None or plan.stage == stage, str(plan)
    return str(plan.stage), str(plan)


def _uuids(count: int) -> list[str]:
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]


def _visible(devices: list[str], own: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES with the rank's own device first."""
    return {"CUDA_VISIBLE_DEVICES": ",".join([devices[own], *(d for d in devices if d != devices[own])])}


@pytest.mark.needs_cuda
@pytest.mark.parametrize("names", ["indices", "UUIDs"])
def test_devices_in_another_order_on_each_rank(gpus: int, names: str) -> None:
    """Index 0 is another GPU on each rank: peers are told apart by what they are, not by their numbers."""
    count = min(gpus, 4)
    devices = [str(index) for index in range(count)] if names == "indices" else _uuids(count)
    size = max(count, 2)
    environ = [_visible(devices, rank % count) for rank in range(size)]
    run_ranks(size, with_visible_devices, 0, "custom", launcher="spawn", env=ENV, rank_env=environ)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("names", ["indices", "UUIDs"])
def test_one_visible_device_a_rank(gpus: int, names: str) -> None:
    """Peers' GPUs are not visible here: right results by whatever stage the ranks agree on, with a reason if slower."""
    count = min(gpus, 4)
    devices = [str(index) for index in range(count)] if names == "indices" else _uuids(count)
    size = max(count, 2)
    environ = [{"CUDA_VISIBLE_DEVICES": devices[rank % count]} for rank in range(size)]
    found = run_ranks(size, with_visible_devices, 0, None, launcher="spawn", env=ENV, rank_env=environ)
    assert len(set(found)) == 1, found
    stage, text = found[0]
    assert stage in ("custom", "process_group")
    if stage != "custom":
        assert "not taken" in text
        warnings.warn(f"one visible device a rank: {text}", stacklevel=1)


# ---- nothing is left ----


def holdings() -> dict[str, Any]:
    """Descriptors and threads of this process."""
    gc.collect()
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def free_memory() -> int:
    """Bytes that the rank's GPU has left, for all processes on it; everybody has done what it does."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    dist.barrier()
    return int(torch.cuda.mem_get_info()[0])


def create_and_close(cycles: int) -> float:
    """Groups that are made, used now and then, and closed; the seconds that a cycle took."""

    def some(count: int) -> None:
        for cycle in range(count):
            with new_group(settings=Settings(buffer_mb=1 + cycle % 3)) as group:
                if cycle % 10 == 0:
                    works(group)
        dist.barrier()
        with new_group() as group:  # what peers still had mapped is swept here
            works(group)
        dist.barrier()
        new_group().close()
        dist.barrier()

    some(12)  # what is made once: contexts, threads of torch, the library
    free, before = free_memory(), holdings()
    start = time.monotonic()
    some(cycles)
    elapsed = (time.monotonic() - start) / cycles
    left, after = free_memory(), holdings()
    # A leaked slab is a megabyte at least; the driver's own bookkeeping moves by less than this in all.
    assert free - left < 32 << 20, f"{(free - left) / (1 << 20):.0f} MiB of the GPU are gone after {cycles} groups"
    assert after["fds"] <= before["fds"] + 2, f"{before} before, {after} after {cycles} groups"
    assert after["threads"] <= before["threads"] + 2, f"{before} before, {after} after {cycles} groups"
    return elapsed


@pytest.mark.worlds("pair")
def test_groups_leave_nothing(world: Any) -> None:
    """Whole groups; what their NCCL communicators take makes more of them a long test."""
    times = world.run(create_and_close, 60, timeout=120)
    print(f"a group is made and closed in {max(times) * 1000:.1f} ms")


def create_and_close_buffers(cycles: int) -> None:
    """What a group has on its GPU, without its process groups."""
    native, gpu = load(), load_gpu()
    assert native is not None
    assert gpu is not None
    with new_group() as outer:
        pids = [int.from_bytes(data, "little") for data in outer._exchange(os.getpid().to_bytes(8, "little"))]

        def some(count: int) -> None:
            for cycle in range(count):
                custom = GpuCustomAllReduce(
                    native,
                    gpu,
                    outer._exchange,
                    outer.rank,
                    outer.world_size,
                    device=outer.device,
                    buffer_bytes=(1 + cycle % 3) << 20,
                    tuning=choose_gpu_tuning(outer.world_size),
                    timeout_s=10,
                    pids=pids,
                )
                if cycle % 50 == 0:
                    total = custom.all_reduce(torch.full((5, 64), float(outer.rank + 1), device=outer.device))
                    assert (total == outer.world_size * (outer.world_size + 1) // 2).all()
                custom.close()

        some(12)
        free, before = free_memory(), holdings()
        some(cycles)
        left, after = free_memory(), holdings()
    assert free - left < 32 << 20, f"{(free - left) / (1 << 20):.0f} MiB of the GPU are gone after {cycles} buffers"
    assert after["fds"] <= before["fds"] + 8, f"{before} before, {after} after {cycles} buffers"  # a slab may wait
    assert after["threads"] <= before["threads"] + 2, f"{before} before, {after} after {cycles} buffers"


@pytest.mark.needs_cuda
@pytest.mark.worlds("pair")
def test_five_hundred_buffers_leave_nothing(world: Any) -> None:
    world.run(create_and_close_buffers, 500, timeout=120)


def dropped() -> None:
    """Groups that nobody closes are freed with their last reference."""
    for _ in range(3):
        works(new_group())
        gc.collect()
    free = free_memory()
    for _ in range(10):
        group = new_group()
        works(group)
        dist.barrier()
        del group
        gc.collect()
        dist.barrier()
    new_group().close()
    dist.barrier()
    new_group().close()
    left = free_memory()
    assert free - left < 160 << 20, f"{(free - left) / (1 << 20):.0f} MiB of the GPU are gone"  # one slab may wait


@pytest.mark.worlds("pair")
def test_groups_that_are_dropped(world: Any) -> None:
    world.run(dropped)


def memory_of_a_group() -> tuple[int, int]:
    """Bytes of GPU memory that a group of default size takes, and one of 1 MiB."""
    works_first = new_group()
    works(works_first)
    works_first.close()
    sizes = []
    for settings in (None, Settings(buffer_mb=1)):
        dist.barrier()
        free = free_memory()
        group = new_group(settings=settings)
        dist.barrier()
        sizes.append(free - free_memory())
        group.close()
        dist.barrier()
        new_group().close()
        dist.barrier()
    return sizes[0], sizes[1]


@pytest.mark.needs_cuda
@pytest.mark.worlds("main")
def test_memory_of_a_group(world: Any) -> None:
    """20 MiB for one-shot and 140 for two-shot, and little beside them; FUSEDCOMM_BUFFER_MB is honoured."""
    ranks_a_gpu = -(-world.size // world.world.gpus)
    for default, small in world.run(memory_of_a_group):
        assert default <= ranks_a_gpu * (168 << 20), f"{default / (1 << 20):.0f} MiB"
        assert small <= ranks_a_gpu * (16 << 20), f"{small / (1 << 20):.0f} MiB"


def at_any_index(size: int) -> None:
    """A subgroup, and a group of one, on this rank's GPU."""
    me = dist.get_rank()
    if me < size - 1 and size > 2:
        with new_group(range(size - 1)) as group:
            prepared = Prepared(group, Case(OPS[2], (5, 1024), torch.bfloat16))
            assert prepared.complaint(prepared.call(group)) == ""
    with new_group([me]) as alone:
        assert alone.world_size == 1
        for op in OPS:
            prepared = Prepared(alone, Case(op, (5, 1024), torch.bfloat16))
            assert prepared.complaint(prepared.call(alone)) == ""


@pytest.mark.worlds("main")
def test_subgroups_and_groups_of_one(world: Any) -> None:
    world.run(at_any_index, world.size)
