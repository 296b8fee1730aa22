"""This library on GPUs: as it is, by forced algorithm, and by stage.

Results are written into given tensors, those of each set of inputs. ``call_new`` lets the library allocate them: what
that costs the host is measured beside.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch

import fusedcomm
from fusedcomm import platform
from fusedcomm.cli.bench.cases import EPS, GROUP_SIZE
from fusedcomm.cli.bench.gpu.harness import AbsentError, Case
from fusedcomm.cli.bench.gpu.job import GpuJob
from fusedcomm.cli.bench.gpu.ops import ALL_REDUCE, FUSED, NORM, OURS
from fusedcomm.cli.bench.gpu.shape import Shape, poison
from fusedcomm.cli.bench.job import ALGORITHMS

STAGES = {
    ALL_REDUCE: ("process_group",),
    NORM: ("custom", "process_group"),
    FUSED: ("fused_norm", "custom", "process_group"),
}
"""What can be forced beside the first stage of each operation."""


class _Ours(abc.ABC):
    op: str

    def __init__(self, group: fusedcomm.GroupCoordinator, shape: Shape, algorithm: str | None) -> None:
        self.group, self.shape, self.algorithm, self.last = group, shape, algorithm, 0
        self.stage = group.explain(self.op, shape.inputs[0].x.shape, shape.case.dtype).stage.value
        self.is_exact = self.stage != "process_group"
        if algorithm is not None and not self.is_exact:
            raise AbsentError(f"no {algorithm} form: {self.stage} serves")
        self.before = self._launches()

    @abc.abstractmethod
    def reset(self) -> None: ...

    @abc.abstractmethod
    def call(self, index: int) -> None: ...

    @abc.abstractmethod
    def call_new(self, index: int) -> None:
        """As call, into new tensors."""

    @abc.abstractmethod
    def check(self) -> None: ...

    def facts(self) -> Mapping[str, object]:
        """The stage, and which algorithm the calls since this was made took.

        Raises:
            AbsentError: it is not the one that was asked for (a message may be too large for one-shot).
        """
        taken = [name for name, count in self._launches().items() if count > self.before.get(name, 0)]
        if self.algorithm is not None and taken != [self.algorithm]:
            raise AbsentError(f"took {' and '.join(taken) or 'neither algorithm'}, not {self.algorithm}")
        return {"stage": self.stage, "algorithm": taken[0] if len(taken) == 1 else None}

    def _launches(self) -> dict[str, int]:
        prefix = "algorithm."
        return {k.removeprefix(prefix): n for k, n in self.group.stats().items() if k.startswith(prefix)}


class OurAllReduce(_Ours):
    """GroupCoordinator.all_reduce."""

    op = ALL_REDUCE

    def __init__(self, group: fusedcomm.GroupCoordinator, shape: Shape, algorithm: str | None) -> None:
        super().__init__(group, shape, algorithm)
        self.outs = shape.outputs()

    def reset(self) -> None:
        poison(*self.outs)

    def call(self, index: int) -> None:
        self.last = index % len(self.outs)
        self.group.all_reduce(self.shape.at(index).x, out=self.outs[self.last])

    def call_new(self, index: int) -> None:
        self.group.all_reduce(self.shape.at(index).x)

    def check(self) -> None:
        own = self.shape.at(self.last)
        (own.check_sum_equal if self.is_exact else own.check_sum_close)(self.outs[self.last])


class OurNorm(_Ours):
    """GroupCoordinator.allreduce_rmsnorm."""

    op = NORM

    def __init__(self, group: fusedcomm.GroupCoordinator, shape: Shape, algorithm: str | None) -> None:
        super().__init__(group, shape, algorithm)
        self.outs = [fusedcomm.AddRMSNorm(*pair) for pair in zip(shape.outputs(), shape.outputs(), strict=True)]

    def reset(self) -> None:
        for out in self.outs:
            poison(*out)

    def call(self, index: int) -> None:
        own, self.last = self.shape.at(index), index % len(self.outs)
        self.group.allreduce_rmsnorm(own.x, own.residual, own.weight, EPS, out=self.outs[self.last])

    def call_new(self, index: int) -> None:
        own = self.shape.at(index)
        self.group.allreduce_rmsnorm(own.x, own.residual, own.weight, EPS)

    def check(self) -> None:
        own = self.shape.at(self.last)
        (own.check_norm_equal if self.is_exact else own.check_norm_close)(*self.outs[self.last])


class OurFused(_Ours):
    """GroupCoordinator.allreduce_rmsnorm_quant."""

    op = FUSED

    def __init__(self, group: fusedcomm.GroupCoordinator, shape: Shape, algorithm: str | None) -> None:
        super().__init__(group, shape, algorithm)
        self.outs = [self._out(x) for x in shape.outputs()]

    def _out(self, residual: torch.Tensor) -> fusedcomm.AddRMSNormQuant:
        fp8 = torch.empty_like(residual, dtype=platform.fp8_dtype(residual.device))
        scale = residual.new_empty((*residual.shape[:-1], residual.shape[-1] // GROUP_SIZE), dtype=torch.float32)
        return fusedcomm.AddRMSNormQuant(fp8, scale, residual, None, fusedcomm.ScaleLayout.ROW_MAJOR)

    def reset(self) -> None:
        for out in self.outs:
            poison(out.fp8, out.scale, out.residual)

    def call(self, index: int) -> None:
        own, self.last = self.shape.at(index), index % len(self.outs)
        self.group.allreduce_rmsnorm_quant(
            own.x, own.residual, own.weight, EPS, group_size=GROUP_SIZE, out=self.outs[self.last]
        )

    def call_new(self, index: int) -> None:
        own = self.shape.at(index)
        self.group.allreduce_rmsnorm_quant(own.x, own.residual, own.weight, EPS, group_size=GROUP_SIZE)

    def check(self) -> None:
        own, result = self.shape.at(self.last), self.outs[self.last]
        if self.is_exact:
            own.check_result_equal(result)
        else:
            own.check_result_close(result.fp8, result.scale, result.residual)


KINDS: dict[str, type[_Ours]] = {ALL_REDUCE: OurAllReduce, NORM: OurNorm, FUSED: OurFused}


def variants(op: str) -> list[tuple[str, str, str | None]]:
    """Name, stage and algorithm (None: the library's choice) of each form of an operation."""
    found: list[tuple[str, str, str | None]] = [(OURS, "fused", None)]
    found += [(f"{OURS}:{name}", "fused", name) for name in ALGORITHMS]
    found += [(f"{OURS}:{stage}", stage, None) for stage in STAGES[op]]
    return found


def make_case(job: GpuJob, op: str, stage: str, algorithm: str | None, shape: Shape) -> Case:
    """A case of one form; making it may make a group, which all ranks do together."""
    group = job.group_with(stage, None if algorithm is None else ALGORITHMS[algorithm])
    return KINDS[op](group, shape, algorithm)


def make_tuned_case(job: GpuJob, op: str, tuning: Mapping[str, int], shape: Shape) -> Case:
    """The library as it is but for ``tuning``."""
    return KINDS[op](job.group_with("fused", tuning), shape, None)
