"""The collectives of a group: each call takes the fastest stage that its plan allows.

The hot path makes no checks in Python: the first call with a shape is checked here, and the native operators check
every call before anything is sent. If one refuses, the full checks run again to say what is wrong. Where eight ranks
share two cores, each Python function on the way costs every rank microseconds, because its code has left the caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from fusedcomm.comm import process_group
from fusedcomm.comm.local import LocalOps
from fusedcomm.comm.movement import DataMovement
from fusedcomm.comm.plan import Facts, Plan, Stage, choose_plan
from fusedcomm.ops.checks import check_cpu, check_group_size, check_norm, check_out, check_x
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

_MAX_CACHED_PLANS = 1024


class StagedCollectives(DataMovement):
    """The all-reduce and its fused forms; GroupCoordinator derives from it."""

    _local: LocalOps
    _facts: Callable[..., Facts]  # those of the group; op, shape and dtype of the call are filled in

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._stats: Counter[str] = Counter()

    # ---- sums ----

    def all_reduce(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of x over the ranks, in fp32 and rank order, rounded once; the same bits on every rank.

        Args:
            x: ``[..., H]``, bf16, fp16 or fp32, any size; made contiguous if it is not.
            out: written and returned; like x, contiguous, may be x itself.

        Raises:
            ValueError: a bad argument, before anything is sent.
            GroupBrokenError: a rank died, a wait passed its deadline, or ranks made different calls.
        """
        plan = self._plans.get(("all_reduce", getattr(x, "shape", None), getattr(x, "dtype", None), 0))
        if plan is None:
            _check_sum(x, out)
            plan = self._plan("all_reduce", x)
        self._guard.begin("all_reduce", x)
        try:
            self._stats[plan.counter] += 1
            return self._sum(plan.stage, x, out)
        except BaseException as error:
            self._guard.failed(error)
            _check_sum(x, out)
            raise
        finally:
            self._guard.end()

    def fused_allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
    ) -> AddRMSNorm | None:
        """All-reduce, residual addition and RMSNorm in one launch; None where no fused kernel is eligible.

        None follows from facts that all ranks share and comes before any side effect; then ``allreduce_rmsnorm`` (the
        same arguments) completes by the staged path, with the same bits.

        Args:
            x: this rank's partial sum ``[..., H]``, bf16, fp16 or fp32, H up to 32,768; made contiguous if it is not.
            residual: like x, or None; this rank's own, it is not summed over ranks.
            weight: ``[H]``, dtype of x or fp32.
            eps: added to the mean of squares; >= 0.
            weight_bias: added to the weight (1 for Gemma).

        Returns:
            ``norm`` and the new ``residual``, both like x.

        Raises:
            ValueError: a bad argument, before anything is sent.
            GroupBrokenError: as for all_reduce.
        """
        plan = self._plans.get(("allreduce_rmsnorm", getattr(x, "shape", None), getattr(x, "dtype", None), 0))
        if plan is None:
            _check_norm(x, residual, weight, eps, weight_bias)
            plan = self._plan("allreduce_rmsnorm", x)
        if plan.stage is not Stage.FUSED_NORM:
            _check_norm(x, residual, weight, eps, weight_bias)
            return None
        self._guard.begin("allreduce_rmsnorm", x)
        try:
            self._stats[plan.counter] += 1
            return self._fused_norm(x, residual, weight, eps, weight_bias)
        except BaseException as error:
            self._guard.failed(error)
            _check_norm(x, residual, weight, eps, weight_bias)
            raise
        finally:
            self._guard.end()

    def fused_allreduce_rmsnorm_quant_per_group(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        group_size: int = 128,
        emit_bf16: bool = False,
        scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
        weight_bias: float = 0.0,
    ) -> AddRMSNormQuant | None:
        """As fused_allreduce_rmsnorm, with per-group FP8 quantisation in the same launch; None where not eligible.

        Args:
            x, residual, weight, eps, weight_bias: as for fused_allreduce_rmsnorm.
            group_size: 32, 64, 128 or 256; divides H.
            emit_bf16: also return the normed rows as ``norm``.
            scale_layout: see ScaleLayout.

        Raises:
            ValueError: a bad argument, before anything is sent.
            GroupBrokenError: as for all_reduce.
        """
        op = "allreduce_rmsnorm_quant"
        plan = self._plans.get((op, getattr(x, "shape", None), getattr(x, "dtype", None), group_size))
        if plan is None:
            _check_norm(x, residual, weight, eps, weight_bias)
            check_group_size(x.shape[-1], group_size)
            plan = self._plan(op, x, group_size)
        if plan.stage is not Stage.FUSED:
            _check_norm(x, residual, weight, eps, weight_bias)
            return None
        self._guard.begin(op, x, group_size)
        try:
            self._stats[plan.counter] += 1
            return self._fused_quant(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout)
        except BaseException as error:
            self._guard.failed(error)
            _check_norm(x, residual, weight, eps, weight_bias)
            raise
        finally:
            self._guard.end()

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
    ) -> AddRMSNorm:
        """As fused_allreduce_rmsnorm, by the fastest stage that is eligible: it always completes."""
        fused = self.fused_allreduce_rmsnorm(x, residual, weight, eps, weight_bias=weight_bias)
        if fused is not None:
            return fused
        plan = self._plan("allreduce_rmsnorm", x)
        self._guard.begin("allreduce_rmsnorm", x)
        try:
            self._stats[plan.counter] += 1
            total = self._sum(plan.stage, x)
            return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias)
        except BaseException as error:
            self._guard.failed(error)
            raise
        finally:
            self._guard.end()

    def allreduce_rmsnorm_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        group_size: int = 128,
        emit_bf16: bool = False,
        scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
        weight_bias: float = 0.0,
    ) -> AddRMSNormQuant:
        """As fused_allreduce_rmsnorm_quant_per_group, by the fastest stage that is eligible: it always completes."""
        options: dict[str, Any] = {"group_size": group_size, "emit_bf16": emit_bf16, "scale_layout": scale_layout}
        fused = self.fused_allreduce_rmsnorm_quant_per_group(
            x, residual, weight, eps, weight_bias=weight_bias, **options
        )
        if fused is not None:
            return fused
        op = "allreduce_rmsnorm_quant"
        plan = self._plan(op, x, group_size)
        self._guard.begin(op, x, group_size)
        try:
            self._stats[plan.counter] += 1
            if plan.stage is Stage.FUSED_NORM:
                norm, residual_out = self._fused_norm(x, residual, weight, eps, weight_bias)
                fp8, scale, _ = self._local.per_group_quant_fp8(norm, group_size=group_size, scale_layout=scale_layout)
                return AddRMSNormQuant(fp8, scale, residual_out, norm if emit_bf16 else None, scale_layout)
            return self._local.fused_add_rms_norm_quant(
                self._sum(plan.stage, x), residual, weight, eps, weight_bias=weight_bias, **options
            )
        except BaseException as error:
            self._guard.failed(error)
            raise
        finally:
            self._guard.end()

    def _plan(self, op: str, x: torch.Tensor, group_size: int = 0) -> Plan:
        return self._plan_shape(op, x.shape, x.dtype, group_size)

    def _plan_shape(self, op: str, shape: torch.Size, dtype: torch.dtype, group_size: int) -> Plan:
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

    def _sum(self, stage: Stage, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._custom is not None and stage is not Stage.PROCESS_GROUP:
            return self._custom.all_reduce(x, out)
        x = x.contiguous()
        out = torch.empty_like(x) if out is None else out
        if self._group is None:
            return torch.add(x, 0.0, out=out)  # a sum of one starts from +0 as well: -0 becomes +0
        process_group.all_reduce(x, out, self._group, deterministic=self._settings.deterministic)
        return out

    def _fused_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
    ) -> AddRMSNorm:
        if self._custom is not None:
            return self._custom.allreduce_rmsnorm(x, residual, weight, eps, weight_bias)
        total = self._sum(Stage.FUSED_NORM, x)  # one rank
        return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias)

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
        if self._custom is not None:
            return self._custom.allreduce_rmsnorm_quant(
                x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout
            )
        return self._local.fused_add_rms_norm_quant(
            self._sum(Stage.FUSED, x),  # one rank
            residual,
            weight,
            eps,
            group_size=group_size,
            emit_bf16=emit_bf16,
            scale_layout=scale_layout,
            weight_bias=weight_bias,
        )


def _check_sum(x: torch.Tensor, out: torch.Tensor | None) -> None:
    check_x(x)
    check_cpu(x)
    if out is not None:
        check_out(out, x, "out")


def _check_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    check_norm(x, residual, weight, eps, weight_bias)
    check_cpu(x)
