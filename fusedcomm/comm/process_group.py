"""The last stage: collectives of torch.distributed, and bytes over the control group."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, distributed_c10d  # type: ignore[attr-defined]  # public, not in __all__

from fusedcomm.errors import GroupBrokenError, PeerDiedError, PeerTimeoutError

_ABORT_S = 5.0


def rendezvous(ranks: Sequence[int]) -> Store:
    """A store that these global ranks share, and nobody else, for one creation of their group.

    ``dist.new_group`` derives its prefix from how many groups a process has made, so a group made again, or by ranks
    with different histories, reads the addresses of another one and hangs.
    """
    store = distributed_c10d._get_default_store()
    members = "-".join(str(r) for r in ranks)
    # The n-th arrival of a member belongs to creation n // size: nobody arrives twice before all have arrived once.
    creation = (store.add(f"fusedcomm/{members}/arrivals", 1) - 1) // len(ranks)
    return distributed_c10d.PrefixStore(f"fusedcomm/{members}/{creation}", store)


def create_gloo(store: Store, name: str, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroup:
    """A Gloo group; ``rank`` is this one's place in it. Returns when all ranks are there."""
    store = distributed_c10d.PrefixStore(name, store)
    group = dist.ProcessGroup(store, rank, world_size)
    gloo = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=timeout_s))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group


def create_nccl(
    store: Store, name: str, ranks: Sequence[int], rank: int, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """An NCCL (RCCL) group of these global ranks, bound to ``device``; its first collective connects the ranks.

    NCCL runs behind the host's back: torch's watchdog thread sees its failures and deadlines, and ends the process.
    """
    store = distributed_c10d.PrefixStore(name, store)
    group = dist.ProcessGroup(store, rank, len(ranks))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.global_ranks_in_group = list(ranks)
    options.group_name = distributed_c10d.GroupName(f"fusedcomm-{'-'.join(str(r) for r in ranks)}")
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    group.bound_device_id = device  # before the backend is registered, which takes it over
    nccl = dist.ProcessGroupNCCL(store, rank, len(ranks), options)
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
    return group


def has_nccl() -> bool:
    """Whether this torch was built with NCCL (or RCCL)."""
    return dist.is_nccl_available() and hasattr(dist, "ProcessGroupNCCL")


def close(group: dist.ProcessGroup, device: torch.device, *, is_healthy: bool) -> None:
    """Frees what an NCCL group holds; Gloo's destructor needs no help. Not collective.

    Where the group ``is_healthy``, what was begun on the device is finished first.
    """
    if not _is_nccl(group):
        return
    if is_healthy:
        with contextlib.suppress(RuntimeError):  # of a kernel that ran before; the next use of the device raises it too
            torch.cuda.synchronize(device)
    # shutdown() would wait for peers, which may be gone or still busy. abort() waits as well: NCCL keeps a communicator
    # until the last captured graph that holds its kernels is gone, and that may be after this call.
    thread = threading.Thread(target=group.abort, name="fusedcomm-nccl-abort", daemon=True)
    thread.start()
    thread.join(_ABORT_S)
    if thread.is_alive():
        warnings.warn(
            f"NCCL has not let its communicator go within {_ABORT_S:g} s (a captured graph still holds its kernels?); "
            "it goes on in the background",
            RuntimeWarning,
            stacklevel=3,
        )


def abandon(group: dist.ProcessGroup) -> None:
    """After ``fork``, in the child: never destroy the group; its destructor joins threads that exist in the parent."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def all_reduce(x: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup, *, deterministic: bool) -> None:
    """Sum over ranks of x into out. ``deterministic``: in fp32 and rank order, as the custom kernels add."""
    if not deterministic:
        with _staged(group, x, out) as (own, result), _translated_errors():
            result.copy_(own)
            group.allreduce([result]).wait()
        return
    parts = x.new_empty(group.size(), *x.shape)
    all_gather(x, parts, group)
    total = torch.zeros_like(x, dtype=torch.float32)
    for part in parts:
        total += part
    out.copy_(total)


def all_gather(x: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup) -> None:
    """x of every rank into out ``[world_size, ...]``, both contiguous and of any dtype."""
    with _staged(group, x, out) as (own, parts), _translated_errors():
        if own.is_cuda:
            group._allgather_base(_bytes(parts), _bytes(own)).wait()
        else:
            group.allgather([[_bytes(part) for part in parts]], [_bytes(own)]).wait()


def reduce_scatter(
    x: torch.Tensor, out: torch.Tensor, rank: int, group: dist.ProcessGroup, *, deterministic: bool
) -> None:
    """Part ``rank`` of the sum over ranks of x ``[world_size, ...]`` into out."""
    if not deterministic and _is_nccl(group):
        with _translated_errors():
            group._reduce_scatter_base(out, x, dist.ReduceScatterOptions()).wait()
        return
    total = torch.empty_like(x)
    all_reduce(x, total, group, deterministic=deterministic)  # Gloo has no reduce-scatter for every dtype
    out.copy_(total[rank])


def broadcast(x: torch.Tensor, src: int, group: dist.ProcessGroup) -> None:
    """x of group rank ``src`` into x of the others, contiguous and of any dtype."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = src, 0
    with _staged(group, x, x) as (_, data), _translated_errors():
        group.broadcast([_bytes(data)], options).wait()


def barrier(group: dist.ProcessGroup) -> None:
    """Returns when all ranks have called it."""
    with _translated_errors():
        group.barrier().wait()


def _is_nccl(group: dist.ProcessGroup) -> bool:
    return group.bound_device_id is not None


@contextlib.contextmanager
def _staged(
    group: dist.ProcessGroup, x: torch.Tensor, out: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """x and out where the group's backend can work on them: Gloo's stay in host memory, and are copied there and back.

    (Gloo itself takes device tensors for some operations and dtypes only.)
    """
    if not x.is_cuda or _is_nccl(group):
        yield x, out
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a collective of Gloo waits for the device: it cannot be captured in a graph")
    own = x.cpu()
    result = own if out is x else torch.empty_like(out, device="cpu")
    yield own, result
    out.copy_(result)


def exchange_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """The bytes of every rank, in rank order; all pass the same length."""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = own.new_empty(group.size(), len(data))
    all_gather(own, parts, group)
    return [part.numpy().tobytes() for part in parts]


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor: what is only moved needs no dtype, and Gloo does not know them all."""
    return x.view(-1).view(torch.uint8)


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    """RuntimeErrors of Gloo and NCCL as this library's: whatever went wrong, the ranks are no longer in step."""
    try:
        yield
    except RuntimeError as error:
        # "[/path/of/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:63172. This is typically caused by …"
        text = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        kind: type[GroupBrokenError] = GroupBrokenError
        if re.search(r"time(d )?out", text, re.IGNORECASE):
            kind = PeerTimeoutError
        elif re.search(r"connection|peer|pipe|remote process exited", text, re.IGNORECASE):
            kind = PeerDiedError
        raise kind(f"the process group failed: {text}") from error
