"""The test's side of the harness: jobs of ranks, the bodies they run, and what a failure looks like."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from harness import launch as launching
from harness.launch import CommandLaunch, ForkLaunch, Launch
from harness.worker import GPUS, Job, Outcome, join_torch

# spawn, slurm, bare: ranks forked by the harness with torchrun's variables, srun's variables, none.
LAUNCHERS: Final = ("torchrun", "mpiexec", "spawn", "slurm", "bare")
START_TIMEOUT_S: Final = 180.0  # eight imports of torch on two busy cores
STOP_TIMEOUT_S: Final = 30.0
# After a first failure the other ranks get this long to report theirs before they count as stuck.
GRACE_S: Final = 5.0
LOG_TAIL_BYTES: Final = 6000


class RankFailure(AssertionError):
    """A body failed, died or hung on some rank; the text has its traceback, stacks and output."""


class _Dead:
    def __repr__(self) -> str:
        return "DEAD"


DEAD: Final = _Dead()  # the result of a rank that was expected to die, and did


class _Rank:
    """One rank as the test process sees it."""

    def __init__(self, rank: int, pid: int, connection: Connection, log: Path) -> None:
        self.rank = rank
        self.pid = pid
        self.connection = connection
        self.pidfd = os.pidfd_open(pid)  # readable once the process has ended, whoever its parent is
        self._log = log
        self._log_start = 0

    def send(self, job: Job | None) -> None:
        """Sends a job (None: stop); a rank that died meanwhile is noticed when its outcome is read."""
        self._log_start = self._log.stat().st_size
        with contextlib.suppress(OSError):
            self.connection.send_bytes(pickle.dumps(job))

    def outcome(self) -> Outcome | None:
        """The outcome of a rank found ready; None if it died."""
        try:
            return pickle.loads(self.connection.recv_bytes()) if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def output(self) -> str:
        """The end of what the rank has printed since the job was sent."""
        return _tail(self._log, self._log_start)

    def close(self) -> None:
        self.connection.close()
        os.close(self.pidfd)


class RankGroup:
    """A running job of `world_size` ranks that runs bodies, one after another; a failed body ends it.

    env holds for all ranks, rank_env[r] for rank r alone. With join, torch.distributed is initialised (gloo)
    before the first body and the TP group is closed after each, as a pool of many tests needs it. With gpus, rank r
    works on GPU r % gpus (harness.device()); without, on the CPU.
    """

    def __init__(
        self,
        world_size: int,
        *,
        launcher: str = "torchrun",
        env: Mapping[str, str] | None = None,
        rank_env: Sequence[Mapping[str, str]] | None = None,
        join: bool = False,
        gpus: int | None = None,
    ) -> None:
        if launcher not in LAUNCHERS:
            raise ValueError(f"launcher: expected one of {', '.join(LAUNCHERS)}, got {launcher!r}")
        if rank_env is not None and len(rank_env) != world_size:
            raise ValueError(f"rank_env: expected {world_size} mappings, got {len(rank_env)}")
        self.world_size = world_size
        self.launcher = launcher
        self.gpus = gpus
        self.broken = False
        self._join = join
        self._dead: set[int] = set()
        self._ranks: list[_Rank] = []
        self._launch: Launch | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        try:
            own = {} if gpus is None else {GPUS: str(gpus)}
            self._start({**(env or {}), **own}, [dict(own) for own in rank_env or [{}] * world_size])
            if join:
                self.run(join_torch, timeout=START_TIMEOUT_S)
        except BaseException:
            self._end()
            raise

    def _start(self, env: dict[str, str], rank_env: list[dict[str, str]]) -> None:
        __tracebackhide__ = True
        address = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(self.world_size)
            if self.launcher == "torchrun":
                command = launching.torchrun_command(self.world_size)
                self._launch = CommandLaunch(command, address, env, rank_env)
            elif self.launcher == "mpiexec":
                command = launching.mpiexec_command(self.world_size)
                self._launch = CommandLaunch(command, address, env, rank_env)
            else:
                variables = launching.rank_variables(self.launcher, self.world_size)
                merged = [{**facts, **env, **own} for facts, own in zip(variables, rank_env, strict=True)]
                self._launch = ForkLaunch(address, merged)
            self._accept(listener, self._launch)
        self._ranks.sort(key=lambda rank: rank.rank)

    def _accept(self, listener: socket.socket, launch: Launch) -> None:
        __tracebackhide__ = True
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self._ranks) < self.world_size:
            if wait([listener], 0.2):
                connection = Connection(listener.accept()[0].detach())
                rank, pid = pickle.loads(connection.recv_bytes())
                self._ranks.append(_Rank(rank, pid, connection, self._folder / f"rank{rank}.log"))
            elif time.monotonic() > deadline or any(code is not None for code in launch.exit_codes()):
                missing = sorted(set(range(self.world_size)) - {rank.rank for rank in self._ranks})
                raise RankFailure(f"{self._name()}: rank(s) {missing} did not start\n{self._logs()}")

    def run(
        self, body: Callable[..., Any], *args: Any, timeout: float = 60.0, expect_dead: Collection[int] = ()
    ) -> list[Any]:
        """Runs body(*args) on every rank and returns the results in rank order.

        Raises RankFailure when a rank raises, dies or is not done after `timeout` seconds. The ranks in
        expect_dead must die; torchrun and mpiexec then end the others: use spawn to see what survivors do.
        """
        __tracebackhide__ = True
        if self.broken or not self._ranks:
            raise RuntimeError(f"{self._name()}: closed, or broken by an earlier body")
        job = _job(body, args, leave_groups=self._join)
        for rank in self._ranks:
            rank.send(job)
        try:
            outcomes = self._collect(timeout, expect_dead)
        except BaseException:  # Ctrl-C, or a timeout of the whole test: ranks that are still busy serve no other body
            self._end()
            raise
        stories = [
            (rank, story)
            for rank in self._ranks
            if (story := _story(rank.rank in expect_dead, outcomes.get(rank.rank, "missing"))) is not None
        ]
        if not stories:
            self._dead = set(expect_dead)
            self.broken = bool(expect_dead)
            return [DEAD if (found := outcomes[rank.rank]) is None else found.value for rank in self._ranks]
        text = self._report(f"{body.__qualname__}{args!r}"[:300], stories, timeout)
        self.broken = True
        self._end()
        raise RankFailure(text)

    def _collect(self, timeout: float, expect_dead: Collection[int]) -> dict[int, Outcome | None]:
        """The outcomes by rank (None: died); a rank that is not done in time is left out."""
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome | None] = {}
        pending = {rank.rank: rank for rank in self._ranks}
        while pending and (left := deadline - time.monotonic()) > 0:
            handles: list[Any] = [handle for rank in pending.values() for handle in (rank.connection, rank.pidfd)]
            ready = set(wait(handles, left))
            for rank in [rank for rank in pending.values() if ready & {rank.connection, rank.pidfd}]:
                outcome = rank.outcome()
                outcomes[rank.rank] = outcome
                del pending[rank.rank]
                failed = rank.rank not in expect_dead if outcome is None else outcome.error is not None
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return outcomes

    def _report(self, body: str, stories: list[tuple[_Rank, str]], timeout: float) -> str:
        hung = [rank for rank, story in stories if story == "missing"]
        for rank in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)  # faulthandler writes the stacks of all threads to the log
        if hung:
            time.sleep(1.0)
        elif any(story.startswith("died") for _, story in stories):
            time.sleep(0.5)  # the launcher is about to say how it died
        same: dict[str, list[int]] = {}
        for rank, story in stories:
            if story == "missing":
                story = f"not done after {timeout:g} s, or {GRACE_S:g} s after another rank failed; its stacks:"
            output = rank.output()
            text = f"{story.rstrip()}\n{output and '[its output]'}\n{output}".rstrip()
            # Tracebacks that differ in addresses only are shown once.
            same.setdefault(re.sub(r"0x[0-9a-f]+", "0x…", text), []).append(rank.rank)
        parts = [f"----- rank {', '.join(map(str, ranks))} -----\n{text}" for text, ranks in same.items()]
        head = f"{self._name()}: {body} failed on {len(stories)} of {self.world_size} ranks"
        return "\n".join([head, *parts, self._launcher_log()])

    def close(self) -> None:
        """Lets the ranks exit; raises RankFailure when one crashes or hangs on its way out."""
        __tracebackhide__ = True
        launch = self._launch
        if launch is None:
            return
        try:
            if self._dead and isinstance(launch, CommandLaunch):
                return  # the launcher has ended the survivors
            for rank in self._ranks:
                rank.send(None)
            ended = launching.wait_until_ended(launch, STOP_TIMEOUT_S)
            codes = [code for rank, code in enumerate(launch.exit_codes()) if rank not in self._dead]
            if not ended or any(codes):
                what = f"exit codes {codes}" if ended else f"not gone after {STOP_TIMEOUT_S:g} s"
                raise RankFailure(f"{self._name()}: ranks failed while exiting: {what}\n{self._logs()}")
        finally:
            self._end()

    def _end(self) -> None:
        """Kills whatever is left of the job and removes its folder."""
        launch, self._launch = self._launch, None
        self.broken = True
        if launch is not None:
            own = [*launch.pids(), *(rank.pid for rank in self._ranks if not wait([rank.pidfd], 0))]
            alive = own if launch.running() else own[len(launch.pids()) :]
            for pid in launching.descendants(alive):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launching.wait_until_ended(launch, STOP_TIMEOUT_S)
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _name(self) -> str:
        where = "" if self.gpus is None else f" on {self.gpus} GPU{'s' * (self.gpus > 1)}"
        return f"{self.world_size} ranks{where} under {self.launcher}"

    def _launcher_log(self) -> str:
        text = _tail(self._folder / "launcher.log")
        return text and f"----- {self.launcher} -----\n{text}"

    def _logs(self) -> str:
        parts = [f"----- {log.stem} -----\n{_tail(log)}" for log in sorted(self._folder.glob("rank*.log"))]
        return "\n".join([*parts, self._launcher_log()])

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if error is None:
            self.close()
        else:
            self._end()


_Key = tuple[int, frozenset[tuple[str, str]], "int | None"]


class RankPool:
    """Standing torchrun jobs, one for each world size, env and number of GPUs; one that a body broke starts anew."""

    def __init__(self) -> None:
        self._groups: dict[_Key, RankGroup] = {}
        self._starting: dict[_Key, Future[RankGroup]] = {}

    def __call__(self, world_size: int, env: Mapping[str, str] | None = None, gpus: int | None = None) -> RankGroup:
        """The standing job of this size; torch.distributed is initialised in it and stays so."""
        __tracebackhide__ = True
        key = (world_size, frozenset((env or {}).items()), gpus)
        starting = self._starting.pop(key, None)
        if starting is not None:
            self._groups[key] = starting.result()
        group = self._groups.get(key)
        if group is None or group.broken:
            group = self._groups[key] = RankGroup(world_size, env=env, gpus=gpus, join=True)
        return group

    def start(self, jobs: Collection[tuple[int, Mapping[str, str] | None, int | None]]) -> None:
        """Begins to start the jobs (world size, env, GPUs), all at once; the first call for one waits for it."""
        executor = ThreadPoolExecutor(max(len(jobs), 1))
        for world_size, env, gpus in jobs:
            key = (world_size, frozenset((env or {}).items()), gpus)
            if key not in self._groups and key not in self._starting:
                self._starting[key] = executor.submit(RankGroup, world_size, env=env, gpus=gpus, join=True)
        executor.shutdown(wait=False)

    def close(self) -> None:
        """Ends all jobs; raises RankFailure when a rank crashed on its way out."""
        with contextlib.ExitStack() as stack:
            for key, starting in self._starting.items():
                with contextlib.suppress(RankFailure):  # no test asked for it
                    self._groups[key] = starting.result()
            for group in self._groups.values():
                stack.callback(group.close)


def run_ranks(
    world_size: int,
    body: Callable[..., Any],
    *args: Any,
    launcher: str = "torchrun",
    env: Mapping[str, str] | None = None,
    rank_env: Sequence[Mapping[str, str]] | None = None,
    timeout: float = 60.0,
    expect_dead: Collection[int] = (),
    gpus: int | None = None,
) -> list[Any]:
    """Runs body(*args) on every rank of a job started for it alone, and returns the results in rank order.

    launcher is torchrun, mpiexec, or (forked, so quick) spawn with torchrun's variables, slurm with srun's,
    bare with none. timeout, in seconds, counts from the moment that all ranks run. Raises RankFailure,
    also for a crash while exiting.
    """
    __tracebackhide__ = True
    with RankGroup(world_size, launcher=launcher, env=env, rank_env=rank_env, gpus=gpus) as group:
        return group.run(body, *args, timeout=timeout, expect_dead=expect_dead)


def _job(body: Callable[..., Any], args: tuple[Any, ...], leave_groups: bool) -> Job:
    path = inspect.getsourcefile(body)
    if path is None or getattr(sys.modules[body.__module__], body.__qualname__, None) is not body:
        raise ValueError(f"body: expected a module-level function, got {body.__qualname__}")
    return Job(path, body.__module__, body.__qualname__, pickle.dumps(args), leave_groups)


def _story(expected_dead: bool, outcome: Outcome | str | None) -> str | None:
    """Why a rank's outcome is a failure; None if it is none."""
    if isinstance(outcome, str):
        return outcome
    if outcome is None:
        return None if expected_dead else "died before its body was done"
    if outcome.error is not None:
        return outcome.error
    return "was expected to die, and finished its body" if expected_dead else None


def _tail(log: Path, start: int = 0) -> str:
    if not log.exists():
        return ""
    data = log.read_bytes()[start:]
    return data[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
