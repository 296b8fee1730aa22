"""What the device does at best: copies of a call's bytes, a large copy, a large product of matrices."""

from __future__ import annotations

import torch

from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.single.workload import Calls, Peer, Place, Results, Workload

MACHINE = "machine"
COPY = "copy"
MATMUL = "matmul"


class CopySet:
    """Bytes, and where they are copied to."""

    def __init__(self, num_bytes: int, place: Place, seed: int) -> None:
        generator = place.generator(seed)
        self.source = torch.randint(0, 128, (num_bytes,), dtype=torch.uint8, device=place.device, generator=generator)
        self.target = torch.empty_like(self.source)


def copy_peer(place: Place, moved_bytes: int) -> Peer:
    """``copy_`` of half as many bytes as a call moves, from one place of memory to another: they are read and written.

    What a call takes that does nothing but to move its bytes, the launch included.
    """

    def make() -> Calls[CopySet]:
        sets = place.make_sets(lambda seed: CopySet(max(moved_bytes // 2, 1), place, seed))
        return Calls(sets, _copy, _check_copy)

    return Peer(COPY, make)


def _copy(own: CopySet) -> Results:
    own.target.copy_(own.source)
    return (own.target,)


def _check_copy(own: CopySet, results: Results) -> None:
    if not torch.equal(own.target, own.source):
        raise WrongResultError("copy: differs from its source")


class MatmulSet:
    """Two square matrices, bf16, and their product."""

    def __init__(self, size: int, place: Place, seed: int) -> None:
        self.a, self.b = (place.normal((size, size), seed + i) for i in (0, 1))
        self.out = torch.empty_like(self.a)


def machine_workloads(device: str, *, tiny: bool, with_product: bool) -> list[Workload]:
    """A copy of 1 GiB (256 MiB on a CPU); with ``with_product`` also a product of 8192 x 8192 bf16 matrices."""
    copied, size = (1 << 28 if device == "cpu" else 1 << 30), 8192
    if tiny:
        copied, size = 1 << 16, 64

    def matmul_peers(place: Place) -> list[Peer]:
        return [Peer(MATMUL, lambda: Calls(place.make_sets(lambda s: MatmulSet(size, place, s)), _matmul, _check))]

    copy = Workload(MACHINE, COPY, {"bytes": copied}, lambda place: [copy_peer(place, 2 * copied)], 2 * copied)
    product = Workload(MACHINE, MATMUL, {"size": size}, matmul_peers, 3 * 2 * size * size, 2 * size**3)
    return [copy, product] if with_product else [copy]


def _matmul(own: MatmulSet) -> Results:
    torch.mm(own.a, own.b, out=own.out)
    return (own.out,)


def _check(own: MatmulSet, results: Results) -> None:
    rows = own.a[:4].float() @ own.b.float()
    # standard normal factors: the products of a sum of n have a root mean square of sqrt(n)
    if not bool(((own.out[:4].float() - rows).abs() <= 0.05 * own.a.shape[0] ** 0.5).all()):
        raise WrongResultError("matmul: off")
