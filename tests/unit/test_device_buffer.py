"""Device buffers with threads as ranks and a pretended GPU library: who frees what, and when."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pretended_gpu import PretendedGpu, ranks

from fusedcomm import native
from fusedcomm.comm import device_buffer
from fusedcomm.comm.device_buffer import DeviceBuffer, sweep

SIZE = 1 << 20
WORLD = 3


def create(gpu: PretendedGpu) -> list[Any]:
    library = native.load()
    assert library is not None
    pids = [os.getpid()] * WORLD
    return ranks(
        lambda rank, exchange: DeviceBuffer.create(library, gpu, exchange, rank, rank, SIZE, pids),  # type: ignore[arg-type]
        WORLD,
    )


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    made = PretendedGpu()
    descriptors = len(os.listdir("/proc/self/fd"))
    yield made
    assert sweep() == 0
    assert made.mistakes == []
    assert (made.allocated, made.mapped) == ({}, [])
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_every_rank_maps_the_slabs_of_all(gpu: PretendedGpu) -> None:
    buffers = create(gpu)
    assert buffers[0].slabs == buffers[1].slabs == buffers[2].slabs
    assert sorted(buffers[0].slabs) == sorted(gpu.allocated)
    library = native.load()
    assert library is not None
    for buffer in buffers:
        assert all(library.segment_is_valid(page) for page in buffer.pages)
        # nobody opens a descriptor of its own process
        assert buffer.pidfds == [-1] * WORLD
    for buffer in buffers:
        buffer.close()
        buffer.close()


def test_a_slab_is_freed_when_the_last_peer_has_unmapped_it(gpu: PretendedGpu) -> None:
    first, second, third = create(gpu)
    first.close()
    assert len(gpu.allocated) == 3
    second.close()
    assert len(gpu.allocated) == 3
    assert sweep() == 2
    third.close()  # sweeps: nobody maps anything any more
    assert gpu.allocated == {}


def test_a_slab_is_freed_beside_one_that_has_to_wait(gpu: PretendedGpu) -> None:
    waiting, *others = create(gpu)
    waiting.close()
    for buffer in create(gpu):
        buffer.close()  # the last one frees all three, and must not look at its pages after that
    assert len(gpu.allocated) == 3
    assert sweep() == 1
    for buffer in others:
        buffer.close()


def test_close_waits_a_moment_for_peers_that_close_too(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_buffer, "_MOMENT_S", 20.0)
    closing = [threading.Timer(0.05 * rank, buffer.close) for rank, buffer in enumerate(create(gpu))]
    for timer in closing:
        timer.start()
    for timer in closing:
        timer.join(10)
        assert not timer.is_alive(), "who closes first goes on when the last one has"
    assert gpu.allocated == {}


def test_a_new_group_frees_what_the_last_one_left(gpu: PretendedGpu) -> None:
    for _ in range(50):
        buffers = create(gpu)
        # each rank closes at its own time, and the next group is made before anybody swept again
        ranks(lambda rank, exchange, made=buffers: made[rank].close(), WORLD)
        assert len(gpu.allocated) <= WORLD
    assert sweep() == 0


def ended_process() -> int:
    """The descriptor of a process that is gone."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    return pidfd


def test_a_slab_of_dead_peers_is_freed(gpu: PretendedGpu) -> None:
    first, second, third = create(gpu)
    second.close()
    first.close()
    assert len(gpu.allocated) == 3
    # rank 2 dies, and what it had mapped goes with it
    gpu.mapped[:] = [entry for entry in gpu.mapped if entry[0] != 2]
    first.pidfds[2], second.pidfds[2] = ended_process(), ended_process()
    assert sweep() == 0
    assert list(gpu.allocated) == [third.slabs[2]]
    third._bury()


@pytest.mark.parametrize("bad_rank", [0, 2])
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("allocate", f"cannot allocate {SIZE} bytes on GPU {{rank}}: out of memory"),
        ("open", "cannot map the memory of rank {peer}: invalid device context"),
    ],
)
def test_a_failure_on_one_rank_is_that_of_all(gpu: PretendedGpu, what: str, text: str, bad_rank: int) -> None:
    gpu.fails = lambda step, device: step == what and device == bad_rank
    errors = create(gpu)
    expected = f"rank {bad_rank}: " + text.format(rank=bad_rank, peer=1 if bad_rank == 0 else 0)
    assert [str(error) for error in errors] == [expected] * WORLD
    assert gpu.allocated == {}
    gpu.fails = lambda step, device: False
    for buffer in create(gpu):
        buffer.close()


def test_a_child_process_frees_nothing_of_its_parents(gpu: PretendedGpu) -> None:
    first, second, third = create(gpu)
    first.close()
    child = os.fork()
    if not child:
        left = sweep()
        os._exit(0 if left == 0 and len(gpu.allocated) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(device_buffer._graveyard) == 1
    second.close()
    third.close()
