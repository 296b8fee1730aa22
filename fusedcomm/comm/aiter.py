"""AMD's aiter in place of the library's own kernels: when it may serve, how ranks agree on it, how it is called.

Bound against the signatures of amd-aiter 0.1.20 and never run: there was no AMD hardware (docs/amd.md). Its results are
not to the bit those of the library's own kernels, and its waits have no deadline.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fusedcomm.aiter_package import ARCHS, Call, find_aiter, resolve, why_unusable
from fusedcomm.comm.local import LocalOps
from fusedcomm.comm.symmetric_buffer import Exchange
from fusedcomm.env import Settings, launcher_environ
from fusedcomm.errors import SettingError
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

_Result = TypeVar("_Result", AddRMSNorm, AddRMSNormQuant)

QUANT_ARCH = "gfx95"
WORLD_SIZES = (2, 4, 8)
DTYPES = (torch.float16, torch.bfloat16)
# A row is whole packs of 16 bytes, one or two of them for each of up to 512 threads.
MIN_HIDDEN, MAX_HIDDEN = 512, 8192
MAX_MESSAGE_BYTES = 64 << 20  # from here on it falls back to RCCL by itself
MAX_GROUP_PACKS = 64  # lanes of a wave
_SINGLE_STAGE_BYTES = 128 << 10  # up to here its own layers ask for the kernel of one stage

_STATE = "aiter.dist.parallel_state"
_OPS = "aiter.dist.communication_op"
ALL_REDUCE = Call(_OPS, "tensor_model_parallel_all_reduce", ("input_",))
ALLREDUCE_RMSNORM = Call(
    _OPS,
    "tensor_model_parallel_fused_allreduce_rmsnorm",
    ("input_", "residual_inp_", "weight_", "eps", "prefill_support", "x_pad_to_multiple", "gemma_norm"),
)
# Not tensor_model_parallel_fused_allreduce_rmsnorm_quant: where its kernel fails on one rank it falls back on that rank
# alone, and the others wait for ever. This one raises.
ALLREDUCE_RMSNORM_QUANT = Call(
    "aiter.ops.custom_all_reduce",
    "fused_allreduce_rmsnorm_quant_per_group",
    (
        *("_fa", "inp", "res_inp", "res_out", "out", "scale_out", "w", "eps"),
        *("group_size", "reg_ptr", "reg_bytes", "use_1stage", "bf16_out_ptr"),
    ),
)
IS_INITIALIZED = Call(_STATE, "model_parallel_is_initialized", ())
HAS_CUSTOM_GROUP = Call(_STATE, "has_custom_group", ())
GET_GROUP = Call(_STATE, "get_tp_group", ())
INITIALIZE_WORLD = Call(
    _STATE,
    "init_distributed_environment",
    ("world_size", "rank", "distributed_init_method", "local_rank", "backend"),
)
INITIALIZE_GROUP = Call(
    _STATE, "ensure_model_parallel_initialized", ("tensor_model_parallel_size", "pipeline_model_parallel_size")
)
DESTROY_GROUP = Call(_STATE, "destroy_model_parallel", ())
CONTRACT = (
    ALL_REDUCE,
    ALLREDUCE_RMSNORM,
    ALLREDUCE_RMSNORM_QUANT,
    IS_INITIALIZED,
    HAS_CUSTOM_GROUP,
    GET_GROUP,
    INITIALIZE_WORLD,
    INITIALIZE_GROUP,
    DESTROY_GROUP,
)


def why_not_group(settings: Settings, archs: Sequence[str], world_size: int) -> str:
    """Why aiter serves no call of a group, from facts that all its ranks share; empty if it may. Pure.

    ``archs``: those of the ranks' GPUs; empty on CPU.
    """
    if settings.disable:
        return "FUSEDCOMM_DISABLE=1"
    if settings.disable_aiter:
        return "FUSEDCOMM_DISABLE_AITER=1"
    if settings.backend not in (None, "aiter"):
        return f"FUSEDCOMM_BACKEND={settings.backend}"
    if settings.deterministic:
        return "FUSEDCOMM_DETERMINISTIC=1, and aiter does not add in rank order"
    others = sorted({arch for arch in archs if not arch.startswith(ARCHS)})
    if others or not archs:
        return f"aiter serves gfx94x and gfx95x, not {', '.join(others) or 'the CPU'}"
    if world_size not in WORLD_SIZES:
        return f"aiter serves {', '.join(map(str, WORLD_SIZES))} ranks, not {world_size}"
    return ""


def why_not_call(
    stage: str, num_tokens: int, hidden_size: int, dtype: torch.dtype, group_size: int, archs: Sequence[str]
) -> str:
    """Why aiter cannot serve a stage (``Stage`` of plan.py) of a call, in a group that it may serve. Pure."""
    if dtype not in DTYPES:
        return f"aiter takes fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
    message_bytes = num_tokens * hidden_size * dtype.itemsize
    if not 0 < message_bytes < MAX_MESSAGE_BYTES:
        return f"aiter takes messages between 1 and {MAX_MESSAGE_BYTES - 1} bytes, not {message_bytes}"
    if message_bytes % 16:
        return f"aiter takes messages of whole 16 bytes, not {message_bytes}"
    if stage == "custom":
        return ""
    pack = 16 // dtype.itemsize
    if not MIN_HIDDEN <= hidden_size <= MAX_HIDDEN or hidden_size % pack:
        return f"aiter norms rows of {MIN_HIDDEN} to {MAX_HIDDEN} elements, a multiple of {pack}, not {hidden_size}"
    if stage == "fused_norm":
        return ""
    if not all(arch.startswith(QUANT_ARCH) for arch in archs):
        return f"aiter quantises in the same kernel on {QUANT_ARCH}x only"
    packs = group_size // pack
    if group_size % pack or packs & (packs - 1) or not 0 < packs <= MAX_GROUP_PACKS or hidden_size % group_size:
        return f"aiter takes no group_size {group_size} at hidden size {hidden_size}"
    return ""


class Ballot(NamedTuple):
    """What one rank says of its aiter. Crosses the wire in a fixed format."""

    why_not: str
    """Why it cannot be used on this rank; empty if it can."""
    version: str
    environment: bytes
    """Hash of aiter's own variables, which choose its kernels."""
    initialized: bool
    """Whether aiter's tensor-parallel group is there."""

    def pack(self) -> bytes:
        return _BALLOT.pack(self.why_not.encode()[:256], self.version.encode()[:64], self.environment, self.initialized)

    @classmethod
    def unpack(cls, data: bytes) -> Ballot:
        """The record that pack made."""
        why_not, version, environment, initialized = _BALLOT.unpack(data)
        return cls(_text(why_not), _text(version), environment, initialized)


