"""What stands around every collective of a group: is it usable, is another thread in it, do the ranks agree."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from fusedcomm.comm.symmetric_buffer import Exchange
from fusedcomm.errors import CallMismatchError, GroupBrokenError, GroupClosedError

_CALL_TEXT_BYTES = 256


class CallGuard:
    """``begin`` before a collective, ``end`` after it whatever happened, ``failed`` in between if it raised."""

    compare_calls = False
    """Whether ranks compare every call before they make it (``FUSEDCOMM_DEBUG=1``)."""

    def __init__(self, exchange: Exchange, rank: int = 0, is_capturing: Callable[[], bool] = lambda: False) -> None:
        """``is_capturing``: whether calls go into a graph now; those are not compared."""
        self._exchange = exchange
        self._rank = rank
        self._is_capturing = is_capturing
        self._op = ""
        self.lock = threading.Lock()
        self._refusal: Callable[[], Exception] | None = None

    def begin(self, op: str, x: torch.Tensor | None = None, option: int | None = None) -> None:
        """Raises if the group cannot be used; with compare_calls also on all ranks if their calls differ."""
        self.check()
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(f"{op}: the group is in use by another thread; it serves one thread at a time")
        self._op = op
        if self.compare_calls and not self._is_capturing():
            try:
                self._compare_calls(op, x, option)
            except BaseException as error:
                self.failed(error)
                self.end()
                raise

    def check(self) -> None:
        """Raises if the group is closed, broken, or that of a parent process."""
        if self._refusal is not None:
            raise self._refusal()

    def end(self) -> None:
        """Lets the next call in."""
        self.lock.release()

    def failed(self, error: BaseException) -> None:
        """After an error that leaves the ranks out of step the group refuses further calls; others change nothing."""
        if isinstance(error, GroupBrokenError) and error.__cause__ is not None:
            # from the process group, which knows neither
            error.args = (f"{self._op}: rank {self._rank}: {error}",)
        if isinstance(error, GroupBrokenError) or not isinstance(error, Exception):
            text = str(error) or type(error).__name__
            self._refusal = lambda: GroupBrokenError(f"the group failed earlier and refuses further calls: {text}")

    def close(self) -> None:
        """Every further call raises GroupClosedError. RuntimeError if another thread is in a call."""
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("close: the group is in use by another thread")
        # The lock is kept: a thread that is just about to go straight to the kernels must not find it free.
        self._refusal = lambda: GroupClosedError("the group is closed")

    def forked(self) -> None:
        """In a child process: every call raises GroupClosedError."""
        text = "the group was inherited through fork; a child process needs a group of its own"
        self._refusal = lambda: GroupClosedError(text)

    @property
    def usable(self) -> bool:
        """Whether the next call is let in."""
        return self._refusal is None

    def _compare_calls(self, op: str, x: torch.Tensor | None, option: int | None) -> None:
        call = op
        if x is not None:
            extra = "" if option is None else f", option={option}"
            call = f"{op}(shape={tuple(x.shape)}, dtype={x.dtype}{extra})"
        try:
            records = self._exchange(call.encode()[:_CALL_TEXT_BYTES].ljust(_CALL_TEXT_BYTES, b"\0"))
        except GroupBrokenError as error:
            raise type(error)(f"{op}: {error}") from None
        texts = [data.rstrip(b"\0").decode(errors="replace") for data in records]
        if len(set(texts)) > 1:
            listed = ", ".join(f"rank {r} {text}" for r, text in enumerate(texts))
            raise CallMismatchError(f"ranks made different calls: {listed}")
