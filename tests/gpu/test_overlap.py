"""Programmatic dependent launch: between kernels of this library in a graph, and nowhere else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusedcomm import ops

pytestmark = pytest.mark.needs_cuda

_PROGRAMMATIC = 1  # cudaGraphDependencyType


class EdgeData(ctypes.Structure):
    """cudaGraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


def runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libcudart.so" in line:
            return ctypes.CDLL(line.split()[-1])
    pytest.skip("torch has its CUDA runtime inside another library")


def captured(*calls: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def kinds_of_edges(graph: torch.cuda.CUDAGraph) -> list[bool]:
    """Whether each edge is programmatic, in no order."""
    cuda = runtime()
    query = getattr(cuda, "cudaGraphGetEdges_v2", None) or cuda.cudaGraphGetEdges
    count = ctypes.c_size_t(0)
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert query(raw, None, None, None, ctypes.byref(count)) == 0
    nodes = ctypes.c_void_p * count.value
    data = (EdgeData * count.value)()
    assert query(raw, nodes(), nodes(), data, ctypes.byref(count)) == 0
    return [edge.type == _PROGRAMMATIC for edge in data]


@pytest.fixture
def x() -> torch.Tensor:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no programmatic dependent launch before Hopper")
    return torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)


def test_own_kernels_overlap(x: torch.Tensor) -> None:
    weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    graph = captured(*[lambda: ops.rms_norm(x, weight, 1e-6)] * 3)
    assert kinds_of_edges(graph) == [True, True]


def test_nothing_overlaps_another_kernel(x: torch.Tensor) -> None:
    """A kernel without the trigger ahead: the edge is an ordinary one, which is faster there."""
    weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    norm, other = (lambda: ops.rms_norm(x, weight, 1e-6)), (lambda: x.mul_(1))
    assert kinds_of_edges(captured(other, norm, other, norm)) == [False, False, False]
    assert sorted(kinds_of_edges(captured(other, norm, norm, other))) == [False, False, True]


def test_results_stay(x: torch.Tensor) -> None:
    weight = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    results: list[torch.Tensor] = []

    def chain() -> None:
        y = x
        for _ in range(20):
            y = ops.rms_norm(y, weight, 1e-6)
        results.append(y)

    graph = captured(chain)
    results[1].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(results[0], results[1])
