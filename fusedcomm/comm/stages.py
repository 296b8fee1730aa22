"""The collectives of a group: each call takes the fastest stage that its plan allows.

The hot path makes no checks in Python: the first call with a shape is checked here, and the native operators check
every call before anything is sent. If one refuses, the full checks run again to say what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fusedcomm.comm import process_group
from fusedcomm.comm.custom import CustomAllReduce
from fusedcomm.comm.guard import CallGuard
from fusedcomm.comm.local import LocalOps
from fusedcomm.comm.plan import Facts, Plan, Stage, choose_plan
from fusedcomm.env import Settings
from fusedcomm.ops.checks import check_cpu, check_group_size, check_norm, check_out, check_x
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

_MAX_CACHED_PLANS = 1024


class StagedCollectives:
    """Runs collectives for one group; tensors are checked here, the group's life is its owner's business.

    Args:
        guard: entered around every call.
        custom: the custom all-reduce, or None where no rank has it.
        group: the process group, or None at world size 1.
        local: what computes the local part of the staged paths.
        facts: those of every call of this group; op, shape and dtype are filled in.
    """

    def __init__(
        self,
        guard: CallGuard,
        custom: CustomAllReduce | None,
        group: dist.ProcessGroup | None,
        local: LocalOps,
        facts: Callable[..., Facts],
        settings: Settings,
        rank: int,
        world_size: int,
    ) -> None:
        self._guard = guard
        self._custom = custom
        self._group = group
        self._local = local
        self._facts = facts
        self._deterministic = settings.deterministic
        self._moves = None if settings.disable_custom_ar else custom
        self._rank = rank
        self._world_size = world_size
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self.stats: Counter[str] = Counter()

    def plan(self, op: str, shape: torch.Size, dtype: torch.dtype, group_size: int = 0) -> Plan:
        """The plan of a call, cached."""
        key = (op, shape, dtype, group_size)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_CACHED_PLANS:
                self._plans.clear()
            hidden = shape[-1]
            tokens = shape.numel() // hidden if hidden else 0
            plan = self._plans[key] = choose_plan(
                self._facts(op=op, num_tokens=tokens, hidden_size=hidden, dtype=dtype, group_size=group_size)
            )
        return plan

    # ---- sums ----

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """See GroupCoordinator.all_reduce."""
        check_x(x)
        check_cpu(x)
        if out is not None:
            check_out(out, x, "out")
        plan = self.plan("all_reduce", x.shape, x.dtype)
        self._guard.begin("all_reduce", x)
        try:
            self.stats[plan.counter] += 1
            return self._sum(plan.stage, x, out)
        except BaseException as error:
            self._guard.failed(error)
            raise
        finally:
            self._guard.end()

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        fused_only: bool,
    ) -> AddRMSNorm | None:
        """See GroupCoordinator.allreduce_rmsnorm; None if ``fused_only`` and the fused stage is not eligible."""
        plan = self._plans.get(("allreduce_rmsnorm", getattr(x, "shape", None), getattr(x, "dtype", None), 0))
        if plan is None or plan.stage is not Stage.FUSED_NORM:
            self._check_norm(x, residual, weight, eps, weight_bias)
            plan = self.plan("allreduce_rmsnorm", x.shape, x.dtype)
            if fused_only and plan.stage is not Stage.FUSED_NORM:
                return None
        self._guard.begin("allreduce_rmsnorm", x)
        try:
            self.stats[plan.counter] += 1
            if plan.stage is Stage.FUSED_NORM:
                return self._fused_norm(x, residual, weight, eps, weight_bias)
            total = self._sum(plan.stage, x)
            return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias)
        except BaseException as error:
            self._guard.failed(error)
            self._check_norm(x, residual, weight, eps, weight_bias)
            raise
        finally:
            self._guard.end()

    def allreduce_rmsnorm_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_bf16: bool,
        scale_layout: ScaleLayout,
        fused_only: bool,
    ) -> AddRMSNormQuant | None:
        """See GroupCoordinator.allreduce_rmsnorm_quant; None if ``fused_only`` and stage 1 is not eligible."""
        op = "allreduce_rmsnorm_quant"
        plan = self._plans.get((op, getattr(x, "shape", None), getattr(x, "dtype", None), group_size))
        if plan is None or plan.stage is not Stage.FUSED:
            self._check_norm(x, residual, weight, eps, weight_bias)
            check_group_size(x.shape[-1], group_size)
            plan = self.plan(op, x.shape, x.dtype, group_size)
            if fused_only and plan.stage is not Stage.FUSED:
                return None
        self._guard.begin(op, x, group_size)
        try:
            self.stats[plan.counter] += 1
            if plan.stage is Stage.FUSED:
                return self._fused_quant(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout)
            if plan.stage is Stage.FUSED_NORM:
                norm, residual_out = self._fused_norm(x, residual, weight, eps, weight_bias)
                fp8, scale, _ = self._local.per_group_quant_fp8(norm, group_size=group_size, scale_layout=scale_layout)
                return AddRMSNormQuant(fp8, scale, residual_out, norm if emit_bf16 else None, scale_layout)
            return self._local.fused_add_rms_norm_quant(
                self._sum(plan.stage, x),
                residual,
                weight,
                eps,
                group_size=group_size,
                emit_bf16=emit_bf16,
                scale_layout=scale_layout,
                weight_bias=weight_bias,
            )
        except BaseException as error:
            self._guard.failed(error)
            self._check_norm(x, residual, weight, eps, weight_bias)
            raise
        finally:
            self._guard.end()

    def _check_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: float
    ) -> None:
        check_norm(x, residual, weight, eps, weight_bias)
        check_cpu(x)

    def _sum(self, stage: Stage, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        x = x.contiguous()
        if self._custom is not None and stage is not Stage.PROCESS_GROUP:
            return self._custom.all_reduce(x, out)
        out = torch.empty_like(x) if out is None else out
        if self._group is None:
            return torch.add(x, 0.0, out=out)  # a sum of one starts from +0 as well: -0 becomes +0
        process_group.all_reduce(x, out, self._group, deterministic=self._deterministic)
        return out

    def _fused_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
    ) -> AddRMSNorm:
        if self._custom is None:  # one rank
            total = self._sum(Stage.FUSED_NORM, x)
            return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias)
        residual = None if residual is None else residual.contiguous()
        return self._custom.allreduce_rmsnorm(x.contiguous(), residual, weight.contiguous(), eps, weight_bias)

    def _fused_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_bf16: bool,
        scale_layout: ScaleLayout,
    ) -> AddRMSNormQuant:
        if self._custom is None:  # one rank
            return self._local.fused_add_rms_norm_quant(
                self._sum(Stage.FUSED, x),
                residual,
                weight,
                eps,
                group_size=group_size,
                emit_bf16=emit_bf16,
                scale_layout=scale_layout,
                weight_bias=weight_bias,
            )
        residual = None if residual is None else residual.contiguous()
        return self._custom.allreduce_rmsnorm_quant(
            x.contiguous(), residual, weight.contiguous(), eps, weight_bias, group_size, emit_bf16, scale_layout
        )

    # ---- data that moves as it is ----

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See GroupCoordinator.all_gather."""
        dim = _check_dim(x, dim)
        x = x.contiguous()
        out = x.new_empty(self._world_size, *x.shape)
        if self._group is None:
            self._run("all_gather", x, None, lambda: out[0].copy_(x))
        elif self._moves is not None:
            self._run("all_gather", x, None, self._moves.all_gather, x, out)
        else:
            self._run("all_gather", x, None, process_group.all_gather, x, out, self._group)
        # [W, a, n, b] -> [a, W * n, b]; along dim 0 this is a view
        return out.movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """See GroupCoordinator.reduce_scatter."""
        check_x(x)
        dim = _check_dim(x, dim)
        if x.shape[dim] % self._world_size:
            raise ValueError(f"x: expected a size along dim {dim} divisible by {self._world_size}, got {x.shape[dim]}")
        parts = x.unflatten(dim, (self._world_size, -1)).movedim(dim, 0).contiguous()
        out = torch.empty_like(parts[0])
        if self._group is None:
            self._run("reduce_scatter", x, dim, lambda: torch.add(parts[0], 0.0, out=out))
        elif self._moves is not None:
            self._run("reduce_scatter", x, dim, self._moves.reduce_scatter, parts, out)
        else:
            group, deterministic = self._group, self._deterministic
            self._run(
                "reduce_scatter",
                x,
                dim,
                lambda: process_group.reduce_scatter(parts, out, self._rank, group, deterministic=deterministic),
            )
        return out

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """See GroupCoordinator.broadcast."""
        _check_dim(x, 0)
        if not 0 <= src < self._world_size:
            raise ValueError(f"src: expected a rank between 0 and {self._world_size - 1}, got {src}")
        if not x.is_contiguous():
            raise ValueError(f"x: expected a contiguous tensor, got strides {x.stride()}")
        if self._group is None:
            self._run("broadcast", x, src, lambda: None)
        elif self._moves is not None:
            self._run("broadcast", x, src, self._moves.broadcast, x, src)
        else:
            self._run("broadcast", x, src, process_group.broadcast, x, src, self._group)
        return x

    def barrier(self) -> None:
        """See GroupCoordinator.barrier."""
        if self._group is None:
            self._run("barrier", None, None, lambda: None)
        elif self._moves is not None:
            self._run("barrier", None, None, self._moves.barrier)
        else:
            self._run("barrier", None, None, process_group.barrier, self._group)

    def _run(
        self,
        op: str,
        x: torch.Tensor | None,
        option: int | None,
        function: Callable[..., object],
        *arguments: Any,
    ) -> None:
        self._guard.begin(op, x, option)
        try:
            function(*arguments)
        except BaseException as error:
            self._guard.failed(error)
            raise
        finally:
            self._guard.end()


def _check_dim(x: torch.Tensor, dim: int) -> int:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    check_cpu(x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected between {-x.dim()} and {x.dim() - 1}, got {dim}")
    return dim % x.dim()
