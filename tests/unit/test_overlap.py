"""Overlap: what is ordered after what, with pretended streams; and that all is the same without them."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from fusedcomm import SettingError, Settings
from fusedcomm.ops.overlap import Fork, Overlap

ON = Settings(dual_stream=True)


class Stream:
    """A stream as CUDA has them: what its next operation comes after, and the capture that it is in."""

    def __init__(self, gpu: Gpu, device: torch.device) -> None:
        self.gpu = gpu
        self.device = device
        self.past: frozenset[str] = frozenset()
        self.capture: int | None = None

    def wait_event(self, event: Event) -> None:
        self.gpu.calls.append("wait")
        if event.capture != self.capture:
            if event.capture is None:
                raise RuntimeError("a capture waits for work outside of it")
            if event.capture not in self.gpu.captures or self.capture is not None:
                raise RuntimeError("waits for a capture that has ended, or another one")
            self.capture = event.capture  # it is captured as well from here on
        self.past |= event.past

    def wait_stream(self, stream: Stream) -> None:
        event = Event(self.gpu)
        event.record(stream)
        self.wait_event(event)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.past: frozenset[str] = frozenset()
        self.capture: int | None = None

    def record(self, stream: Stream) -> None:
        self.gpu.calls.append("record")
        self.past, self.capture = stream.past, stream.capture


class Gpu:
    """Operations by name, and which of them the device runs after which."""

    def __init__(self) -> None:
        self.main = Stream(self, torch.device("cuda", 0))
        self.current = self.main
        self.before: dict[str, frozenset[str]] = {}
        self.captures: set[int] = set()
        self.streams: list[Stream] = []
        self.events: list[Event] = []
        self.calls: list[str] = []
        self._numbers = itertools.count()

    def launch(self, name: str) -> str:
        assert name not in self.before
        self.before[name] = self.current.past
        self.current.past |= {name}
        return name

    def ordered(self, first: str, second: str) -> bool:
        return first in self.before[second]

    def parallel(self, a: str, b: str) -> bool:
        return not self.ordered(a, b) and not self.ordered(b, a)

    def new_stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self, device))
        return self.streams[-1]

    def new_event(self) -> Event:
        self.events.append(Event(self))
        return self.events[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Of the current stream. As CUDA does, refuses to end while a stream of the capture has not been joined."""
        stream = self.current
        stream.capture = number = next(self._numbers)
        self.captures.add(number)
        yield
        self.captures.remove(number)
        inside = [s for s in (*self.streams, self.main) if s.capture == number]
        for s in inside:
            s.capture = None
        if any(s.past - stream.past for s in inside):
            raise RuntimeError("capturing stream has unjoined work")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    pretended = Gpu()
    for name, replacement in {
        "Stream": pretended.new_stream,
        "Event": pretended.new_event,
        "stream": pretended.stream,
        "current_stream": lambda device: pretended.current,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: pretended.current.capture is not None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return pretended


@pytest.fixture(params=[True, False], ids=["on", "off"])
def overlap(request: pytest.FixtureRequest, gpu: Gpu) -> Overlap:
    """What is the same with a side stream and without one is tested with both."""
    made = Overlap("cuda:0", ON if request.param else Settings())
    assert made.is_on == request.param
    return made


def indexer(gpu: Gpu, number: int = 0) -> Callable[[str], str]:
    """A chain of two operations."""

    def index(hidden: str) -> str:
        gpu.launch(f"index keys {number}")
        return gpu.launch(f"indices of {hidden} {number}")

    return index


def layer(gpu: Gpu, overlap: Overlap, number: int = 0) -> str:
    """A layer of sparse attention as the documentation of Overlap has it."""
    hidden = gpu.launch(f"norm {number}")
    with overlap.fork(indexer(gpu, number), hidden) as forked:
        gpu.launch(f"query projection {number}")
        gpu.launch(f"rope {number}")
        indices = forked.join()
    assert indices == f"indices of {hidden} {number}"
    return gpu.launch(f"attention {number}")


# ---- order ----


def test_the_indexer_runs_beside_the_query_path(gpu: Gpu) -> None:
    layer(gpu, Overlap("cuda:0", ON))
    for name in ("index keys 0", "indices of norm 0 0"):
        assert gpu.ordered("norm 0", name)
        assert gpu.parallel(name, "query projection 0")
        assert gpu.parallel(name, "rope 0")
        assert gpu.ordered(name, "attention 0")
    assert gpu.ordered("index keys 0", "indices of norm 0 0")
    assert gpu.ordered("rope 0", "attention 0")


def test_layers_stay_in_order(gpu: Gpu) -> None:
    """With one stream and two events for all of them."""
    overlap = Overlap("cuda:0", ON)
    for number in range(3):
        layer(gpu, overlap, number)
    for number in range(2):
        assert gpu.ordered(f"attention {number}", f"index keys {number + 1}")
        assert gpu.ordered(f"rope {number}", f"index keys {number + 1}")
    assert len(gpu.streams) == 1
    assert len(gpu.events) == 2
    assert gpu.calls == ["record", "wait"] * 6


def test_off_there_are_no_streams(gpu: Gpu) -> None:
    layer(gpu, Overlap("cuda:0", Settings()))
    order = ["norm 0", "index keys 0", "indices of norm 0 0", "query projection 0", "rope 0", "attention 0"]
    assert list(gpu.before) == order
    for i, name in enumerate(order):
        assert gpu.before[name] == frozenset(order[:i])
    assert (gpu.streams, gpu.events, gpu.calls) == ([], [], [])


def test_leaving_the_block_joins(gpu: Gpu) -> None:
    with Overlap("cuda:0", ON).fork(gpu.launch, "write the cache"):
        gpu.launch("query projection")
    gpu.launch("attention")
    assert gpu.parallel("write the cache", "query projection")
    assert gpu.ordered("write the cache", "attention")


def test_a_join_waits_once(gpu: Gpu) -> None:
    forked = Overlap("cuda:0", ON).fork(gpu.launch, "a")
    before = gpu.calls.count("wait")
    with forked:
        assert [forked.join() for _ in range(3)] == ["a"] * 3
    assert gpu.calls.count("wait") == before + 1


def test_what_another_stream_does_with_results_comes_before_the_next_fork(gpu: Gpu) -> None:
    """The side stream may give their memory to it."""
    overlap = Overlap("cuda:0", ON)
    second, third = (Stream(gpu, torch.device("cuda", 0)) for _ in range(2))
    a = overlap.fork(gpu.launch, "a").join()
    gpu.launch(f"use of {a}")
    with gpu.stream(second):
        gpu.launch("elsewhere")
        overlap.fork(gpu.launch, "b").join()
        gpu.launch("use of b")
    gpu.launch(f"late use of {a}")
    with gpu.stream(third):
        overlap.fork(gpu.launch, "c").join()
    assert gpu.ordered("use of a", "b")
    assert gpu.ordered("elsewhere", "b")
    assert gpu.parallel("use of a", "elsewhere")
    assert gpu.ordered("use of b", "c")
    assert gpu.ordered("late use of a", "c")


def test_on_the_side_stream_itself_a_fork_runs_in_place(gpu: Gpu) -> None:
    """Torch hands out the streams of its pool again and again: one of somebody else's may be this one."""
    overlap = Overlap("cuda:0", ON)
    with gpu.stream(gpu.streams[0]):
        layer(gpu, overlap)
    order = list(gpu.before)
    assert all(gpu.before[name] == frozenset(order[:i]) for i, name in enumerate(order))
    assert gpu.calls == []


def test_every_owner_has_a_stream(gpu: Gpu) -> None:
    target, draft = Overlap("cuda:0", ON), Overlap("cuda", ON)
    with target.fork(gpu.launch, "a"), draft.fork(gpu.launch, "b"):
        pass
    assert gpu.parallel("a", "b")
    assert [s.device for s in gpu.streams] == [torch.device("cuda", 0)] * 2


# ---- graphs ----


def test_a_capture_follows_the_side_stream_and_back(gpu: Gpu) -> None:
    overlap = Overlap("cuda:0", ON)
    layer(gpu, overlap, 0)
    with gpu.capture():
        layer(gpu, overlap, 1)
        layer(gpu, overlap, 2)
    layer(gpu, overlap, 3)
    assert gpu.parallel("indices of norm 1 1", "rope 1")
    assert gpu.ordered("attention 1", "index keys 2")


def test_a_capture_on_another_stream_waits_for_nothing_outside(gpu: Gpu) -> None:
    overlap, capturing = Overlap("cuda:0", ON), Stream(gpu, torch.device("cuda", 0))
    gpu.streams.append(capturing)
    layer(gpu, overlap, 0)
    with gpu.stream(capturing), gpu.capture():
        layer(gpu, overlap, 1)
    gpu.launch("between")
    with gpu.stream(Stream(gpu, torch.device("cuda", 0))):  # waits for the first, not for the one that captured
        layer(gpu, overlap, 2)
    # for the results of layer 0; those of the capture have memory of their own
    assert gpu.ordered("between", "index keys 2")
    assert not gpu.ordered("attention 1", "index keys 2")


def test_a_stream_that_captures_meanwhile_is_not_waited_for(gpu: Gpu) -> None:
    overlap, other = Overlap("cuda:0", ON), Stream(gpu, torch.device("cuda", 0))
    gpu.streams.append(other)
    with gpu.stream(other):
        overlap.fork(gpu.launch, "a").join()
        gpu.launch("use of a")
        with gpu.capture(), gpu.stream(gpu.main):
            overlap.fork(gpu.launch, "b").join()
    assert gpu.parallel("use of a", "b")


def test_a_fork_outside_of_a_capture_is_not_joined_inside(gpu: Gpu) -> None:
    forked = Overlap("cuda:0", ON).fork(gpu.launch, "a")
    with (
        gpu.capture(),
        pytest.raises(RuntimeError, match=r"join: expected a fork inside of .* got one outside"),
    ):
        forked.join()
    assert forked.join() == "a"


def test_a_fork_in_a_capture_is_joined_before_its_end(gpu: Gpu) -> None:
    overlap = Overlap("cuda:0", ON)
    with pytest.raises(RuntimeError, match="unjoined work"), gpu.capture():
        forked = overlap.fork(gpu.launch, "a")
    with pytest.raises(RuntimeError, match=r"join: expected a fork outside of .* got one inside"):
        forked.join()
    with pytest.raises(RuntimeError, match=r"fork: expected the one before to be joined"):
        overlap.fork(gpu.launch, "b")
    layer(gpu, overlap)


def test_a_function_that_fails_in_a_capture_leaves_nothing_unjoined(gpu: Gpu) -> None:
    overlap = Overlap("cuda:0", ON)

    def fails() -> None:
        gpu.launch("begun")
        raise OSError("no")

    with gpu.capture(), pytest.raises(OSError, match="no"):
        overlap.fork(fails)
    with gpu.capture(), pytest.raises(OSError, match="no"), overlap.fork(gpu.launch, "a"):
        raise OSError("no")


# ---- what is the same, on and off ----


def test_arguments_and_result(overlap: Overlap) -> None:
    def fn(*args: int, **options: int) -> tuple[tuple[int, ...], dict[str, int]]:
        return args, options

    with overlap.fork(fn, 1, 2, fork=3) as forked:
        assert isinstance(forked, Fork)
        assert forked.join() == ((1, 2), {"fork": 3})


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_what_the_function_raises_is_raised_at_the_fork(gpu: Gpu, overlap: Overlap, error: BaseException) -> None:
    def fails(hidden: str) -> None:
        gpu.launch(f"indices of {hidden}")
        raise error

    with pytest.raises(type(error)) as raised:
        overlap.fork(fails, "x")
    assert raised.value is error
    assert gpu.current is gpu.main
    gpu.launch("after")
    assert gpu.ordered("indices of x", "after")
    layer(gpu, overlap)


def test_an_error_on_the_query_path_joins(gpu: Gpu, overlap: Overlap) -> None:
    with pytest.raises(OSError, match="no"), overlap.fork(gpu.launch, "a") as forked:
        raise OSError("no")
    gpu.launch("after")
    assert gpu.ordered("a", "after")
    with pytest.raises(RuntimeError, match="join: expected a fork that is open, got one that has been given up"):
        forked.join()
    layer(gpu, overlap)


def test_one_inside_another_is_refused(gpu: Gpu, overlap: Overlap) -> None:
    with pytest.raises(RuntimeError, match="fork: expected a call outside of forked functions, got one inside"):
        overlap.fork(lambda: overlap.fork(gpu.launch, "a"))
    assert "a" not in gpu.before
    layer(gpu, overlap)


def test_an_unjoined_one_is_refused_by_name_and_joined(gpu: Gpu, overlap: Overlap) -> None:
    def forgotten() -> str:
        return gpu.launch("a")

    overlap.fork(forgotten)
    with pytest.raises(RuntimeError, match=r"fork: expected the one before .* got no join of that of .*forgotten"):
        overlap.fork(gpu.launch, "b")
    assert "b" not in gpu.before
    gpu.launch("after")
    assert gpu.ordered("a", "after")
    layer(gpu, overlap)


class Storage:
    """What a tensor holds: torch's allocator has it back when nobody refers to it."""


def test_arguments_live_until_the_join(overlap: Overlap) -> None:
    positional, named, used = Storage(), Storage(), []
    alive = [weakref.ref(positional), weakref.ref(named)]
    forked = overlap.fork(lambda a, b: used.append((id(a), id(b))), positional, b=named)
    del positional, named
    assert all(ref() is not None for ref in alive)
    forked.join()
    assert [ref() for ref in alive] == [None, None]


def test_arguments_live_until_the_end_of_a_block_that_fails(overlap: Overlap) -> None:
    argument = Storage()
    alive = weakref.ref(argument)
    with contextlib.suppress(OSError), overlap.fork(id, argument):
        del argument
        assert alive() is not None
        raise OSError
    assert alive() is None


def test_a_join_on_another_stream_is_refused(gpu: Gpu) -> None:
    overlap = Overlap("cuda:0", ON)
    forked = overlap.fork(gpu.launch, "a")
    with (
        gpu.stream(Stream(gpu, torch.device("cuda", 0))),
        pytest.raises(RuntimeError, match="join: expected the stream that forked to be current, got another one"),
    ):
        forked.join()
    assert forked.join() == "a"
    with (
        pytest.raises(RuntimeError, match="join: expected the stream that forked"),
        overlap.fork(gpu.launch, "b"),
    ):
        gpu.current = Stream(gpu, torch.device("cuda", 0))
    gpu.current = gpu.main
    layer(gpu, overlap)  # not held up by it


# ---- when it is on ----


@pytest.mark.parametrize(
    ("device", "settings", "is_on"),
    [
        ("cuda:0", ON, True),
        (torch.device("cuda"), ON, True),
        ("cuda:0", Settings(), False),
        ("cuda:0", Settings(dual_stream=True, disable=True), False),
        ("cpu", ON, False),
        ("meta", ON, False),
    ],
)
def test_when_it_is_on(gpu: Gpu, device: str | torch.device, settings: Settings, is_on: bool) -> None:
    assert Overlap(device, settings).is_on is is_on
    assert len(gpu.streams) == is_on


def test_the_environment_is_read_when_one_is_made(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Overlap("cuda:0").is_on
    monkeypatch.setenv("FUSEDCOMM_DUAL_STREAM", "1")
    overlap = Overlap("cuda:0")
    monkeypatch.setenv("FUSEDCOMM_DUAL_STREAM", "yes")
    assert overlap.is_on
    with pytest.raises(SettingError, match="FUSEDCOMM_DUAL_STREAM: expected 0 or 1, got 'yes'"):
        Overlap("cuda:0")


def test_within_a_compiled_function_there_are_no_streams(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = Overlap("cuda:0", ON)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer(gpu, overlap)
    assert gpu.calls == []


def test_compiles_without_graph_breaks() -> None:
    overlap = Overlap("cpu", ON)
    keys = torch.randn(8, 16)

    def attend(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with overlap.fork(torch.matmul, hidden, keys.T) as forked:
            q = hidden @ weight
            scores = forked.join()
        return q + scores.softmax(-1) @ keys

    hidden, weight = torch.randn(4, 16), torch.randn(16, 16)
    want = attend(hidden, weight)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(hidden, weight), want)
    assert torch.equal(attend(hidden, weight), want)


def test_on_a_cpu_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object) -> None:
        raise AssertionError("CUDA is asked for something")

    for name in ("Stream", "Event", "stream", "current_stream", "current_device", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, touched)
    overlap = Overlap("cpu", ON)
    x = torch.randn(5)
    with overlap.fork(torch.neg, x) as forked:
        assert torch.equal(forked.join(), -x)


def test_the_pretended_gpu_tells_orders_apart(gpu: Gpu) -> None:
    """What the tests above rest on."""
    side, event = Stream(gpu, torch.device("cuda", 0)), Event(gpu)
    gpu.launch("a")
    event.record(gpu.main)
    gpu.launch("b")
    side.wait_event(event)
    with gpu.stream(side):
        gpu.launch("c")
    assert gpu.ordered("a", "c")
    assert gpu.parallel("b", "c")
    with gpu.capture(), pytest.raises(RuntimeError, match="outside"):
        gpu.main.wait_event(event)
