"""Which peers can be measured: functions that prepare one, found by operation and name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from fusedcomm.cli.bench.job import Job


class WrongResultError(RuntimeError):
    """A peer computed something else than the reference, so its time means nothing."""


class Runner(Protocol):
    """One peer, ready to run one case over and over."""

    def reset(self, calls: int) -> None:
        """Outside the clock: poisons the results, and readies inputs for ``calls`` calls."""

    def call(self, index: int) -> None:
        """Under the clock: call ``index`` since reset, from inputs to results."""

    def check(self) -> None:
        """Outside the clock: raises WrongResultError unless the last call's results are right."""


Prepare = Callable[["Job", Any], Runner]
"""``prepare(job, inputs)``: what is not part of a call (buffers, groups) happens here."""


class Peer(NamedTuple):
    """A way to do an operation; ``needs_mpi``: only on ranks that have MPI."""

    op: str
    name: str
    prepare: Prepare
    needs_mpi: bool = False


class Registry:
    """The peers of one benchmark, in the order of their registration."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, str], Peer] = {}

    def add(self, peer: Peer) -> None:
        if (peer.op, peer.name) in self._peers:
            raise ValueError(f"name: expected a new peer of {peer.op}, got {peer.name!r} again")
        self._peers[peer.op, peer.name] = peer

    def peer(self, op: str, name: str, *, needs_mpi: bool = False) -> Callable[[Prepare], Prepare]:
        """Registers the decorated function."""

        def register(prepare: Prepare) -> Prepare:
            self.add(Peer(op, name, prepare, needs_mpi))
            return prepare

        return register

    def peers(self, op: str) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.op == op]