_BALLOT = struct.Struct("<256s64s32s?")


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def why_not_all(ballots: Sequence[Ballot]) -> str:
    """Why the ranks do not use aiter; empty if all can. Pure: every rank comes to the same conclusion."""
    for rank, ballot in enumerate(ballots):
        if ballot.why_not:
            return f"rank {rank}: {ballot.why_not}"
    first = ballots[0]
    for rank, ballot in enumerate(ballots):
        if ballot.version != first.version:
            return f"rank {rank} has aiter {ballot.version}, rank 0 {first.version}"
        if ballot.environment != first.environment:
            return f"rank {rank} has other AITER_* variables than rank 0"
        if ballot.initialized != first.initialized:
            return f"aiter's tensor-parallel group is initialized on some ranks only (rank {rank} differs from rank 0)"
    return ""


def cast_ballot(ranks: Sequence[int], device: torch.device, *, may_initialize: bool) -> Ballot:
    """Looks at this rank's aiter; whatever is wrong with it is an answer, not an exception.

    Imports aiter only if the process has done so already, or if it may be initialized here.
    """
    package = find_aiter()
    version = package.version or "" if package is not None else ""
    names = sorted(name for name in launcher_environ() if name.startswith("AITER_"))
    settings = "\n".join(f"{name}={launcher_environ()[name]}" for name in names)
    environment = hashlib.sha256(settings.encode()).digest()
    why_not, initialized = why_unusable(package), False
    if not why_not:
        try:
            why_not, initialized = _look(ranks, device, may_initialize)
        except Exception as error:  # its import alone raises RuntimeError, and more, where something does not suit it
            why_not = f"{type(error).__name__}: {error}".partition("\n")[0]
    return Ballot(why_not, version, environment, initialized)


