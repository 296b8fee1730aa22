"""CallGuard: who is let in, and what a failure leaves behind."""

import threading

import pytest
import torch

from fusedcomm.comm.guard import CallGuard
from fusedcomm.errors import CallMismatchError, GroupBrokenError, GroupClosedError, PeerDiedError


def guard(*others: str) -> CallGuard:
    """A guard among ranks whose calls are ``others``."""

    def exchange(data: bytes) -> list[bytes]:
        return [data, *(text.encode().ljust(len(data), b"\0") for text in others)]

    return CallGuard(exchange)


def test_one_thread_at_a_time() -> None:
    g = guard()
    g.begin("all_reduce")
    errors: list[Exception] = []

    def enter() -> None:
        for action in (lambda: g.begin("barrier"), g.close):
            try:
                action()
            except RuntimeError as error:
                errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert [str(e).partition(":")[0] for e in errors] == ["barrier", "close"]
    assert all("another thread" in str(e) for e in errors)
    g.end()
    g.begin("all_reduce")


@pytest.mark.parametrize("error", [PeerDiedError("rank 3 has died"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_that_leaves_ranks_out_of_step_is_remembered(error: BaseException) -> None:
    g = guard()
    g.begin("all_reduce")
    g.failed(error)
    g.end()
    with pytest.raises(GroupBrokenError, match=str(error) or type(error).__name__):
        g.begin("all_reduce")
    assert not g.usable


def test_a_bad_argument_changes_nothing() -> None:
    g = guard()
    g.begin("all_reduce")
    g.failed(ValueError("x: expected a tensor"))
    g.end()
    assert g.usable
    g.begin("all_reduce")


def test_closed_and_forked() -> None:
    g = guard()
    g.close()
    with pytest.raises(GroupClosedError, match="closed"):
        g.begin("barrier")
    g = guard()
    g.forked()
    with pytest.raises(GroupClosedError, match="fork"):
        g.begin("barrier")


def test_calls_are_compared_only_when_asked() -> None:
    x = torch.zeros(2, 3)
    g = guard("barrier")
    g.begin("all_reduce", x)
    g.end()
    g.compare_calls = True
    with pytest.raises(CallMismatchError) as caught:
        g.begin("all_reduce", x, 1)
    assert "rank 0 all_reduce(shape=(2, 3), dtype=torch.float32, option=1)" in str(caught.value)
    assert "rank 1 barrier" in str(caught.value)
    with pytest.raises(GroupBrokenError):
        g.begin("barrier")


def test_the_same_call_is_let_in() -> None:
    g = guard("broadcast(shape=(4,), dtype=torch.int64, option=0)")
    g.compare_calls = True
    g.begin("broadcast", torch.zeros(4, dtype=torch.int64), 0)
    g.end()
