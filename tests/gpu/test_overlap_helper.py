"""Overlap on a GPU: the results of the serial order, whatever memory is used again, in graphs too; and side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusedcomm import Settings, ops
from fusedcomm.ops.overlap import Overlap

pytestmark = pytest.mark.needs_cuda

ON = Settings(dual_stream=True)
ROWS, HIDDEN = 8, 1024
SLEEP = 2_000_000  # cycles: about a millisecond, of one thread block


class Layer:
    """An indexer chain beside a query path, both from the normed hidden states; each rescales, so values stay put."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        size = (HIDDEN, HIDDEN)
        self.weights = [torch.randn(size, device="cuda", generator=generator).bfloat16() for _ in range(3)]
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)

    def index(self, hidden: torch.Tensor, sleep: int = 0) -> torch.Tensor:
        if sleep:
            torch.cuda._sleep(sleep)
        for _ in range(3):
            hidden = ops.rms_norm(hidden @ self.weights[0], self.norm, 1e-6)
        return hidden

    def query(self, hidden: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(ops.rms_norm(hidden @ self.weights[1], self.norm, 1e-6) @ self.weights[2], self.norm, 1e-6)

    def __call__(self, overlap: Overlap, hidden: torch.Tensor, sleep: int = 0) -> torch.Tensor:
        normed = ops.rms_norm(hidden, self.norm, 1e-6)
        with overlap.fork(self.index, normed, sleep) as forked:
            q = self.query(normed)
            del normed
            spoilt = [torch.full_like(q, torch.nan) for _ in range(3)]  # in memory that is free by then
            index = forked.join()
        del spoilt
        return hidden + ops.rms_norm(q * index, self.norm, 1e-6)


def stack(layers: list[Layer], overlap: Overlap, hidden: torch.Tensor, sleep: int = 0) -> torch.Tensor:
    for layer in layers:
        hidden = layer(overlap, hidden, sleep)
    return hidden


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return [Layer(seed) for seed in range(6)]


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()


def serial(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    result = stack(layers, Overlap("cuda", Settings()), x)
    torch.cuda.synchronize()
    return result


@pytest.mark.smoke
@pytest.mark.parametrize("sleep", [0, SLEEP // 10])
def test_the_results_of_the_serial_order(layers: list[Layer], sleep: int) -> None:
    overlap = Overlap("cuda", ON)
    assert overlap.is_on
    for seed in range(5):
        x = inputs(seed)
        got = stack(layers, overlap, x, sleep)
        assert torch.equal(got, serial(layers, x))
        assert got.isfinite().all()


@pytest.mark.smoke
@pytest.mark.parametrize("sleep", [0, SLEEP // 10])
def test_graphs_among_eager_calls(layers: list[Layer], sleep: int) -> None:
    overlap, x = Overlap("cuda", ON), inputs(0)
    stack(layers, overlap, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stack(layers, overlap, x, sleep)
    for seed in range(1, 6):
        fresh = inputs(seed)
        x.copy_(fresh)
        out.fill_(torch.nan)
        graph.replay()
        eager = stack(layers, overlap, fresh, sleep)
        want = serial(layers, fresh)
        assert torch.equal(out, want)
        assert torch.equal(eager, want)


def test_arguments_keep_their_memory_until_the_join() -> None:
    overlap = Overlap("cuda", ON)
    want = torch.arange(1 << 20, device="cuda", dtype=torch.float32)

    def read(x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(SLEEP)
        return x + 1

    freed = want.clone()
    address = freed.data_ptr()
    del freed
    x = want.clone()
    assert x.data_ptr() == address  # what is freed is given to the next: else nothing is tested
    with overlap.fork(read, x) as forked:
        del x
        reused = torch.full_like(want, torch.nan)
        got = forked.join()
    assert reused.data_ptr() != address
    assert torch.equal(got, want + 1)


@pytest.mark.parametrize("streams", [1, 2])
def test_results_keep_their_memory_while_they_are_read(streams: int) -> None:
    """The memory of a result that is dropped goes to the next fork, which has to come after what reads it."""
    overlap = Overlap("cuda", ON)
    mains = [torch.cuda.Stream() for _ in range(streams)]
    torch.cuda.synchronize()
    with torch.cuda.stream(mains[0]):
        result = overlap.fork(torch.full, (1 << 20,), 7.0, device="cuda").join()
        address = result.data_ptr()
        torch.cuda._sleep(SLEEP)
        read = result + 1
        del result
    with torch.cuda.stream(mains[-1]):
        reused = overlap.fork(torch.full, (1 << 20,), torch.nan, device="cuda").join()
    torch.cuda.synchronize()
    assert reused.data_ptr() == address  # else nothing is tested
    assert (read == 8).all()


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of a few."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)


@pytest.mark.parametrize("in_graph", [False, True])
def test_both_run_at_the_same_time(in_graph: bool) -> None:
    """Two kernels that do nothing for a while, on a thread block each: one while together, two one after the other."""

    def timed(settings: Settings) -> float:
        overlap = Overlap("cuda", settings)

        def both() -> None:
            with overlap.fork(torch.cuda._sleep, SLEEP):
                torch.cuda._sleep(SLEEP)

        both()
        torch.cuda.synchronize()
        if not in_graph:
            return milliseconds(both)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            both()
        return milliseconds(graph.replay)

    torch.cuda._sleep(20 * SLEEP)  # wakes it up
    alone = milliseconds(lambda: torch.cuda._sleep(SLEEP))
    # a launch is some 10 us here or there, on a millisecond
    assert timed(ON) < 1.4 * alone
    assert timed(Settings()) > 1.7 * alone


def test_a_function_that_fails_in_a_capture() -> None:
    """Its own error comes out, and the next capture is as good as any."""
    overlap, x = Overlap("cuda", ON), torch.ones(1024, device="cuda")

    def fails(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        raise OSError("no")

    torch.cuda.synchronize()
    with pytest.raises(OSError, match="no"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        overlap.fork(fails, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), overlap.fork(torch.add, x, 1) as forked:
        out = x * 3 + forked.join()
    graph.replay()
    torch.cuda.synchronize()
    assert (out == 5).all()


def test_a_fork_outside_of_a_capture_is_not_joined_inside() -> None:
    overlap, x = Overlap("cuda", ON), torch.ones(1024, device="cuda")
    capturing = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(capturing):
        forked = overlap.fork(torch.add, x, 1)

    def captured() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=capturing):
            x.mul_(1)
            forked.join()

    with pytest.raises(RuntimeError, match="join: expected a fork inside of the capture"):
        captured()
    with torch.cuda.stream(capturing):
        assert (forked.join() == 2).all()


def test_more_streams_than_torch_has(layers: list[Layer]) -> None:
    """One of them is the side stream itself: there it runs in place."""
    overlap, x = Overlap("cuda", ON), inputs(1)
    want = serial(layers, x)
    for _ in range(40):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = stack(layers, overlap, x)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        assert torch.equal(got, want)