def _look(ranks: Sequence[int], device: torch.device, may_initialize: bool) -> tuple[str, bool]:
    if _STATE not in sys.modules and not may_initialize:
        return _NOT_INITIALIZED, False
    for call in CONTRACT:
        resolve(call)
    if resolve(HAS_CUSTOM_GROUP)():
        return "aiter was initialized with groups of its own kind (custom_group_config)", False
    if not resolve(IS_INITIALIZED)():
        if not may_initialize:
            return _NOT_INITIALIZED, False
        if len(ranks) != dist.get_world_size():
            return "aiter can be initialized for a group of all ranks only", False
        return "", False
    group = resolve(GET_GROUP)()
    if list(group.ranks) != list(ranks):
        return f"aiter's tensor-parallel group has the ranks {list(group.ranks)}, this group {list(ranks)}", True
    if group.device != device:
        return f"aiter's tensor-parallel group is on {group.device}, this group on {device}", True
    communicator = group.device_communicator.ca_comm
    if communicator is None or communicator.disabled:
        return "aiter's custom all-reduce is disabled", True
    _registered_input(communicator)
    return "", True


_NOT_INITIALIZED = "nobody has initialized aiter's tensor-parallel group (aiter.dist.parallel_state)"


def _registered_input(communicator: Any) -> tuple[int, int, int]:
    """The handle of aiter's communicator, and the address and size of the buffer that it copies a call's input to."""
    buffer = communicator._pool["input"]
    return int(communicator._ptr), int(buffer.data_ptr), int(buffer.max_size)


