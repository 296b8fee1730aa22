"""The last stage: collectives of torch.distributed, and bytes over the control group."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce(x: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup, *, deterministic: bool) -> None:
    """Sum over ranks of x into out. ``deterministic``: in fp32 and rank order, as the custom kernels add."""
    if not deterministic:
        out.copy_(x)
        dist.all_reduce(out, group=group)
        return
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    total = torch.zeros_like(x, dtype=torch.float32)
    for part in parts:
        total += part
    out.copy_(total)


def all_gather(x: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup) -> None:
    """x of every rank into out ``[world_size, ...]``."""
    dist.all_gather(list(out.unbind(0)), x, group=group)


def reduce_scatter(
    x: torch.Tensor, out: torch.Tensor, rank: int, group: dist.ProcessGroup, *, deterministic: bool
) -> None:
    """Part ``rank`` of the sum over ranks of x ``[world_size, ...]`` into out."""
    total = torch.empty_like(x)
    all_reduce(x, total, group, deterministic=deterministic)  # Gloo has no reduce-scatter for every dtype
    out.copy_(total[rank])


def broadcast(x: torch.Tensor, src: int, group: dist.ProcessGroup) -> None:
    """x of group rank ``src`` into x of the others."""
    dist.broadcast(x, group=group, group_src=src)


def barrier(group: dist.ProcessGroup) -> None:
    """Returns when all ranks have called it."""
    dist.barrier(group=group)


def exchange_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """The bytes of every rank, in rank order; all pass the same length."""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    return [part.numpy().tobytes() for part in parts]
