"""The GPU's custom all-reduce over a pretended library: set-up, failures, trace, and what is freed."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from pretended_gpu import PretendedGpu, ranks

from fusedcomm import PeerDiedError, native
from fusedcomm.comm.custom_gpu import GpuCustomAllReduce, TraceRecord
from fusedcomm.comm.streams import StreamOrder
from fusedcomm.comm.symmetric_buffer import SetupError
from fusedcomm.comm.tuning import GpuTuning
from fusedcomm.native import GpuDeviceFacts, GpuTraceRecord
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout


class PretendedLibrary(PretendedGpu):
    """With communicators: handle 2r + 1 is that of rank r."""

    def __init__(self) -> None:
        super().__init__()
        self.configs: dict[int, dict[str, int]] = {}
        self.admitted: dict[int, tuple[int, bool]] = {}
        self.failure = 0

    def operator(self, name: str) -> Any:
        return getattr(torch.ops.fusedcomm, name).default

    def slab_bytes(self, world_size: int, buffer_bytes: int) -> int:
        return world_size * buffer_bytes

    def comm_create(self, config: Any, slabs: Any, pages: Any, pidfds: Any, error: Any) -> int:
        c = config._obj
        if self.fails("create", c.device):
            error.value = b"no thread"
            return 0
        self.configs[2 * c.rank + 1] = {name: getattr(c, name) for name, _ in c._fields_}
        return 2 * int(c.rank) + 1

    def comm_admit(self, handle: int, stream: int, once: bool) -> None:
        self.admitted[handle] = stream, once

    def comm_in_call(self, handle: int) -> int:
        return 0

    def comm_close(self, handle: int) -> None:
        del self.configs[handle]

    def comm_destroy(self, handle: int) -> None:
        assert handle not in self.configs

    def comm_failure(self, handle: int) -> int:
        return self.failure

    def comm_failure_text(self, handle: int, text: Any, size: int) -> None:
        text.value = b"all_reduce: rank 0: rank 1 is gone"

    def comm_trace(self, handle: int, records: Any, most: int) -> int:
        for i, values in enumerate([(7, 1, 1, 15, 4, 4096), (8, 3, 2, 6, 512, 7168)]):
            records[i] = GpuTraceRecord(*values)
        return 2


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> PretendedLibrary:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return PretendedLibrary()


def create(library: PretendedLibrary, world: int = 2) -> list[Any]:
    declared = native.load()
    assert declared is not None
    return ranks(
        lambda rank, exchange: GpuCustomAllReduce(
            declared,
            library,  # type: ignore[arg-type]
            exchange,
            rank,
            world,
            device=torch.device("cuda", rank),
            buffer_bytes=1 << 20,
            tuning=GpuTuning(3 << 10),
            timeout_s=2.5,
            pids=[os.getpid()] * world,
        ),
        world,
    )


def test_every_rank_gets_its_communicator(library: PretendedLibrary) -> None:
    made = create(library)
    assert library.configs[3] == {
        "rank": 1,
        "world_size": 2,
        "device": 1,
        "slab_bytes": 2 << 20,
        "buffer_bytes": 1 << 20,
        "one_shot_max_bytes": 3 << 10,
        "timeout_ns": 2_500_000_000,
    }
    for custom in made:
        custom.close()
        custom.close()
    assert (library.configs, library.allocated, library.mapped) == ({}, {}, [])


def test_a_communicator_that_one_rank_cannot_make_is_a_failure_of_all(library: PretendedLibrary) -> None:
    library.fails = lambda step, device: step == "create" and device == 1
    errors = create(library)
    assert all(isinstance(error, SetupError) for error in errors)
    assert {str(error) for error in errors} == {"rank 1: cannot make the communicator: no thread"}
    assert (library.configs, library.allocated, library.mapped) == ({}, {}, [])


def test_check_raises_what_the_device_found(library: PretendedLibrary) -> None:
    made = create(library)
    made[0].check()
    library.failure = 2
    with pytest.raises(PeerDiedError, match="rank 1 is gone"):
        made[0].check()
    for custom in made:
        custom.close()


def test_trace_names_what_it_can(library: PretendedLibrary) -> None:
    made = create(library)
    assert made[0].trace() == [
        TraceRecord(7, "all_reduce", "one_shot", torch.bfloat16, 4, 4096),
        TraceRecord(8, "allreduce_rmsnorm_quant", "two_shot", torch.float32, 512, 7168),
    ]
    for custom in made:
        custom.close()


def test_a_tensor_on_the_cpu_is_refused(library: PretendedLibrary) -> None:
    """Its operators are those of the CPU, which know the handle of a GPU's communicator."""
    made = create(library)
    x = torch.zeros(2, 8)
    for call in (
        lambda: made[0].all_reduce(x),
        lambda: made[0].all_reduce(x, torch.empty_like(x)),
        lambda: made[0].allreduce_rmsnorm(x, None, x[0], 1e-6, 0.0),
    ):
        with pytest.raises(RuntimeError, match="x: expected a tensor on the device of the group"):
            call()
    for custom in made:
        custom.close()


def test_streams_are_put_in_order_where_a_call_comes_back_undone(
    library: PretendedLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current stream is 5, that of the set-up was 0: the library launches nothing until it is let."""
    current = [0]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: current[0], raising=False)
    made = create(library)
    assert library.admitted == {1: (0, False), 3: (0, False)}
    waits: list[tuple[int, int]] = []
    monkeypatch.setattr(StreamOrder, "_is_capturing", lambda order, stream: False)
    monkeypatch.setattr(StreamOrder, "_wait", lambda order, stream, last: waits.append((stream, last)))
    x = torch.zeros(2, 128)
    pair, out = AddRMSNorm(x, x), AddRMSNormQuant(x, x, x, None, ScaleLayout.ROW_MAJOR)
    quant = (x, None, x[0], 1e-6, 0.0, 128, False, ScaleLayout.ROW_MAJOR)
    calls: list[tuple[Any, int]] = [
        (lambda: made[0].all_reduce(x), 1),
        (lambda: made[0].all_reduce(x, x), 1),
        (lambda: made[0].allreduce_rmsnorm(x, None, x[0], 1e-6, 0.0), 2),
        (lambda: made[0].allreduce_rmsnorm(x, None, x[0], 1e-6, 0.0, pair), 2),
        (lambda: made[0].allreduce_rmsnorm_quant(*quant), 4),
        (lambda: made[0].allreduce_rmsnorm_quant(*quant, out), 4),
    ]
    for stream, (call, results) in enumerate(calls, start=5):
        current[0] = stream
        launched: list[str] = []

        def operator(name: str, results: int = results, now: int = stream, launched: list[str] = launched) -> Any:
            def run(*_: object) -> Any:
                done = library.admitted[1] == (now, False)
                launched.append(f"{name} {done}")
                assert len(launched) < 5
                return done if name.endswith("_out") else (*[x] * results, done)

            return run

        for name in [name for name in vars(made[0]) if name.startswith("_comm_")]:
            monkeypatch.setattr(made[0], name, operator(name))
        call()
        assert [text.partition(" ")[2] for text in launched] == ["False", "True"]
        assert launched[1].endswith("_out True")
    assert waits == [(5, 0), *((n, n - 1) for n in range(6, 11))]
    for custom in made:
        custom.close()


def test_the_structures_are_those_of_the_library() -> None:
    assert ctypes.sizeof(GpuDeviceFacts) == 16 + 4 * 4 + 32 + 64
    assert ctypes.sizeof(GpuTraceRecord) == 24
    assert ctypes.sizeof(native.GpuConfig) == 56
