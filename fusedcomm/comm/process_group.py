"""The last stage: collectives of torch.distributed, and bytes over the control group."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fusedcomm.errors import GroupBrokenError, PeerDiedError, PeerTimeoutError


def create(ranks: Sequence[int], rank: int, timeout_s: float) -> dist.ProcessGroup:
    """A Gloo group of these global ranks; only they take part, ``rank`` is this one's place among them.

    Built over a store prefix of its own. ``dist.new_group`` derives the prefix from how many groups a process has made,
    so a group made again, or by ranks with different histories, reads the addresses of another one and hangs.
    """
    store = distributed_c10d._get_default_store()
    members = "-".join(str(r) for r in ranks)
    # The n-th arrival of a member belongs to creation n // size: nobody arrives twice before all have arrived once.
    creation = (store.add(f"fusedcomm/{members}/arrivals", 1) - 1) // len(ranks)
    store = distributed_c10d.PrefixStore(f"fusedcomm/{members}/{creation}", store)
    group = dist.ProcessGroup(store, rank, len(ranks))
    gloo = dist.ProcessGroupGloo(store, rank, len(ranks), timedelta(seconds=timeout_s))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group


def abandon(group: dist.ProcessGroup) -> None:
    """After ``fork``, in the child: never destroy the group; its destructor joins threads that exist in the parent."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def all_reduce(x: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup, *, deterministic: bool) -> None:
    """Sum over ranks of x into out. ``deterministic``: in fp32 and rank order, as the custom kernels add."""
    if not deterministic:
        out.copy_(x)
        with _translated_errors():
            group.allreduce([out]).wait()
        return
    parts = x.new_empty(group.size(), *x.shape)
    all_gather(x, parts, group)
    total = torch.zeros_like(x, dtype=torch.float32)
    for part in parts:
        total += part
    out.copy_(total)


def all_gather(x: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup) -> None:
    """x of every rank into out ``[world_size, ...]``, both contiguous and of any dtype."""
    with _translated_errors():
        group.allgather([[_bytes(part) for part in out]], [_bytes(x)]).wait()


def reduce_scatter(
    x: torch.Tensor, out: torch.Tensor, rank: int, group: dist.ProcessGroup, *, deterministic: bool
) -> None:
    """Part ``rank`` of the sum over ranks of x ``[world_size, ...]`` into out."""
    total = torch.empty_like(x)
    all_reduce(x, total, group, deterministic=deterministic)  # Gloo has no reduce-scatter for every dtype
    out.copy_(total[rank])


def broadcast(x: torch.Tensor, src: int, group: dist.ProcessGroup) -> None:
    """x of group rank ``src`` into x of the others, contiguous and of any dtype."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = src, 0
    with _translated_errors():
        group.broadcast([_bytes(x)], options).wait()


def barrier(group: dist.ProcessGroup) -> None:
    """Returns when all ranks have called it."""
    with _translated_errors():
        group.barrier().wait()


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
    """Gloo's RuntimeErrors as those of this library: whatever went wrong, the ranks are no longer in step."""
    try:
        yield
    except RuntimeError as error:
        # "[/path/of/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:63172. This is typically caused by …"
        text = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        kind: type[GroupBrokenError] = GroupBrokenError
        if re.search(r"time(d )?out", text, re.IGNORECASE):
            kind = PeerTimeoutError
        elif re.search(r"connection|peer|pipe", text, re.IGNORECASE):
            kind = PeerDiedError
        raise kind(f"the process group failed: {text}") from error
