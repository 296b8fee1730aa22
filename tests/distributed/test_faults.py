"""What goes wrong: ranks that die, stay away, leave, are interrupted, or call something else. Nobody waits for ever.

Bounds on time only tell an error from a hang: the machine may be busy.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import DEAD, RankPool, run_ranks
from ranked import input_of, raises, works

import fusedcomm
from fusedcomm import (
    CallMismatchError,
    GroupBrokenError,
    GroupCoordinator,
    PeerDiedError,
    PeerTimeoutError,
    Settings,
)
from fusedcomm.comm.custom import CustomAllReduce

HANG_S = 20.0  # the deadline of every wait below is longer, unless the test is about the deadline

X = torch.ones(4, 256)
W = torch.ones(256)
CALLS: dict[str, Callable[[GroupCoordinator], Any]] = {
    "all_reduce": lambda group: group.all_reduce(X),
    "allreduce_rmsnorm": lambda group: group.allreduce_rmsnorm(X, X, W, 1e-6),
    "allreduce_rmsnorm_quant": lambda group: group.allreduce_rmsnorm_quant(X, X, W, 1e-6),
    "all_gather": lambda group: group.all_gather(X),
    "reduce_scatter": lambda group: group.reduce_scatter(torch.ones(24, 8)),
    "broadcast": lambda group: group.broadcast(X.clone(), src=1),
    "barrier": lambda group: group.barrier(),
}


def refused(group: GroupCoordinator, text: str) -> None:
    """After a failure every call is refused, with what happened; closing works, and closing twice."""
    for call in CALLS.values():
        again = raises(GroupBrokenError, lambda call=call: call(group), "failed earlier", "refuses")
        assert text in again
    raises(GroupBrokenError, lambda: group.fused_allreduce_rmsnorm(X, X, W, 1e-6), "failed earlier")
    assert "broken" in repr(group)
    group.close()
    group.close()
    assert "closed" in repr(group)


# ---- a rank that dies ----


def killed(op: str, dead: int, settings: dict[str, Any]) -> float:
    """`dead` is killed while the others wait for it; how long they took to notice."""
    group = fusedcomm.init_distributed()
    if settings:
        group.close()
        group = GroupCoordinator(settings=Settings(**settings))
    works(group) if not settings.get("disable") else group.barrier()
    if group.rank == dead:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    expected = [op]
    if not settings:  # Gloo does not say which peer it lost
        expected += [f"rank {group.rank}", f"rank {dead}", "died"]
    text = raises(PeerDiedError, lambda: CALLS[op](group), *expected)
    elapsed = time.monotonic() - start
    assert elapsed < HANG_S
    refused(group, text)
    fusedcomm.destroy_distributed()
    return elapsed


@pytest.mark.parametrize("op", CALLS)
def test_a_killed_rank_is_named_by_every_survivor(op: str) -> None:
    times = run_ranks(3, killed, op, 1, {}, launcher="spawn", expect_dead={1})
    assert times[1] is DEAD


@pytest.mark.parametrize(("world_size", "dead"), [(2, 0), (2, 1), (3, 0), (8, 0), (8, 5)])
def test_any_rank_may_be_the_one_that_dies(world_size: int, dead: int) -> None:
    run_ranks(world_size, killed, "allreduce_rmsnorm_quant", dead, {}, launcher="spawn", expect_dead={dead})


@pytest.mark.parametrize("settings", [{"debug": True}, {"disable": True}], ids=["debug", "process_group"])
def test_a_killed_rank_is_noticed_outside_shared_memory_too(settings: dict[str, Any]) -> None:
    """The comparison of calls and the last stage wait in Gloo."""
    run_ranks(3, killed, "all_reduce", 1, settings, launcher="spawn", expect_dead={1})


def killed_among_many_calls(dead: int) -> None:
    """In the middle of pieces and two-shot: a rank dies at any moment of a long run of large calls."""
    group = fusedcomm.init_distributed()
    works(group)
    x = input_of(1, group.rank, (300, 4096), torch.bfloat16)
    if group.rank == dead:
        threading.Timer(0.2 + random.random() / 4, os.kill, (os.getpid(), signal.SIGKILL)).start()
    start = time.monotonic()

    def call_for_ever() -> None:
        while True:
            group.all_reduce(x)

    raises(PeerDiedError, call_for_ever, f"rank {dead}", "died")
    assert time.monotonic() - start < HANG_S
    group.close()


@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_dies_in_the_middle_of_a_call(dead: int) -> None:
    run_ranks(3, killed_among_many_calls, dead, launcher="spawn", expect_dead={dead})


def exits() -> None:
    group = fusedcomm.init_distributed()
    works(group)
    if group.rank == 1:
        os._exit(0)
    raises(PeerDiedError, group.barrier, "barrier", "rank 1", "died")


def test_a_rank_that_just_exits() -> None:
    run_ranks(3, exits, launcher="spawn", expect_dead={1})


# ---- a rank that stays away ----


def stays_away(settings: dict[str, Any]) -> None:
    dist.init_process_group("gloo")  # the world group goes by its own deadline: it keeps the ranks in step below
    group = GroupCoordinator(timeout=1.5, settings=Settings(**settings))
    works(group) if not settings.get("disable") else group.barrier()
    if group.rank == 2:
        dist.barrier()
        # It comes late. What the others had sent is still there, so this call may be complete; the next one is not.
        start = time.monotonic()
        raises(PeerDiedError, lambda: [group.all_reduce(X) for _ in range(2)], "all_reduce")
        assert time.monotonic() - start < HANG_S
    else:
        start = time.monotonic()
        error: BaseException | None = None
        try:
            group.all_reduce(X)
        except GroupBrokenError as caught:
            error = caught
        elapsed = time.monotonic() - start
        assert error is not None
        assert 1.0 < elapsed < HANG_S
        if settings.get("disable") or settings.get("debug"):
            assert type(error) in (PeerTimeoutError, PeerDiedError)
            assert "all_reduce" in str(error)
        else:
            assert type(error) is PeerTimeoutError, error
            for part in ("all_reduce", f"rank {group.rank} waited", "for rank 2", "FUSEDCOMM_TIMEOUT_S"):
                assert part in str(error)
        dist.barrier()
        refused(group, str(error))
    dist.barrier()
    with GroupCoordinator() as another:  # the ranks live on, and may try again
        works(another)


@pytest.mark.parametrize("settings", [{}, {"debug": True}, {"disable": True}], ids=["shared", "debug", "process_group"])
def test_a_rank_that_stays_away_is_named_at_the_deadline(settings: dict[str, Any]) -> None:
    run_ranks(3, stays_away, settings, launcher="spawn")


def slow_but_there() -> None:
    """The deadline is that of one wait: a rank that comes before it is no error, call after call."""
    with GroupCoordinator(timeout=3.0) as group:
        for late in range(3):
            if group.rank == late:
                time.sleep(1.5)
            works(group)


def test_a_slow_rank_is_no_error(ranks: RankPool) -> None:
    ranks(3).run(slow_but_there)


def closes_early() -> None:
    group = GroupCoordinator()
    works(group)
    if group.rank == 1:
        time.sleep(0.2)
        group.close()
        return
    start = time.monotonic()
    text = raises(
        PeerDiedError, lambda: group.allreduce_rmsnorm(X, X, W, 1e-6), "allreduce_rmsnorm", "rank 1", "closed"
    )
    assert time.monotonic() - start < HANG_S
    refused(group, text)


def test_a_rank_that_closes_early(ranks: RankPool) -> None:
    ranks(3).run(closes_early)


# ---- interrupts ----


def interrupted() -> None:
    group = GroupCoordinator()
    works(group)
    start = time.monotonic()
    if group.rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        raises(KeyboardInterrupt, lambda: group.all_reduce(X))
        assert 0.2 < time.monotonic() - start < HANG_S
        refused(group, "KeyboardInterrupt")
    else:
        if group.rank == 2:
            time.sleep(1.0)

        def two_calls() -> None:
            group.all_reduce(X)  # rank 1 had sent its part: this one may be complete
            group.all_reduce(X)

        text = raises(PeerDiedError, two_calls, "all_reduce", "rank 1")
        assert time.monotonic() - start < HANG_S
        refused(group, text)
    dist.barrier()
    with GroupCoordinator() as another:
        works(another)


def test_ctrl_c_on_a_waiting_rank(ranks: RankPool) -> None:
    ranks(3).run(interrupted)


def interrupted_around(when: str) -> None:
    """Ctrl-C in the few lines before or after the kernels: this rank leaves for good, so the others must hear of it."""
    group = GroupCoordinator(timeout=25)
    works(group)
    dist.barrier()
    if group.rank == 1:
        real = CustomAllReduce.all_reduce

        def interrupted(self: CustomAllReduce, *arguments: Any) -> Any:
            if when == "after":
                real(self, *arguments)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(CustomAllReduce, "all_reduce", interrupted)
            raises(KeyboardInterrupt, lambda: group.all_reduce(X))
        raises(GroupBrokenError, lambda: group.all_reduce(X), "failed earlier", "KeyboardInterrupt")
    else:
        start = time.monotonic()
        raises(PeerDiedError, lambda: [group.all_reduce(X) for _ in range(2)], "rank 1", "given up")
        assert time.monotonic() - start < HANG_S, "waited for the deadline"
    dist.barrier()
    group.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_a_call(ranks: RankPool, when: str) -> None:
    ranks(3).run(interrupted_around, when, timeout=90)


class Alarm(Exception):
    """What a signal handler of the application raises."""


def interrupted_by_a_handler() -> None:
    group = GroupCoordinator()
    works(group)
    if group.rank == 1:

        def handler(number: int, frame: object) -> None:
            raise Alarm("time is up")

        previous = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            raises(Alarm, lambda: group.all_reduce(X), "time is up")
        finally:
            signal.signal(signal.SIGALRM, previous)
        raises(GroupBrokenError, lambda: group.all_reduce(X), "interrupted by Alarm")
    elif group.rank == 2:
        time.sleep(1.0)
        raises(PeerDiedError, lambda: [group.all_reduce(X) for _ in range(2)], "rank 1")
    else:
        raises(PeerDiedError, lambda: [group.all_reduce(X) for _ in range(2)], "rank 1")
    dist.barrier()
    group.close()


def test_an_exception_from_a_signal_handler(ranks: RankPool) -> None:
    ranks(3).run(interrupted_by_a_handler)


def handler_that_returns() -> None:
    """A signal that is handled disturbs nothing."""
    with GroupCoordinator() as group:
        count = 0

        def handler(number: int, frame: object) -> None:
            nonlocal count
            count += 1

        previous = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            for late in range(3):
                if group.rank == late:
                    time.sleep(0.3)
                works(group)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert count > 10


def test_a_signal_that_is_handled(ranks: RankPool) -> None:
    ranks(3).run(handler_that_returns)


def interrupted_anywhere(rounds: int) -> None:
    """Ctrl-C at any moment of a run of small calls: whatever line it hits, the others do not wait for the deadline."""
    for _ in range(rounds):
        group = GroupCoordinator()
        works(group)
        dist.barrier()
        start = time.monotonic()
        if group.rank == 1:
            delay = random.random() / 50
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                while True:
                    group.all_reduce(X)
                    group.allreduce_rmsnorm_quant(X, X, W, 1e-6)
            except KeyboardInterrupt:
                timer.join()
            if "open" in repr(group):  # it hit between two calls: nothing has failed, so leave in the usual way
                group.close()
        else:
            try:
                while True:
                    group.all_reduce(X)
                    group.allreduce_rmsnorm_quant(X, X, W, 1e-6)
            except GroupBrokenError as error:
                assert "rank" in str(error)  # noqa: PT017
        assert time.monotonic() - start < HANG_S, "the others waited for the deadline"
        dist.barrier()
        group.close()


def test_ctrl_c_at_any_moment(ranks: RankPool) -> None:
    ranks(3).run(interrupted_anywhere, 25, timeout=100)


# ---- ranks that make different calls ----

DIFFERENT: dict[str, tuple[Callable[[GroupCoordinator], Any], Callable[[GroupCoordinator], Any], tuple[str, str]]] = {
    "op": (
        lambda g: g.all_gather(X),
        lambda g: g.all_reduce(X),
        ("all_gather", "all_reduce"),
    ),
    "fused or not": (
        lambda g: g.allreduce_rmsnorm(X, X, W, 1e-6),
        lambda g: g.allreduce_rmsnorm_quant(X, X, W, 1e-6),
        ("allreduce_rmsnorm(", "allreduce_rmsnorm_quant("),
    ),
    "rows": (
        lambda g: g.allreduce_rmsnorm(X[:3], None, W, 1e-6),
        lambda g: g.allreduce_rmsnorm(X, None, W, 1e-6),
        ("3, 256", "4, 256"),
    ),
    "size": (
        lambda g: g.all_reduce(torch.ones(1000, 4096)),  # two-shot and pieces against one-shot
        lambda g: g.all_reduce(torch.ones(7)),
        ("4096", "7"),
    ),
    "dtype": (
        lambda g: g.all_reduce(X.bfloat16()),
        lambda g: g.all_reduce(X.half()),
        ("bfloat16", "float16"),
    ),
    "group_size": (
        lambda g: g.allreduce_rmsnorm_quant(X, X, W, 1e-6, group_size=64),
        lambda g: g.allreduce_rmsnorm_quant(X, X, W, 1e-6, group_size=128),
        ("64", "128"),
    ),
    "src": (
        lambda g: g.broadcast(X.clone(), src=0),
        lambda g: g.broadcast(X.clone(), src=1),
        ("broadcast", "broadcast"),
    ),
    "barrier": (
        lambda g: g.barrier(),
        lambda g: g.all_reduce(X),
        ("barrier", "all_reduce"),
    ),
}


def different_calls(name: str, debug: bool, odd_rank: int) -> None:
    odd, usual, parts = DIFFERENT[name]
    group = GroupCoordinator(settings=Settings(debug=debug))
    works(group)
    start = time.monotonic()
    call = odd if group.rank == odd_rank else usual
    text = raises(CallMismatchError, lambda: call(group), "different calls", f"rank {odd_rank} ", *parts)
    assert time.monotonic() - start < HANG_S
    refused(group, text)
    with GroupCoordinator() as another:
        works(another)


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_different_calls_fail_on_all_ranks_and_name_both(ranks: RankPool, name: str, debug: bool) -> None:
    ranks(3).run(different_calls, name, debug, 1)


@pytest.mark.parametrize("odd_rank", [0, 7])
def test_different_calls_among_eight(ranks: RankPool, odd_rank: int) -> None:
    ranks(8).run(different_calls, "op", False, odd_rank)


def different_shapes_of_one_size() -> None:
    """Only FUSEDCOMM_DEBUG tells [2, 512] from [4, 256]: the kernels see a number of elements."""
    group = GroupCoordinator(settings=Settings(debug=True))
    x = torch.ones(2, 512) if group.rank == 0 else torch.ones(4, 256)
    raises(CallMismatchError, lambda: group.all_reduce(x), "(2, 512)", "(4, 256)", "rank 0", "rank 1")
    group.close()


def no_rows_on_one_rank(debug: bool) -> None:
    """A rank without rows has nothing to send: with DEBUG the call fails at once, otherwise the next one does."""
    group = GroupCoordinator(settings=Settings(debug=debug))
    x = torch.ones(0 if group.rank == 1 else 4, 256)

    def calls() -> None:
        group.all_reduce(x)
        if debug:
            raise AssertionError("expected the first call to fail")
        group.barrier()

    raises(CallMismatchError, calls, "different calls")
    group.close()


def test_different_shapes_of_one_size(ranks: RankPool) -> None:
    ranks(3).run(different_shapes_of_one_size)


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_no_rows_on_one_rank(ranks: RankPool, debug: bool) -> None:
    ranks(3).run(no_rows_on_one_rank, debug)


def one_broken_group_among_two() -> None:
    """The failure of a group is its own: another one of the same ranks goes on."""
    broken, sound = GroupCoordinator(), GroupCoordinator()
    call = broken.barrier if broken.rank == 0 else lambda: broken.all_reduce(X)
    text = raises(CallMismatchError, call, "different calls")
    works(sound)
    refused(broken, text)
    works(sound)
    sound.close()


def test_a_failure_stays_within_its_group(ranks: RankPool) -> None:
    ranks(3).run(one_broken_group_among_two)
