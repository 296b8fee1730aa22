"""The peers of the collectives: Gloo, MPI, and this library by stage and by algorithm.

Every peer of ``allreduce_rmsnorm_quant`` ends with the new residual, FP8 rows and their scales; the peers other than
ours do it with the lines of torch that a user would write. MPI has no bf16, so there the sum is of fp32; the
conversions are part of the fused operation and not of the bare all-reduce (in MPI's favour).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fusedcomm.cli.bench.cases import EPS, GROUP_SIZE, Inputs
from fusedcomm.cli.bench.job import ALGORITHMS, Job
from fusedcomm.cli.bench.registry import Peer, Registry
from fusedcomm.ops.types import AddRMSNormQuant

ALL_REDUCE = "all_reduce"
FUSED = "allreduce_rmsnorm_quant"
OPS = (ALL_REDUCE, FUSED)
OURS = "ours"

COLLECTIVES = Registry()


@COLLECTIVES.peer(ALL_REDUCE, "memcpy")
class Memcpy:
    """No all-reduce: every rank copies its rows, at the same time. The bound that memory sets."""

    def __init__(self, job: Job, inputs: Inputs) -> None:
        self.inputs, self.out = inputs, torch.empty_like(inputs.x)

    def reset(self, calls: int) -> None:
        self.out.fill_(torch.nan)

    def call(self, index: int) -> None:
        self.out.copy_(self.inputs.x)

    def check(self) -> None:
        return None


@COLLECTIVES.peer(ALL_REDUCE, "gloo")
class GlooAllReduce:
    """torch.distributed.all_reduce, in place as it is; so each call of a batch has rows of its own."""

    def __init__(self, job: Job, inputs: Inputs) -> None:
        self.inputs, self.rows = inputs, inputs.x.new_empty(0, *inputs.x.shape)

    def reset(self, calls: int) -> None:
        if len(self.rows) != calls:
            self.rows = self.inputs.x.new_empty(calls, *self.inputs.x.shape)
        self.rows.copy_(self.inputs.x)

    def call(self, index: int) -> None:
        dist.all_reduce(self.rows[index])

    def check(self) -> None:
        self.inputs.check_sum_close(self.rows[-1])


@COLLECTIVES.peer(FUSED, "gloo")
class GlooThenEager(GlooAllReduce):
    """The same, then eager add, norm and quantisation."""

    def reset(self, calls: int) -> None:
        super().reset(calls)
        self.result: Eager | None = None

    def call(self, index: int) -> None:
        dist.all_reduce(self.rows[index])
        self.result = eager_add_norm_quant(self.rows[index], self.inputs.residual, self.inputs.weight)

    def check(self) -> None:
        self.inputs.check_result_close(*_written(self.result))


@COLLECTIVES.peer(ALL_REDUCE, "mpi", needs_mpi=True)
class MPIAllReduce:
    """MPI_Allreduce of fp32, from one buffer to another."""

    def __init__(self, job: Job, inputs: Inputs) -> None:
        self.inputs, self.comm = inputs, job.mpi
        self.source = inputs.x.float()
        self.total = torch.empty_like(self.source)
        self.buffers = (self.source.numpy(), self.total.numpy())

    def reset(self, calls: int) -> None:
        self.total.fill_(torch.nan)

    def call(self, index: int) -> None:
        self.comm.Allreduce(*self.buffers)

    def check(self) -> None:
        self.inputs.check_sum_close(self.total)


@COLLECTIVES.peer(FUSED, "mpi", needs_mpi=True)
class MPIThenEager(MPIAllReduce):
    """The same from and to the rows' dtype, then eager add, norm and quantisation."""

    def reset(self, calls: int) -> None:
        super().reset(calls)
        self.result: Eager | None = None

    def call(self, index: int) -> None:
        self.source.copy_(self.inputs.x)
        self.comm.Allreduce(*self.buffers)
        total = self.total.to(self.inputs.x.dtype)
        self.result = eager_add_norm_quant(total, self.inputs.residual, self.inputs.weight)

    def check(self) -> None:
        self.inputs.check_result_close(*_written(self.result))


