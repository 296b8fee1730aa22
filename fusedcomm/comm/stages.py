"""The collectives of a group: each call takes the fastest stage that its plan allows.

The hot path makes no checks in Python and looks no plan up: the native operators check every call before anything is
sent, and if one refuses, the full checks say what is wrong. Where eight ranks share two cores, each Python function on
the way costs every rank microseconds, because its code has left the caches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from fusedcomm.comm import process_group
from fusedcomm.comm.aiter import AiterCollectives
from fusedcomm.comm.arguments import check_norm_call, check_quant_call, check_sum_call
from fusedcomm.comm.local import LocalOps
from fusedcomm.comm.movement import DataMovement
from fusedcomm.comm.native_collectives import NativeCollectives
from fusedcomm.comm.plan import FUSED_HIDDEN_ON_GPU, STAGES_OF, Facts, Plan, Stage, choose_plan
from fusedcomm.errors import GroupBrokenError
from fusedcomm.ops.checks import GROUP_SIZES, MAX_NORM_HIDDEN
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout

_MAX_CACHED_PLANS = 1024


class StagedCollectives(DataMovement):
    """The all-reduce and its fused forms; GroupCoordinator derives from it."""

    _local: LocalOps
    _facts: Callable[..., Facts]  # those of the group; op, shape and dtype of the call are filled in

    def __init__(self) -> None:
        self._aiter: AiterCollectives | None = None
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._direct_sum: NativeCollectives | None = None
        self._direct_norm: NativeCollectives | None = None
        self._direct_quant: NativeCollectives | None = None
        # On GPUs: the last dimensions that the kernels of norms take. None: any.
        self._fused_hidden: range | None = None
        # The same as soon as a call had another one. Until then the hot path does not look: the kernels refuse it.
        self._direct_hidden: range | None = None
        self._stats: dict[str, int] = defaultdict(int)

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
        direct = self._direct_sum
        if direct is not None and self._guard.lock.acquire(False):
            try:
                result = direct.all_reduce(x, out)
                self._stats["all_reduce.custom"] += 1
                return result
            except BaseException as error:
                self._fail(error)
                check_sum_call(x, out, self.device)
                raise
            finally:
                self._guard.lock.release()
        check_sum_call(x, out, self.device)
        plan = self._plan("all_reduce", x)
        result = self._run("all_reduce", x, None, self._sum, plan, x, out)
        self._stats[plan.counter] += 1
        return result

    def fused_allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        out: AddRMSNorm | None = None,
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
            out: written and returned; both like x, contiguous (on GPUs aligned to 16 bytes), and apart from each other
                and from the inputs, but that either may be x or the residual itself: ``out.residual`` the residual and
                ``out.norm`` x, as a rule. Without it both are allocated.

        Returns:
            ``norm`` and the new ``residual``, both like x.

        Raises:
            ValueError: a bad argument, before anything is sent.
            GroupBrokenError: as for all_reduce.
        """
        return self._norm_fused(x, residual, weight, eps, weight_bias, out)

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
        out: AddRMSNormQuant | None = None,
    ) -> AddRMSNormQuant | None:
        """As fused_allreduce_rmsnorm, with per-group FP8 quantisation in the same launch; None where not eligible.

        Args:
            x, residual, weight, eps, weight_bias: as for fused_allreduce_rmsnorm.
            group_size: 32, 64, 128 or 256; divides H.
            emit_bf16: also return the normed rows as ``norm``.
            scale_layout: see ScaleLayout.
            out: written and returned; of the shapes, dtypes and strides of a result without it (``out.norm`` is None
                unless ``emit_bf16``), its ``scale_layout`` this one. ``out.residual`` and ``out.norm`` may be inputs as
                for fused_allreduce_rmsnorm; ``out.fp8`` and ``out.scale`` are apart from everything.

        Raises:
            ValueError: a bad argument, before anything is sent.
            GroupBrokenError: as for all_reduce.
        """
        return self._quant_fused(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: float = 0.0,
        out: AddRMSNorm | None = None,
    ) -> AddRMSNorm:
        """As fused_allreduce_rmsnorm, by the fastest stage that is eligible: it always completes."""
        # by position, and what the hot path does not need is elsewhere: names and closures cost a microsecond
        fused = self._norm_fused(x, residual, weight, eps, weight_bias, out)
        return self._norm_staged(x, residual, weight, eps, weight_bias, out) if fused is None else fused

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
        out: AddRMSNormQuant | None = None,
    ) -> AddRMSNormQuant:
        """As fused_allreduce_rmsnorm_quant_per_group, by the fastest stage that is eligible: it always completes."""
        fused = self._quant_fused(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)
        if fused is not None:
            return fused
        return self._quant_staged(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)

    def _norm_fused(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        out: AddRMSNorm | None,
    ) -> AddRMSNorm | None:
        direct = self._direct_norm
        if direct is not None and self._guard.lock.acquire(False):
            try:
                hidden = self._direct_hidden
                if hidden is None or x.shape[-1] in hidden:
                    result = direct.allreduce_rmsnorm(x, residual, weight, eps, weight_bias, out)
                    self._stats["allreduce_rmsnorm.fused_norm"] += 1
                    return result
            except BaseException as error:
                self._fail(error)
                check_norm_call(x, residual, weight, eps, weight_bias, out, self.device)
                if not self._was_too_long(x, error):
                    raise
            finally:
                self._guard.lock.release()
        check_norm_call(x, residual, weight, eps, weight_bias, out, self.device)
        plan = self._plan("allreduce_rmsnorm", x)
        if plan.stage is not Stage.FUSED_NORM:
            self._guard.check()
            return None
        arguments = (x, residual, weight, eps, weight_bias, out)
        result = self._run("allreduce_rmsnorm", x, None, self._fused_norm, plan, *arguments)
        self._stats[plan.counter] += 1
        return result

    def _norm_staged(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        out: AddRMSNorm | None,
    ) -> AddRMSNorm:
        plan = self._plan("allreduce_rmsnorm", x)

        def staged() -> AddRMSNorm:
            total = self._sum(plan, x)
            return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias, out=out)

        result = self._run("allreduce_rmsnorm", x, None, staged)
        self._stats[plan.counter] += 1
        return result

    def _quant_fused(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_bf16: bool,
        scale_layout: ScaleLayout,
        out: AddRMSNormQuant | None,
    ) -> AddRMSNormQuant | None:
        direct = self._direct_quant
        if direct is not None and self._guard.lock.acquire(False):
            try:
                hidden = self._direct_hidden
                if hidden is None or x.shape[-1] in hidden:
                    result = direct.allreduce_rmsnorm_quant(
                        x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out
                    )
                    self._stats["allreduce_rmsnorm_quant.fused"] += 1
                    return result
            except BaseException as error:
                self._fail(error)
                self._check_quant(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)
                if not self._was_too_long(x, error):
                    raise
            finally:
                self._guard.lock.release()
        self._check_quant(x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)
        op = "allreduce_rmsnorm_quant"
        plan = self._plan(op, x, group_size)
        if plan.stage is not Stage.FUSED:
            self._guard.check()
            return None
        arguments = (x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)
        result = self._run(op, x, group_size, self._fused_quant, plan, *arguments)
        self._stats[plan.counter] += 1
        return result

    def _quant_staged(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_bf16: bool,
        scale_layout: ScaleLayout,
        out: AddRMSNormQuant | None,
    ) -> AddRMSNormQuant:
        op = "allreduce_rmsnorm_quant"
        plan = self._plan(op, x, group_size)

        def staged() -> AddRMSNormQuant:
            if plan.stage is not Stage.FUSED_NORM:
                total = self._sum(plan, x)
                return self._norm_quant(
                    total, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out
                )
            into = rows = None
            if out is not None:
                into = AddRMSNorm(x.new_empty(x.shape) if out.norm is None else out.norm, out.residual)
                rows = GroupQuant(out.fp8, out.scale, scale_layout)
            norm, residual_out = self._fused_norm(plan, x, residual, weight, eps, weight_bias, into)
            fp8, scale, _ = self._local.per_group_quant_fp8(
                norm, group_size=group_size, scale_layout=scale_layout, out=rows
            )
            if out is not None:
                return out
            return AddRMSNormQuant(fp8, scale, residual_out, norm if emit_bf16 else None, scale_layout)

        result = self._run(op, x, group_size, staged)
        self._stats[plan.counter] += 1
        return result

    def _check_quant(self, *arguments: Any) -> None:
        check_quant_call(*arguments, device=self.device, fp8_dtype=self._local.fp8_dtype)

    def _was_too_long(self, x: torch.Tensor, error: BaseException) -> bool:
        """Whether the kernels refused rows for their length alone: these go by the plan, and from now on H is looked at
        before."""
        if self._fused_hidden is None or x.shape[-1] in self._fused_hidden:
            return False
        if isinstance(error, GroupBrokenError) or not isinstance(error, RuntimeError):
            return False
        self._direct_hidden = self._fused_hidden
        return True

    def _go_direct(self) -> None:
        """Takes the plan off the hot path: where the first stage of an operation serves every shape, calls go straight
        to the kernels. Not where calls are compared first, or some go to aiter. On GPUs every shape means every H that
        the kernels take; they refuse others."""
        if self._custom is None or self._aiter is not None or self._guard.compare_calls:
            return
        self._fused_hidden = FUSED_HIDDEN_ON_GPU if self.device.type == "cuda" else None
        largest = torch.Size((1, MAX_NORM_HIDDEN if self._fused_hidden is None else self._fused_hidden[-1]))
        direct = {
            op: self._custom
            for op, stages in STAGES_OF.items()
            if self._plan_shape(op, largest, torch.float32, GROUP_SIZES[0]).stage is stages[0]
        }
        self._direct_sum = direct.get("all_reduce")
        self._direct_norm = direct.get("allreduce_rmsnorm")
        self._direct_quant = direct.get("allreduce_rmsnorm_quant")

    def _stop_direct(self) -> None:
        """Every call meets the guard again, which refuses it."""
        self._direct_sum = self._direct_norm = self._direct_quant = None

    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        if not self._guard.usable:
            self._stop_direct()

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

    def _server(self, plan: Plan) -> NativeCollectives | AiterCollectives | None:
        """Who sums in a plan, if not the process group or one rank alone."""
        if plan.stage is Stage.PROCESS_GROUP:
            return None
        return self._aiter if plan.by_aiter else self._custom

    def _sum(self, plan: Plan, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        server = self._server(plan)
        if server is not None:
            return server.all_reduce(x, out)
        x = x.detach().contiguous()
        out = torch.empty_like(x) if out is None else out
        if self._group is None:
            return torch.add(x, 0.0, out=out)  # a sum of one starts from +0 as well: -0 becomes +0
        process_group.all_reduce(x, out, self._group, deterministic=self._settings.deterministic)
        return out

    def _fused_norm(
        self,
        plan: Plan,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        out: AddRMSNorm | None,
    ) -> AddRMSNorm:
        server = self._server(plan)
        if server is not None:
            return server.allreduce_rmsnorm(x, residual, weight, eps, weight_bias, out)
        total = self._sum(plan, x)  # one rank
        return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias, out=out)

    def _fused_quant(
        self,
        plan: Plan,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_bf16: bool,
        scale_layout: ScaleLayout,
        out: AddRMSNormQuant | None,
    ) -> AddRMSNormQuant:
        server = self._server(plan)
        if server is not None:
            return server.allreduce_rmsnorm_quant(
                x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out
            )
        total = self._sum(plan, x)  # one rank
        return self._norm_quant(total, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout, out)

    def _norm_quant(
        self,
        total: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_bf16: bool,
        scale_layout: ScaleLayout,
        out: AddRMSNormQuant | None,
    ) -> AddRMSNormQuant:
        return self._local.fused_add_rms_norm_quant(
            total,
            residual,
            weight,
            eps,
            group_size=group_size,
            emit_bf16=emit_bf16,
            scale_layout=scale_layout,
            weight_bias=weight_bias,
            out=out,
        )
