"""The GroupCoordinator: one tensor-parallel group, its resources, and its collectives."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fusedcomm import native
from fusedcomm.comm import process_group
from fusedcomm.comm.custom import CustomAllReduce
from fusedcomm.comm.local import local_ops
from fusedcomm.comm.plan import Facts, Plan, Stage, choose_plan
from fusedcomm.comm.symmetric_buffer import SetupError
from fusedcomm.comm.tuning import choose_tuning, slot_bytes
from fusedcomm.env import Settings
from fusedcomm.errors import CallMismatchError, FusedCommError, GroupBrokenError, GroupClosedError
from fusedcomm.groups.topology import Hello, agree
from fusedcomm.ops.checks import check_group_size, check_norm, check_out, check_x
from fusedcomm.ops.dispatch import choose_local_backend
from fusedcomm.ops.quant import empty_quant
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

MAX_CUSTOM_WORLD_SIZE = 16
_MAX_CACHED_PLANS = 1024
_CALL_TEXT_BYTES = 256

_groups: weakref.WeakSet[GroupCoordinator] = weakref.WeakSet()
_fork_hook_installed = False


class GroupCoordinator:
    """A group of ranks that compute one model together; every method is called by all of them, in the same order.

    Owns its process groups, its symmetric buffer and its custom all-reduce; ``close()`` or ``with`` frees them. A group
    is used by one thread at a time.

    Args:
        ranks: global ranks of the group, this one among them; None is the whole world. Only these ranks take part in
            making the group.
        device: where its tensors live; only ``"cpu"`` as yet.
        timeout: deadline of every wait in seconds; None takes ``FUSEDCOMM_TIMEOUT_S``.
        settings: in place of those of the environment.

    Raises:
        ValueError: a bad argument.
        SettingError: a malformed setting on any rank (on all ranks).
        VersionMismatchError: ranks run different builds of the library (on all ranks).
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
        timeout: float | None = None,
        settings: Settings | None = None,
        local_rank: int | None = None,
    ) -> None:
        self.device = _check_device(device)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: expected a number of seconds > 0, got {timeout}")
        self._closed = False
        self._broken: str | None = None
        self._forked = False
        self._lock = threading.Lock()
        self._stats: Counter[str] = Counter()
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._custom: CustomAllReduce | None = None
        self._group: dist.ProcessGroup | None = None
        self._global_rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._ranks = _check_ranks(ranks, self._global_rank, world)
        self._local_rank = self._global_rank if local_rank is None else local_rank
        try:
            self._set_up(settings, timeout)
        except BaseException:
            self.close()
            raise
        _groups.add(self)
        _install_fork_hook()

    # ---- who ----

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self._ranks.index(self._global_rank)

    @property
    def world_size(self) -> int:
        """Number of ranks of the group."""
        return len(self._ranks)

    @property
    def global_rank(self) -> int:
        """This rank within the job."""
        return self._global_rank

    @property
    def local_rank(self) -> int:
        """This rank among those of its host."""
        return self._local_rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks of the group."""
        return self._ranks

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the last rank of the group."""
        return self.rank == self.world_size - 1

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The process group that moves tensors; None at world size 1. On CPU the same one as control_group."""
        return self._group

    @property
    def control_group(self) -> dist.ProcessGroup | None:
        """The process group that carries votes; None at world size 1."""
        return self._group

    @property
    def settings(self) -> Settings:
        """The settings that the ranks agreed on."""
        return self._settings

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._closed

    # ---- collectives ----

    def all_reduce(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of x over the ranks, in fp32 and rank order, rounded once; the same bits on every rank.

        Args:
            x: ``[..., H]``, bf16, fp16 or fp32, any size; made contiguous if it is not.
            out: written and returned; like x, contiguous, may be x itself.

        Raises:
            ValueError: a bad argument, before anything is sent.
            GroupBrokenError: a rank died, a wait passed its deadline, or ranks made different calls.
        """
        check_x(x)
        if out is not None:
            check_out(out, x, "out")
        hidden = x.shape[-1]
        plan = self._plan("all_reduce", x.numel() // hidden if hidden else 0, hidden, x.dtype)
        with self._call("all_reduce", x):
            out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
            self._stats[f"all_reduce.{plan.stage}"] += 1
            self._sum(plan.stage, x, out)
            return out

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
            x: this rank's partial sum ``[..., H]``, bf16, fp16 or fp32, H up to 32,768.
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
        check_norm(x, residual, weight, eps, weight_bias)
        if self._plan_rows("allreduce_rmsnorm", x).stage is not Stage.FUSED_NORM:
            return None
        return self.allreduce_rmsnorm(x, residual, weight, eps, weight_bias=weight_bias)

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
        check_norm(x, residual, weight, eps, weight_bias)
        check_group_size(x.shape[-1], group_size)
        if self._plan_rows("allreduce_rmsnorm_quant", x, group_size).stage is not Stage.FUSED:
            return None
        return self.allreduce_rmsnorm_quant(
            x,
            residual,
            weight,
            eps,
            group_size=group_size,
            emit_bf16=emit_bf16,
            scale_layout=scale_layout,
            weight_bias=weight_bias,
        )

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
        check_norm(x, residual, weight, eps, weight_bias)
        plan = self._plan_rows("allreduce_rmsnorm", x)
        with self._call("allreduce_rmsnorm", x):
            self._stats[f"allreduce_rmsnorm.{plan.stage}"] += 1
            if plan.stage is Stage.FUSED_NORM:
                return self._fused_norm(x, residual, weight, eps, weight_bias)
            total = self._sum(plan.stage, x)
            return self._local.fused_add_rms_norm(total, residual, weight, eps, weight_bias=weight_bias)

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
        check_norm(x, residual, weight, eps, weight_bias)
        check_group_size(x.shape[-1], group_size)
        plan = self._plan_rows("allreduce_rmsnorm_quant", x, group_size)
        with self._call("allreduce_rmsnorm_quant", x, group_size):
            self._stats[f"allreduce_rmsnorm_quant.{plan.stage}"] += 1
            if plan.stage is Stage.FUSED:
                return self._fused_quant(
                    x, residual, weight, eps, weight_bias, group_size, emit_bf16, scale_layout
                )
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

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The x of all ranks, joined along ``dim`` in rank order; x ``[...]`` has the same shape on every rank."""
        dim = _check_dim(x, dim)
        x = x.contiguous()
        with self._call("all_gather", x):
            out = x.new_empty(self.world_size, *x.shape)
            if self._group is None:
                out[0].copy_(x)
            elif self._custom_moves():
                self._custom.all_gather(x, out)
            else:
                process_group.all_gather(x, out, self._group)
            # [W, a, n, b] -> [a, W * n, b]; along dim 0 this is a view
            return out.movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's share, along ``dim``, of the sum of x over the ranks; ``x.shape[dim]`` divides by world_size."""
        check_x(x)
        dim = _check_dim(x, dim)
        if x.shape[dim] % self.world_size:
            raise ValueError(f"x: expected a size along dim {dim} divisible by {self.world_size}, got {x.shape[dim]}")
        parts = x.unflatten(dim, (self.world_size, -1)).movedim(dim, 0).contiguous()
        with self._call("reduce_scatter", x):
            out = torch.empty_like(parts[0])
            if self._group is None:
                out.copy_(parts[0])
            elif self._custom_moves():
                self._custom.reduce_scatter(parts, out)
            else:
                deterministic = self._settings.deterministic
                process_group.reduce_scatter(parts, out, self.rank, self._group, deterministic=deterministic)
            return out

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """x of group rank ``src``, written into x on the other ranks and returned; x is contiguous, of any dtype."""
        if not 0 <= src < self.world_size:
            raise ValueError(f"src: expected a rank between 0 and {self.world_size - 1}, got {src}")
        _check_dim(x, 0 if x.dim() else -1)
        if not x.is_contiguous():
            raise ValueError(f"x: expected a contiguous tensor, got strides {x.stride()}")
        with self._call("broadcast", x, src):
            if self._custom_moves():
                self._custom.broadcast(x, src)
            elif self._group is not None:
                process_group.broadcast(x, src, self._group)
            return x

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        with self._call("barrier"):
            if self._custom_moves():
                self._custom.barrier()
            elif self._group is not None:
                process_group.barrier(self._group)

    @contextlib.contextmanager
    def graph_capture(self) -> Iterator[None]:
        """Wraps the capture of a device graph that holds collectives; on CPU there is nothing to capture."""
        yield

    # ---- what is going on ----

    def explain(
        self, op: str, shape: Sequence[int], dtype: torch.dtype, *, group_size: int = 128, **options: object
    ) -> Plan:
        """The plan of a call: its stage, and why not each faster one. ``print`` it.

        Args:
            op: ``"all_reduce"``, ``"allreduce_rmsnorm"`` or ``"allreduce_rmsnorm_quant"``.
            shape: of x, ``[..., H]``.
            dtype: of x.
            group_size: of the quantisation.
            options: none as yet; an unknown one is an error.
        """
        if options:
            raise ValueError(f"options: expected group_size alone, got {sorted(options)}")
        if not shape:
            raise ValueError("shape: expected at least one dimension, got ()")
        num_tokens = 1
        for size in shape[:-1]:
            num_tokens *= size
        return self._plan(op, num_tokens, shape[-1], dtype, group_size)

    def stats(self) -> dict[str, int]:
        """How often each ``<op>.<stage>`` ran, and how many calls of the kernels were one-shot and two-shot."""
        counts = dict(self._stats)
        if self._custom is not None and not self._closed:
            counts.update({f"algorithm.{name}": n for name, n in self._custom.counts().items()})
        return counts

    def reset_stats(self) -> None:
        """Forgets the ``<op>.<stage>`` counts."""
        self._stats.clear()

    # ---- life ----

    def close(self) -> None:
        """Frees everything the group owns. Not collective; closing twice is fine; peers in a call get an error."""
        if self._closed:
            return
        self._closed = True
        if self._custom is not None:
            if self._forked:
                self._custom.abandon()
            else:
                self._custom.close()
        if self._group is not None and not self._forked and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def __enter__(self) -> GroupCoordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken else "open"
        return f"GroupCoordinator(rank={self.rank}, world_size={self.world_size}, device={self.device}, {state})"

    # ---- inside ----

    def _set_up(self, settings: Settings | None, timeout: float | None) -> None:
        problem, settings = "", settings
        if settings is None:
            try:
                settings = Settings.from_environ()
            except FusedCommError as error:
                problem, settings = str(error), Settings()
        library = native.load()
        if not problem:
            try:
                choose_local_backend(settings, self.device.type, native_available=library is not None)
            except FusedCommError as error:
                problem = str(error)
        hello = Hello.of_this_rank(settings, None if library is None else library.build_id(), problem)
        if timeout is not None:
            hello = hello.with_timeout(timeout)
        if self.world_size > 1:
            # Only members take part: another group of the job may be made at the same time, or never.
            self._group = dist.new_group(
                list(self._ranks),
                backend="gloo",
                use_local_synchronization=True,
                timeout=timedelta(seconds=hello.settings.timeout_s),
            )
        agreement = agree([Hello.unpack(data) for data in self._exchange(hello.pack())])
        self._settings = agreement.settings
        if self.rank == 0:
            for line in agreement.disagreements:
                warnings.warn(line, RuntimeWarning, stacklevel=4)

        backend = choose_local_backend(self._settings, self.device.type, native_available=library is not None)
        self._local = local_ops(backend)
        self._slot_bytes = slot_bytes(self._settings.buffer_mb)
        self._tuning = choose_tuning(self.world_size, agreement.cores, self._slot_bytes)
        self._custom_unavailable = agreement.custom_unavailable
        if self.world_size > MAX_CUSTOM_WORLD_SIZE:
            self._custom_unavailable = f"the kernels serve up to {MAX_CUSTOM_WORLD_SIZE} ranks, got {self.world_size}"
        wanted = not self._settings.disable and self._settings.backend != "torch"
        if self.world_size > 1 and wanted and not self._custom_unavailable and library is not None:
            try:
                self._custom = CustomAllReduce(
                    library,
                    self._exchange,
                    self.rank,
                    self.world_size,
                    slot_bytes=self._slot_bytes,
                    tuning=self._tuning,
                    timeout_s=self._settings.timeout_s,
                    pids=agreement.pids,
                )
            except SetupError as error:
                self._custom_unavailable = f"set-up failed: {error}"
        if self._custom_unavailable and wanted and self.rank == 0:
            warnings.warn(
                f"no custom all-reduce, all ranks use the process group: {self._custom_unavailable}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _exchange(self, data: bytes) -> list[bytes]:
        return [data] if self._group is None else process_group.exchange_bytes(data, self._group)

    def _plan_rows(self, op: str, x: torch.Tensor, group_size: int = 128) -> Plan:
        return self._plan(op, x.numel() // x.shape[-1], x.shape[-1], x.dtype, group_size)

    def _plan(self, op: str, num_tokens: int, hidden_size: int, dtype: torch.dtype, group_size: int = 128) -> Plan:
        key = (op, num_tokens, hidden_size, dtype, group_size)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_CACHED_PLANS:
                self._plans.clear()
            plan = choose_plan(
                Facts(
                    op=op,
                    num_tokens=num_tokens,
                    hidden_size=hidden_size,
                    dtype=dtype,
                    world_size=self.world_size,
                    settings=self._settings,
                    custom_unavailable=self._custom_unavailable,
                    slot_bytes=self._slot_bytes,
                    one_shot_max_bytes=self._tuning.one_shot_max_bytes,
                    group_size=group_size,
                )
            )
            self._plans[key] = plan
        return plan

    def _custom_moves(self) -> bool:
        """Whether data that is not summed goes through shared memory."""
        return self._custom is not None and not self._settings.disable_custom_ar

    def _sum(self, stage: Stage, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        if self._group is None:
            return torch.add(x, 0.0, out=out)  # a sum of one starts from +0 as well: -0 becomes +0
        if stage is Stage.PROCESS_GROUP or self._custom is None:
            process_group.all_reduce(x.contiguous(), out, self._group, deterministic=self._settings.deterministic)
        else:
            self._custom.all_reduce(x.contiguous(), out)
        return out

    def _fused_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
    ) -> AddRMSNorm:
        if self._custom is None:
            return self._local.fused_add_rms_norm(
                self._sum(Stage.CUSTOM, x), residual, weight, eps, weight_bias=weight_bias
            )
        x = x.contiguous()
        result = AddRMSNorm(torch.empty_like(x), torch.empty_like(x))
        residual = None if residual is None else residual.contiguous()
        self._custom.allreduce_rmsnorm(x, residual, weight.contiguous(), eps, weight_bias, *result)
        return result

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
        if self._custom is None:
            return self._local.fused_add_rms_norm_quant(
                self._sum(Stage.CUSTOM, x),
                residual,
                weight,
                eps,
                group_size=group_size,
                emit_bf16=emit_bf16,
                scale_layout=scale_layout,
                weight_bias=weight_bias,
            )
        x = x.contiguous()
        fp8, scale = empty_quant(x, group_size, scale_layout, torch.float8_e4m3fn)
        residual_out = torch.empty_like(x)
        norm = torch.empty_like(x) if emit_bf16 else None
        residual = None if residual is None else residual.contiguous()
        self._custom.allreduce_rmsnorm_quant(
            x, residual, weight.contiguous(), eps, weight_bias, group_size, fp8, scale, residual_out, norm
        )
        return AddRMSNormQuant(fp8, scale, residual_out, norm, scale_layout)

    @contextlib.contextmanager
    def _call(self, op: str, x: torch.Tensor | None = None, option: int | None = None) -> Iterator[None]:
        """Around every collective: refuses what cannot work, and remembers a failure."""
        self._refuse_if_unusable()
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"{op}: the group is in use by another thread; a group serves one thread at a time")
        try:
            if self._settings.debug:
                self._compare_calls(op, x, option)
            yield
        except GroupBrokenError as error:
            self._broken = str(error)
            raise
        except KeyboardInterrupt:
            self._broken = f"{op} was interrupted"
            raise
        finally:
            self._lock.release()

    def _refuse_if_unusable(self) -> None:
        if self._forked:
            raise GroupClosedError("the group was inherited through fork; a child process needs a group of its own")
        if self._closed:
            raise GroupClosedError("the group is closed")
        if self._broken is not None:
            raise GroupBrokenError(f"the group failed earlier and refuses further calls: {self._broken}")

    def _compare_calls(self, op: str, x: torch.Tensor | None, option: int | None) -> None:
        """FUSEDCOMM_DEBUG=1: all ranks fail on the first call that is not the same on all."""
        call = op if x is None else f"{op}(shape={tuple(x.shape)}, dtype={x.dtype}"
        call += "" if x is None else f", option={option})" if option is not None else ")"
        texts = [
            data.rstrip(b"\0").decode(errors="replace")
            for data in self._exchange(call.encode()[:_CALL_TEXT_BYTES].ljust(_CALL_TEXT_BYTES, b"\0"))
        ]
        if len(set(texts)) > 1:
            listed = ", ".join(f"rank {r} {text}" for r, text in enumerate(texts))
            raise CallMismatchError(f"ranks made different calls: {listed}")


def _check_device(device: torch.device | str | None) -> torch.device:
    checked = torch.device("cpu" if device is None else device)
    if checked.type != "cpu":
        raise ValueError(f"device: expected cpu (GPU groups are not built yet), got {checked}")
    return checked


def _check_ranks(ranks: Sequence[int] | None, global_rank: int, world: int) -> tuple[int, ...]:
    if ranks is None:
        return tuple(range(world))
    checked = tuple(int(r) for r in ranks)
    if len(set(checked)) != len(checked) or not all(0 <= r < world for r in checked):
        raise ValueError(f"ranks: expected different ranks between 0 and {world - 1}, got {checked}")
    if global_rank not in checked:
        raise ValueError(f"ranks: expected this rank ({global_rank}) among them, got {checked}")
    return tuple(sorted(checked))


def _check_dim(x: torch.Tensor, dim: int) -> int:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.device.type != "cpu":
        raise ValueError(f"x: expected a CPU tensor, got one on {x.device}")
    if x.dim() and not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected between {-x.dim()} and {x.dim() - 1}, got {dim}")
    return dim % x.dim() if x.dim() else 0


def _install_fork_hook() -> None:
    global _fork_hook_installed
    if not _fork_hook_installed:
        _fork_hook_installed = True
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for group in _groups:
        group._forked = True