class OurAllReduce:
    """GroupCoordinator.all_reduce into a given result."""

    def __init__(self, job: Job, inputs: Inputs, stage: str = "fused", tuning: Mapping[str, int] | None = None) -> None:
        self.inputs, self.group = inputs, job.group_with(stage, tuning)
        self.out = torch.empty_like(inputs.x)
        self.is_exact = self.group.explain(ALL_REDUCE, inputs.x.shape, inputs.x.dtype).stage.value == "custom"

    def reset(self, calls: int) -> None:
        self.out.fill_(torch.nan)

    def call(self, index: int) -> None:
        self.group.all_reduce(self.inputs.x, out=self.out)

    def check(self) -> None:
        if self.is_exact:
            self.inputs.check_sum_equal(self.out)
        else:
            self.inputs.check_sum_close(self.out)


class OurFused:
    """GroupCoordinator.allreduce_rmsnorm_quant; its results are new tensors, as every engine gets them."""

    def __init__(self, job: Job, inputs: Inputs, stage: str = "fused", tuning: Mapping[str, int] | None = None) -> None:
        self.inputs, self.group = inputs, job.group_with(stage, tuning)
        self.is_exact = self.group.explain(FUSED, inputs.x.shape, inputs.x.dtype).stage.value != "process_group"

    def reset(self, calls: int) -> None:
        self.result: AddRMSNormQuant | None = None

    def call(self, index: int) -> None:
        inputs = self.inputs
        self.result = self.group.allreduce_rmsnorm_quant(
            inputs.x, inputs.residual, inputs.weight, EPS, group_size=GROUP_SIZE
        )

    def check(self) -> None:
        result = _written(self.result)
        if self.is_exact:
            self.inputs.check_result_equal(result)
        else:
            self.inputs.check_result_close(result.fp8, result.scale, result.residual)


Eager = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def eager_add_norm_quant(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Eager:
    """FP8 rows, scales and the new residual, by the lines of torch that a user would write."""
    residual = x + residual
    rows = residual.float()
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + EPS)
    groups = (rows * weight).to(x.dtype).float().unflatten(-1, (-1, GROUP_SIZE))
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / limit
    fp8 = (groups / scale).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return fp8.flatten(-2), scale.squeeze(-1), residual


def our_peers(ops: Sequence[str] = OPS, tunings: Sequence[Mapping[str, int]] = ()) -> list[Peer]:
    """This library as it is, by forced algorithm and stage, and with each of ``tunings`` in place of its own."""
    kinds: dict[str, Any] = {ALL_REDUCE: OurAllReduce, FUSED: OurFused}
    stages = {ALL_REDUCE: ("process_group",), FUSED: ("fused_norm", "custom", "process_group")}
    peers = []
    for op in ops:
        variants: list[tuple[str, str, Mapping[str, int]]] = [(OURS, "fused", {})]
        variants += [(f"{OURS}:{name}", "fused", tuning) for name, tuning in ALGORITHMS.items()]
        variants += [(f"{OURS}:{stage}", stage, {}) for stage in stages[op]]
        variants += [(f"{OURS}[{describe_tuning(tuning)}]", "fused", tuning) for tuning in tunings]
        for name, stage, tuning in variants:

            def prepare(
                job: Job, inputs: Inputs, kind: Any = kinds[op], stage: str = stage, tuning: Mapping[str, int] = tuning
            ) -> Any:
                return kind(job, inputs, stage, tuning)

            peers.append(Peer(op, name, prepare))
    return peers


def describe_tuning(tuning: Mapping[str, int]) -> str:
    return ",".join(f"{name}={value}" for name, value in tuning.items())


def _written(result: Any) -> Any:
    if result is None:
        raise ValueError("check: expected a call before it")
    return result
