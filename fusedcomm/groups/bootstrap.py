"""Who the ranks of this job are and where they meet: torchrun, mpirun, srun, or a process alone."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]  # public, not in __all__

from fusedcomm.env import launcher_environ
from fusedcomm.errors import FusedCommError

_MPI_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


@dataclass(frozen=True)
class RankFacts:
    """Where this process stands in its job."""

    launcher: str  # "torchrun", "mpi", "slurm" or "alone"
    rank: int
    world_size: int
    local_rank: int


def detect(environ: Mapping[str, str] | None = None) -> RankFacts:
    """Reads the rank from what the launcher left in the environment, torchrun first.

    Under mpirun the facts come from MPI itself (mpi4py), which this initialises.

    Raises:
        FusedCommError: started by mpirun without mpi4py, or with variables that contradict each other.
    """
    environ = launcher_environ() if environ is None else environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        return _checked("torchrun", rank, size, _number(environ, "LOCAL_RANK", default=rank))
    if any(v in environ for v in _MPI_RANK_VARIABLES) and not _is_srun_of_its_own(environ):
        comm = _mpi_world()
        return _checked("mpi", comm.Get_rank(), comm.Get_size(), _mpi_local_rank(comm))
    # SLURM_STEP_ID is there only under srun: a batch script or an salloc shell is one process, whatever SLURM_NTASKS is
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return _checked(
            "slurm",
            _number(environ, "SLURM_PROCID"),
            _slurm_size(environ),
            _number(environ, "SLURM_LOCALID", default=0),
        )
    return RankFacts("alone", 0, 1, 0)


_stores: dict[tuple[object, ...], Any] = {}  # by what the launcher said: a store lives as long as its process
_initializations = 0


def initialize(facts: RankFacts, timeout_s: float) -> None:
    """Initialises torch.distributed (Gloo) for a job of several ranks; all ranks call it.

    Every initialisation of a job works in one store, under a prefix of its own. ``init_process_group`` by itself uses
    the same keys each time: after a ``destroy_process_group``, a rank that is early reads the addresses of the time
    before (torchrun's store outlives them) or talks to a store that is about to close, and hangs.
    """
    global _initializations
    timeout = timedelta(seconds=timeout_s)
    environ = launcher_environ()
    key = (facts, os.getpid(), environ.get("MASTER_ADDR"), environ.get("MASTER_PORT"))
    store = _stores.get(key)
    if store is None:
        store = _stores[key] = _rendezvous(facts, environ, timeout)
    store.set_timeout(timeout)
    _initializations += 1
    dist.init_process_group(
        "gloo",
        store=PrefixStore(f"fusedcomm/{_initializations}", store),
        rank=facts.rank,
        world_size=facts.world_size,
        timeout=timeout,
    )


def _rendezvous(facts: RankFacts, environ: Mapping[str, str], timeout: timedelta) -> Any:
    if facts.launcher == "mpi":
        return _mpi_store(facts, timeout)
    url = "env://"
    if facts.launcher == "slurm":
        host, port = slurm_rendezvous(environ)
        url = f"tcp://{host}:{port}"
    return next(iter(rendezvous(url, facts.rank, facts.world_size, timeout=timeout)))[0]


def slurm_rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0: ``MASTER_ADDR`` and ``MASTER_PORT`` if set, else first node and a port of the step."""
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    if "MASTER_PORT" in environ:
        return host, _number(environ, "MASTER_PORT")
    # steps of all jobs on a node get different ports, outside the ephemeral range
    job, step = _number(environ, "SLURM_JOB_ID", default=0), _number(environ, "SLURM_STEP_ID", default=0)
    return host, 15000 + (job * 31 + step) % 15000


def first_host(nodelist: str) -> str:
    """The first name of a Slurm host list: ``node[03-10,12],gpu1`` gives ``node03``; brackets may repeat."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist.strip())
    if match is None:
        raise FusedCommError(f"SLURM_STEP_NODELIST: expected a host list, got {nodelist!r}")
    return re.sub(r"\[([^\],\-]*)[^\]]*\]", r"\1", match.group(0))


def _is_srun_of_its_own(environ: Mapping[str, str]) -> bool:
    """Whether MPI's variables come from srun's plugin (pmi2, pmix), which sets them for every program.

    An mpirun that starts its daemons by srun shows the daemons' step: its size is not that of the MPI job. The answer
    follows from variables that are the same on all ranks.
    """
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ or "OMPI_COMM_WORLD_RANK" in environ:
        return False
    return _number(environ, "PMI_SIZE", default=_slurm_size(environ)) == _slurm_size(environ)


def _slurm_size(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS", default=_number(environ, "SLURM_NTASKS", default=1))


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise FusedCommError(f"{name}: expected a whole number, got {text!r}") from None


def _checked(launcher: str, rank: int, size: int, local_rank: int) -> RankFacts:
    if not 0 <= rank < size:
        raise FusedCommError(f"{launcher}: expected a rank between 0 and {size - 1}, got {rank}")
    return RankFacts(launcher, rank, size, local_rank)


def _mpi_world() -> Any:  # mpi4py's types would make it a dependency of the type check
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise FusedCommError("started by mpirun, but mpi4py is not installed: pip install 'fusedcomm[mpi]'") from error
    return MPI.COMM_WORLD


def _mpi_local_rank(comm: Any) -> int:
    from mpi4py import MPI

    local = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.Get_rank())
    rank = int(local.Get_rank())
    local.Free()
    return rank


def _mpi_store(facts: RankFacts, timeout: timedelta) -> Any:
    """A store on rank 0; MPI carries its address as fixed bytes: no variable is needed, and nothing is pickled."""
    comm = _mpi_world()
    address = struct.Struct("<I252s")
    data = bytearray(address.size)
    own_host = socket.gethostname().encode()
    hosts = bytearray(256 * facts.world_size)
    comm.Allgather(bytearray(own_host.ljust(256, b"\0")), hosts)
    one_host = all(hosts[i : i + 256].rstrip(b"\0") == own_host for i in range(0, len(hosts), 256))
    store: Any = None
    if facts.rank == 0:
        host = "127.0.0.1" if one_host else socket.getfqdn()
        try:
            store = TCPStore(host, 0, facts.world_size, is_master=True, timeout=timeout, wait_for_workers=False)
            address.pack_into(data, 0, store.port, host.encode())
        except RuntimeError as error:  # port 0: the others get the reason, and do not wait for an address
            address.pack_into(data, 0, 0, str(error).encode()[:252])
    comm.Bcast(data, root=0)
    port, host_bytes = address.unpack(data)
    host = host_bytes.rstrip(b"\0").decode(errors="replace")
    if port == 0:
        raise FusedCommError(f"rank 0 cannot open a store for the rendezvous: {host}")
    if store is not None:
        return store
    return TCPStore(host, port, facts.world_size, is_master=False, timeout=timeout)
