"""The rank's side of the harness: runs the bodies that the test process names, reports each outcome."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ADDRESS = "RANK_HARNESS_ADDRESS"
# How many GPUs the ranks of the job share, in a rank's environment; absent: they work on CPU.
GPUS = "RANK_HARNESS_GPUS"
# Where launchers state a process's rank: torchrun, Hydra (MPICH), Open MPI.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Job:
    """One body to run; args stay pickled until the body's module, which may define their types, is loaded."""

    path: str
    module: str
    function: str
    args: bytes
    leave_groups: bool


@dataclass(frozen=True)
class Outcome:
    """What a body came to on one rank: its value, or the traceback it raised."""

    value: Any = None
    error: str | None = None


def device() -> torch.device:
    """Where this rank's tensors live: the CPU, or in a job that was given GPUs rank r's r-th one, round and round."""
    import torch

    gpus = os.environ.get(GPUS)
    if gpus is None:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % int(gpus))


def join_torch() -> None:
    """Body that initialises torch.distributed once for a pooled job."""
    import torch.distributed as dist

    dist.init_process_group("gloo")


def synchronize() -> None:
    """Waits for the rank's GPU, if it has one: what failed there is the failure of the body that started it."""
    if GPUS in os.environ:
        import torch

        torch.cuda.synchronize(device())


def _load(path: str, name: str) -> ModuleType:
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == path:
        return loaded
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"path: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _describe(error: BaseException) -> str:
    """The traceback from the body on; for a bare assert, with the values it saw."""
    trace = error.__traceback__
    text = "".join(traceback.format_exception(type(error), error, trace and (trace.tb_next or trace)))
    if isinstance(error, AssertionError) and not error.args and trace is not None:
        while trace.tb_next is not None:
            trace = trace.tb_next
        for name, value in trace.tb_frame.f_locals.items():
            text += f"    {name} = {repr(value)[:200]}\n"
    return text


def _run(job: Job) -> Outcome:
    try:
        function = getattr(_load(job.path, job.module), job.function)
        if GPUS in os.environ:
            import torch

            torch.cuda.set_device(device())
        value = function(*pickle.loads(job.args))
        synchronize()
        fusedcomm = sys.modules.get("fusedcomm")
        if job.leave_groups and fusedcomm is not None:
            fusedcomm.destroy_distributed()
        pickle.dumps(value)
    except BaseException as error:  # SystemExit and pytest's outcomes too: whatever ends a body is reported
        return Outcome(error=_describe(error))
    return Outcome(value=value)


def _receive(connection: Connection, jobs: queue.SimpleQueue[Job | None]) -> None:
    """Reads jobs on a thread of its own, so that a rank ends when the test process is gone."""
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)
        jobs.put(job)
        if job is None:
            return


def serve(address: str, rank: int, environ: Mapping[str, str]) -> None:
    """Serves one rank until told to stop; its output, and stacks on SIGUSR1, go to rank<N>.log."""
    os.environ.update(environ)
    log = open(Path(address).parent / f"rank{rank}.log", "a", buffering=1)  # noqa: SIM115 (open until exit)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True, chain=False)
    connection = Client(address, "AF_UNIX")

    def send(message: object) -> None:
        connection.send_bytes(pickle.dumps(message))

    send((rank, os.getpid()))
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while (job := jobs.get()) is not None:
        outcome = _run(job)
        sys.stdout.flush()
        send(outcome)


def main() -> None:
    """Serves the rank that the launcher's variables name."""
    rank = next(int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ)
    address = os.environ[ADDRESS]
    environ = pickle.loads((Path(address).parent / "environ").read_bytes())[rank]
    serve(address, rank, environ)
