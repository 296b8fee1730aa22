"""Starting rank processes of a command on this machine, through torchrun's own launcher (torch.distributed.elastic)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit code of a rank whose output nobody reads any more, as the shell has it."""
INTERRUPTED = 128 + signal.SIGINT


def threads_per_rank(ranks: int) -> int:
    """A core each, as far as they go: more threads than cores would keep each other waiting."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


class Outcome(NamedTuple):
    """How a job of ranks ended: the exit code for its command, and what to say about it."""

    code: int
    errors: tuple[str, ...] = ()


def run_on_ranks(ranks: int, function: str, arguments: Mapping[str, Any]) -> Outcome:
    """Runs ``module:name(**arguments)`` in ``ranks`` new processes and waits for them.

    The processes find torchrun's variables, so fusedcomm.init_distributed() makes them one group. They end with this
    process. An error on any rank ends all; the first is in the outcome, what came after it on other ranks is its echo.
    Ctrl-C and a closed pipe end all without a word.

    Args:
        arguments: anything that JSON carries.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the host's own name need not resolve in a container
        max_restarts=0,
        # Without SIGINT: then Ctrl-C reaches the ranks as SIGTERM, which ends them wherever they are, silently.
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
    )
    rank = ["-m", "fusedcomm.cli.rank", str(os.getpid()), function, json.dumps(dict(arguments))]
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
    with _quiet_logging():
        try:
            elastic_launch(config, sys.executable)(*rank)
        except ChildFailedError as error:
            return _explain(error)
        except KeyboardInterrupt:
            return Outcome(INTERRUPTED)
        except SignalException as stopped:
            return Outcome(128 + int(stopped.sigval))
    return Outcome(0)


def _explain(error: ChildFailedError) -> Outcome:
    failures = error.failures
    if any(failure.exitcode == BROKEN_PIPE for failure in failures.values()):
        return Outcome(BROKEN_PIPE)
    rank, first = error.get_first_failure()
    lines = [f"rank {rank}: {_message(first)}"]
    for other, failure in failures.items():
        # the launcher itself ends the others with SIGTERM
        if other != rank and failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            lines.append(f"rank {other}: {_message(failure)}")
    return Outcome(first.exitcode if first.exitcode > 0 else 128 - first.exitcode, tuple(lines))


def _message(failure: ProcessFailure) -> str:
    """What the rank recorded, else how it ended."""
    message: Any = failure.message
    if isinstance(message, dict):
        message = message.get("message", "")
    if failure.exitcode < 0:
        message = f"killed by {failure.signal_name()}"
    return str(message) or f"exit code {failure.exitcode}"


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """The launcher logs every process that it ends; what matters of it is in our own line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def find_mpiexec() -> str | None:
    """The mpiexec beside this Python (the mpich wheel's), else the one on PATH, else None."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def has_mpi4py() -> bool:
    """Whether mpi4py is installed; it is not imported, which would initialise MPI."""
    return importlib.util.find_spec("mpi4py") is not None
