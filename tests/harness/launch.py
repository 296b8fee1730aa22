"""Starts the processes of a job: through torchrun, through mpiexec, or forked with a launcher's variables."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness import worker

TESTS = Path(__file__).resolve().parent.parent


class Launch(ABC):
    """The started processes of one job."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Processes that this one started itself."""

    @abstractmethod
    def running(self) -> bool:
        """Whether any of them still runs."""

    @abstractmethod
    def exit_codes(self) -> list[int | None]:
        """Their exit codes; None while running."""


class CommandLaunch(Launch):
    """A launcher's command (torchrun, mpiexec) that starts `python -m harness` on every rank."""

    def __init__(
        self,
        command: Sequence[str],
        address: str,
        env: Mapping[str, str],
        rank_env: Sequence[Mapping[str, str]],
    ) -> None:
        folder = Path(address).parent
        (folder / "environ").write_bytes(pickle.dumps(rank_env))
        python_path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
        with (folder / "launcher.log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "-m", "harness"],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    **env,
                    "PYTHONPATH": python_path,
                    worker.ADDRESS: address,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        return [self._process.pid]

    def running(self) -> bool:
        return self._process.poll() is None

    def exit_codes(self) -> list[int | None]:
        return [self._process.poll()]


class ForkLaunch(Launch):
    """Ranks forked from a server process that has imported torch: eight start in a second."""

    def __init__(self, address: str, rank_env: Sequence[Mapping[str, str]]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "harness.worker"])
        self._processes = [
            context.Process(target=worker.serve, args=(address, rank, environ), daemon=True)
            for rank, environ in enumerate(rank_env)
        ]
        for process in self._processes:
            process.start()

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def running(self) -> bool:
        return any(process.exitcode is None for process in self._processes)

    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self._processes]


def torchrun_command(world_size: int) -> list[str]:
    """The torchrun command for one host."""
    # --local-addr: the host's own name need not resolve in a container.
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(world_size)]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def mpiexec_path() -> str | None:
    """The mpiexec that belongs to this Python (the mpich wheel puts it beside the interpreter), or None."""
    path = Path(sys.executable).parent / "mpiexec"
    return str(path) if path.exists() else None


def mpiexec_command(world_size: int) -> list[str]:
    """The mpiexec command for one host."""
    path = mpiexec_path()
    if path is None:
        raise FileNotFoundError(f"mpiexec: expected beside {sys.executable}, got none (pip install mpich)")
    return [path, "-n", str(world_size), sys.executable]


def torchrun_variables(world_size: int) -> list[dict[str, str]]:
    """What torchrun would set, for ranks started without it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(world_size)
    shared = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world_size)]


def slurm_variables(world_size: int) -> list[dict[str, str]]:
    """What srun would set for a step of one node."""
    shared = {
        "SLURM_JOB_ID": str(random.randrange(1, 1 << 20)),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(world_size),
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }
    return [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **shared} for rank in range(world_size)]


def rank_variables(launcher: str, world_size: int) -> list[dict[str, str]]:
    """What each rank finds in its environment under a launcher that the harness stands in for."""
    if launcher == "spawn":
        return torchrun_variables(world_size)
    if launcher == "slurm":
        return slurm_variables(world_size)
    return [{} for _ in range(world_size)]


def descendants(pids: Iterable[int]) -> set[int]:
    """The processes and everything they started, as the kernel knows it now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # ended while we looked
        children.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    stack = list(pids)
    while stack:
        pid = stack.pop()
        if pid not in found:
            found.add(pid)
            stack.extend(children.get(pid, []))
    return found


def wait_until_ended(launch: Launch, timeout_s: float) -> bool:
    """Whether all processes of the launch ended within the time."""
    deadline = time.monotonic() + timeout_s
    while launch.running():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