class AiterCollectives:
    """The collectives of CustomAllReduce, by aiter. Every rank has voted for it before one is made.

    Safe in graph capture: inputs are copied into aiter's registered buffer, so nothing is collected at the end of a
    capture. An exception of aiter is raised as it is; peers may then wait for ever, as its kernels have no deadline.
    """

    def __init__(self, local: LocalOps, *, owns_group: bool) -> None:
        self._local = local
        self._owns_group = owns_group
        self._all_reduce: Callable[..., Any] = resolve(ALL_REDUCE)
        self._allreduce_rmsnorm: Callable[..., Any] = resolve(ALLREDUCE_RMSNORM)
        self._allreduce_rmsnorm_quant: Callable[..., Any] = resolve(ALLREDUCE_RMSNORM_QUANT)
        self._communicator = resolve(GET_GROUP)().device_communicator.ca_comm

    @classmethod
    def set_up(
        cls,
        exchange: Exchange,
        settings: Settings,
        archs: Sequence[str],
        ranks: Sequence[int],
        device: torch.device,
        local: LocalOps,
    ) -> tuple[AiterCollectives | None, str]:
        """Together on all ranks: the collectives, or why there are none. ``ranks``: the global ranks of the group.

        Raises:
            SettingError: on all ranks alike, if ``FUSEDCOMM_BACKEND=aiter`` cannot be done.
        """
        forced = settings.backend == "aiter"
        why_not = why_not_group(settings, archs, len(ranks))
        owns_group = False
        if not why_not:
            ballots = _vote(exchange, cast_ballot(ranks, device, may_initialize=forced))
            why_not = why_not_all(ballots)
            if not why_not and not ballots[0].initialized:
                owns_group = True
                error = _initialize(ranks, device)
                ballot = cast_ballot(ranks, device, may_initialize=False)
                why_not = why_not_all(_vote(exchange, ballot._replace(why_not=error or ballot.why_not)))
        if not why_not:
            return cls(local, owns_group=owns_group), ""
        if forced:
            raise SettingError(f"FUSEDCOMM_BACKEND: aiter cannot serve this group: {why_not}")
        return None, why_not

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over ranks of x ``[...]``, into out if given."""
        total: torch.Tensor = self._all_reduce(x.detach().contiguous())
        return total if out is None else out.copy_(total)

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        out: AddRMSNorm | None = None,
    ) -> AddRMSNorm:
        """All-reduce + add + RMSNorm; copied into out if given, as aiter allocates."""
        x = x.detach().contiguous()
        is_gemma = weight_bias == 1.0 and weight.dtype == x.dtype
        weight = _folded(weight, 0.0 if is_gemma else weight_bias, x.dtype)
        norm, residual_out = self._allreduce_rmsnorm(x, _given(residual, x), weight, eps, False, 0, is_gemma)
        result = AddRMSNorm(norm, residual_out)
        return result if out is None else _copied(result, out)

    def allreduce_rmsnorm_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        group_size: int,
        emit_norm: bool,
        scale_layout: ScaleLayout,
        out: AddRMSNormQuant | None = None,
    ) -> AddRMSNormQuant:
        """All-reduce + add + RMSNorm + per-group quantisation; scales that are powers of two take a second launch.

        Copied into out if given: it may be inputs, and what aiter's kernels make of that is not known.
        """
        if out is not None:
            arguments = (x, residual, weight, eps, weight_bias, group_size, emit_norm, scale_layout)
            return _copied(self.allreduce_rmsnorm_quant(*arguments), out)
        if scale_layout is ScaleLayout.UE8M0_PACKED:
            norm, residual_out = self.allreduce_rmsnorm(x, residual, weight, eps, weight_bias)
            fp8, scale, _ = self._local.per_group_quant_fp8(norm, group_size=group_size, scale_layout=scale_layout)
            return AddRMSNormQuant(fp8, scale, residual_out, norm if emit_norm else None, scale_layout)
        x = x.detach().contiguous()
        fp8 = torch.empty_like(x, dtype=torch.float8_e4m3fn)  # of gfx95x
        scale = x.new_empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float32)
        residual_out = torch.empty_like(x)
        emitted = torch.empty_like(x) if emit_norm else None
        handle, address, num_bytes = _registered_input(self._communicator)
        self._allreduce_rmsnorm_quant(
            handle,
            x,
            _given(residual, x),
            residual_out,
            fp8,
            scale,
            _folded(weight, weight_bias, x.dtype),
            eps,
            group_size,
            address,
            num_bytes,
            x.nbytes <= _SINGLE_STAGE_BYTES,
            0 if emitted is None else emitted.data_ptr(),
        )
        if scale_layout is ScaleLayout.COLUMN_MAJOR:
            scale = _column_major(scale.flatten(0, -2))
        return AddRMSNormQuant(fp8, scale, residual_out, emitted, scale_layout)

    def close(self) -> None:
        """Gives up aiter's group if it was made here. Not collective; closing twice is fine."""
        if self._owns_group:
            self._owns_group = False
            resolve(DESTROY_GROUP)()


def _vote(exchange: Exchange, ballot: Ballot) -> list[Ballot]:
    return [Ballot.unpack(data) for data in exchange(ballot.pack())]


def _initialize(ranks: Sequence[int], device: torch.device) -> str:
    """Makes aiter's groups over all ranks; what went wrong, or nothing."""
    try:
        resolve(INITIALIZE_WORLD)(len(ranks), dist.get_rank(), "env://", device.index, "nccl")
        resolve(INITIALIZE_GROUP)(len(ranks), 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def _copied(result: _Result, out: _Result) -> _Result:
    for source, target in zip(result, out, strict=True):
        if isinstance(source, torch.Tensor) and isinstance(target, torch.Tensor):
            target.copy_(source)
    return out


def _given(residual: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """aiter wants a residual."""
    return torch.zeros_like(x) if residual is None else residual.detach().contiguous()


def _folded(weight: torch.Tensor, bias: float, dtype: torch.dtype) -> torch.Tensor:
    """aiter reads the weight as if it had x's dtype, whatever it has."""
    weight = weight.detach().contiguous()
    if bias == 0.0:
        return weight.to(dtype)
    return (weight.float() + bias).to(dtype)


def _column_major(scale: torch.Tensor) -> torch.Tensor:
    """``[T, G]`` with strides ``(1, round_up(T, 4))``; aiter knows no padding between columns."""
    tokens, groups = scale.shape
    padded = torch.empty_strided((tokens, groups), (1, -(-tokens // 4) * 4), dtype=scale.dtype, device=scale.device)
    return padded.copy_(scale)
