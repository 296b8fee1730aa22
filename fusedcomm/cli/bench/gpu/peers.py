"""The peers that come with torch: NCCL, with eager or compiled steps behind it, and symmetric memory.

NCCL's sum is in place in torch's interface, and so is the two-shot sum of symmetric memory; there each call of a graph
has rows of its own. The peers of symmetric memory are given their inputs in it, which spares them the copy that most
users would need.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fusedcomm.cli.bench.collectives import Eager, eager_add_norm_quant
from fusedcomm.cli.bench.gpu.compiling import compiled
from fusedcomm.cli.bench.gpu.harness import AbsentError, Case
from fusedcomm.cli.bench.gpu.job import GpuJob
from fusedcomm.cli.bench.gpu.shape import Shape, poison


class Copy:
    """No all-reduce: every rank copies its rows. What memory and the launch of a graph cost."""

    def __init__(self, job: GpuJob, shape: Shape) -> None:
        self.shape, self.outs = shape, shape.outputs()

    def reset(self) -> None:
        poison(*self.outs)

    def call(self, index: int) -> None:
        self.outs[index % len(self.outs)].copy_(self.shape.at(index).x)

    def check(self) -> None:
        return None

    def facts(self) -> Mapping[str, object]:
        return {}


class _InPlace(abc.ABC):
    """Sums rows in place; each call has rows of its own, restored before each graph."""

    def __init__(self, shape: Shape, rows: torch.Tensor) -> None:
        self.shape, self.rows = shape, rows
        self.eager_calls = 0

    def reset(self) -> None:
        self.eager_calls = 0
        for index, row in enumerate(self.rows):
            row.copy_(self.shape.at(index).x)

    @abc.abstractmethod
    def sum(self, row: torch.Tensor) -> None:
        """Queues the sum of one call's rows."""

    def call(self, index: int) -> None:
        self.eager_calls += 1
        self.sum(self.rows[index])

    def check(self) -> None:
        # a replayed graph sums all rows, and passes no call
        for index in range(self.eager_calls or len(self.rows)):
            self.shape.at(index).check_sum_close(self.rows[index])

    def facts(self) -> Mapping[str, object]:
        return {}


class Nccl(_InPlace):
    """torch.distributed.all_reduce."""

    def __init__(self, job: GpuJob, shape: Shape) -> None:
        self.group = job.nccl
        x = shape.inputs[0].x
        super().__init__(shape, x.new_empty(shape.calls, *x.shape))

    def sum(self, row: torch.Tensor) -> None:
        dist.all_reduce(row, group=self.group)


class NcclThenEager(Nccl):
    """The same, then the addition, norm and quantisation that a user would write."""

    def __init__(self, job: GpuJob, shape: Shape) -> None:
        super().__init__(job, shape)
        self.tail: Callable[..., Eager] = eager_add_norm_quant
        self.last = 0
        self.result: Eager | None = None

    def reset(self) -> None:
        super().reset()
        if self.result is not None:  # of the last call, which a replayed graph writes again
            poison(*self.result)

    def call(self, index: int) -> None:
        super().call(index)
        own = self.shape.at(index)
        self.result = self.tail(self.rows[index], own.residual, own.weight)
        self.last = index

    def check(self) -> None:
        super().check()
        if self.result is None:
            raise ValueError("check: expected a call before it")
        self.shape.at(self.last).check_result_close(*self.result)


class NcclThenCompiled(NcclThenEager):
    """The same through torch.compile, for this shape alone (no dynamic sizes), in its default mode."""

    def __init__(self, job: GpuJob, shape: Shape) -> None:
        super().__init__(job, shape)
        self.tail = compiled_tail()


def compiled_tail() -> Callable[..., Eager]:
    """eager_add_norm_quant through torch.compile."""
    return compiled(eager_add_norm_quant)


class SymmetricMemory:
    """One allocation in symmetric memory for the whole run; cases take views of it."""

    def __init__(self, job: GpuJob, dtype: torch.dtype, elements: int) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        self.group_name = job.nccl.group_name
        self.buffer = symm_mem.empty(elements, dtype=dtype, device=job.device.device)
        symm_mem.rendezvous(self.buffer, self.group_name)

    def rows(self, count: int, shape: Shape) -> torch.Tensor:
        size = shape.case.tokens * shape.case.hidden
        if count * size > self.buffer.numel():
            raise AbsentError(f"{count} times {size} elements do not fit the allocation")
        return self.buffer[: count * size].view(count, shape.case.tokens, shape.case.hidden)


class SymmOneShot:
    """torch.ops.symm_mem.one_shot_all_reduce_out: every rank reads all inputs."""

    def __init__(self, memory: SymmetricMemory, shape: Shape) -> None:
        self.shape, self.group_name = shape, memory.group_name
        self.rows, self.outs = memory.rows(len(shape.inputs), shape), shape.outputs()
        self.last = 0

    def reset(self) -> None:
        for row, own in zip(self.rows, self.shape.inputs, strict=True):
            row.copy_(own.x)
        poison(*self.outs)

    def call(self, index: int) -> None:
        self.last = index % len(self.outs)
        torch.ops.symm_mem.one_shot_all_reduce_out(self.rows[self.last], "sum", self.group_name, self.outs[self.last])

    def check(self) -> None:
        self.shape.at(self.last).check_sum_close(self.outs[self.last])

    def facts(self) -> Mapping[str, object]:
        return {}


class SymmTwoShot(_InPlace):
    """torch.ops.symm_mem.two_shot_all_reduce_: every rank sums its part, and writes it to all."""

    def __init__(self, memory: SymmetricMemory, shape: Shape) -> None:
        self.group_name = memory.group_name
        super().__init__(shape, memory.rows(shape.calls, shape))

    def sum(self, row: torch.Tensor) -> None:
        torch.ops.symm_mem.two_shot_all_reduce_(row, "sum", self.group_name)


class SymmetricMemoryPeers:
    """Makes the allocation when the first case asks for it."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._memory: SymmetricMemory | None = None

    def case(self, kind: Any, job: GpuJob, shape: Shape) -> Case:
        if self._memory is None:
            self._memory = SymmetricMemory(job, shape.case.dtype, self.elements)
        made: Case = kind(self._memory, shape)
        return made
