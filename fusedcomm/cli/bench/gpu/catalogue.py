"""Which peers of each operation there are on GPUs, in the order of the report."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fusedcomm.cli.bench.collectives import describe_tuning
from fusedcomm.cli.bench.gpu import flashinfer, ours, peers
from fusedcomm.cli.bench.gpu.harness import Case
from fusedcomm.cli.bench.gpu.job import GpuJob
from fusedcomm.cli.bench.gpu.ops import ALL_REDUCE, FUSED, NORM, OURS
from fusedcomm.cli.bench.gpu.shape import Limits, Shape
from fusedcomm.cli.bench.gpu.spec import Spec

Make = Callable[[Shape], Case]


class Catalogue:
    """The peers of one run and what they keep for all shapes; ``close`` frees it."""

    def __init__(self, job: GpuJob, spec: Spec, limits: Limits, symmetric_elements: int) -> None:
        self.flashinfer = flashinfer.FlashInfer(job, limits)
        symmetric = peers.SymmetricMemoryPeers(symmetric_elements)
        makers: dict[str, list[tuple[str, Make]]] = {ALL_REDUCE: [], NORM: [], FUSED: []}
        bare, norm, fused = makers[ALL_REDUCE], makers[NORM], makers[FUSED]
        bare += [
            ("copy", functools.partial(peers.Copy, job)),
            ("nccl", functools.partial(peers.Nccl, job)),
            ("symm_mem:one_shot", functools.partial(symmetric.case, peers.SymmOneShot, job)),
            ("symm_mem:two_shot", functools.partial(symmetric.case, peers.SymmTwoShot, job)),
        ]
        fused += [
            ("nccl+eager", functools.partial(peers.NcclThenEager, job)),
            ("nccl+compile", functools.partial(peers.NcclThenCompiled, job)),
        ]
        for own, kind in ((bare, flashinfer.FlashInferAllReduce), (norm, flashinfer.FlashInferNorm)):
            own += [
                (v.name, functools.partial(flashinfer.make_case, self.flashinfer, kind, v)) for v in flashinfer.VARIANTS
            ]
        for op, own in makers.items():
            own += [
                (name, functools.partial(ours.make_case, job, op, stage, algorithm))
                for name, stage, algorithm in ours.variants(op)
            ]
            own += [
                (f"{OURS}[{describe_tuning(tuning)}]", functools.partial(ours.make_tuned_case, job, op, tuning))
                for tuning in spec.tunings
            ]
        self._makers = {
            op: [(name, make) for name, make in makers[op] if spec.wants(op, name)] for op in makers if op in spec.ops
        }

    def names(self, op: str) -> list[str]:
        return [name for name, _ in self._makers.get(op, [])]

    def prepare_kinds(self, ops: list[str], shape: Shape) -> list[tuple[str, str, Callable[[], Case]]]:
        """What harness.prepare takes, for these operations on one shape."""
        return [(op, name, functools.partial(make, shape)) for op in ops for name, make in self._makers.get(op, [])]

    @property
    def wants_flashinfer(self) -> bool:
        return any(name.startswith("flashinfer") for own in self._makers.values() for name, _ in own)

    @property
    def wants_compile(self) -> bool:
        return "nccl+compile" in self.names(FUSED)

    def close(self) -> None:
        self.flashinfer.close()
