"""What bodies on ranks share: inputs that any rank can make for all, collectives checked against the specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import spec
import torch
import torch.distributed as dist
from cases import make
from harness import device

import fusedcomm
from fusedcomm import GroupCoordinator, ScaleLayout, Settings


def input_of(seed: int, rank: int, shape: Sequence[int], dtype: torch.dtype, kind: str = "ordinary") -> torch.Tensor:
    """The partial sum of a rank (of the group) in a call."""
    return make(seed * 64 + rank, tuple(shape), dtype, kind)


def inputs_of_all(
    group: GroupCoordinator, seed: int, shape: Sequence[int], dtype: torch.dtype, kind: str = "ordinary"
) -> list[torch.Tensor]:
    """What input_of gives on every rank of the group, in rank order; all different."""
    return [input_of(seed, rank, shape, dtype, kind) for rank in range(group.world_size)]


# A kernel that waits for ever costs a run on GPUs this long; a body of many calls may take longer.
GPU_TIMEOUT_S: Final = 12.0


def new_group(
    ranks: Sequence[int] | None = None, *, settings: Settings | None = None, **options: Any
) -> GroupCoordinator:
    """A GroupCoordinator on the device that this rank was given: the CPU, or its GPU."""
    where = device()
    if settings is not None and where.type == "cuda" and settings.timeout_s == Settings().timeout_s:
        settings = dataclasses.replace(settings, timeout_s=GPU_TIMEOUT_S)
    return GroupCoordinator(ranks, device=where, settings=settings, **options)


def init_group(**options: Any) -> GroupCoordinator:
    """fusedcomm.init_distributed on the device that this rank was given."""
    return fusedcomm.init_distributed(device=device(), **options)


def gathered(x: torch.Tensor) -> list[torch.Tensor]:
    """x of every rank of the world, carried by torch.distributed, on the CPU."""
    x = x.detach().cpu()
    data = x.contiguous().view(torch.uint8) if x.dim() and x.numel() else torch.empty(0, dtype=torch.uint8)
    parts = [torch.empty_like(data) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, data)
    return [part.view(x.dtype).view(x.shape) if part.numel() else torch.empty_like(x) for part in parts]


def own_input(
    group: GroupCoordinator, seed: int, shape: Sequence[int], dtype: torch.dtype, kind: str = "ordinary"
) -> torch.Tensor:
    """input_of of this rank, where the group's calls take it."""
    return input_of(seed, group.rank, shape, dtype, kind).to(group.device)


def on_device(group: GroupCoordinator, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors where the group's calls take them."""
    return tuple(None if t is None else t.to(group.device) for t in tensors)


def poison(*like: torch.Tensor | None) -> None:
    """Leaves NaN where the allocator will place the next results of these sizes."""
    blocks = [torch.full_like(t, torch.nan) for t in like if t is not None and t.is_floating_point()]
    del blocks


def raises(kind: type[BaseException], call: Callable[[], Any], *parts: str) -> str:
    """The message of the error that the call must raise; it must contain every part."""
    try:
        result = call()
    except BaseException as error:
        if type(error) is not kind:
            raise
        text = str(error)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{missing} are not in: {text}"
        return text
    raise AssertionError(f"expected {kind.__name__}, got {result!r}")


def works(group: GroupCoordinator) -> None:
    """The next call of a group is right on all ranks."""
    check_all_reduce(group, seed=99, shape=(3, 128), dtype=torch.bfloat16)


# ---- collectives against the specification; every rank of the group calls them with the same arguments ----


def check_all_reduce(
    group: GroupCoordinator,
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str = "ordinary",
    call: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The sum has the bits of the fp32 sum in rank order."""
    parts = inputs_of_all(group, seed, shape, dtype, kind)
    x = parts[group.rank].to(group.device, copy=True)
    poison(x)
    got = (call or group.all_reduce)(x)
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert tuple(got.shape) == tuple(shape)
    spec.assert_same(got, spec.rank_order_sum(parts), f"all_reduce {tuple(shape)}")
    spec.assert_same(x, spec.widen(parts[group.rank]), "x")  # left alone
    return got


def check_norm(
    group: GroupCoordinator,
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str = "ordinary",
    *,
    residual: bool = True,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    weight_dtype: torch.dtype | None = None,
    fused_only: bool = False,
) -> fusedcomm.AddRMSNorm:
    """Norm and residual have the bits of the specification; each rank adds a residual of its own."""
    parts = inputs_of_all(group, seed, shape, dtype, kind)
    own_residual = input_of(seed + 1000, group.rank, shape, dtype) if residual else None
    weight = make(seed + 5, tuple(shape[-1:]), weight_dtype or dtype, "ordinary")
    want = spec.add_norm(spec.rank_order_sum(parts), own_residual, weight, eps, dtype, weight_bias)
    x, own_residual, weight = on_device(group, parts[group.rank], own_residual, weight)
    poison(x, x)
    function = group.fused_allreduce_rmsnorm if fused_only else group.allreduce_rmsnorm
    got = function(x, own_residual, weight, eps, weight_bias=weight_bias)
    assert got is not None
    spec.assert_same(got.residual, want.residual, f"residual {tuple(shape)}")
    spec.assert_same(got.norm, want.norm, f"norm {tuple(shape)}")
    return got


def check_quant(
    group: GroupCoordinator,
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str = "ordinary",
    *,
    residual: bool = True,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    group_size: int = 128,
    emit_bf16: bool = False,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    fused_only: bool = False,
) -> fusedcomm.AddRMSNormQuant:
    """FP8, scales byte by byte, residual and norm have the bits of the specification."""
    parts = inputs_of_all(group, seed, shape, dtype, kind)
    own_residual = input_of(seed + 1000, group.rank, shape, dtype) if residual else None
    weight = make(seed + 5, tuple(shape[-1:]), dtype, "ordinary")
    want = spec.add_norm(spec.rank_order_sum(parts), own_residual, weight, eps, dtype, weight_bias)
    quant = spec.quantise(want.norm, group_size, ue8m0=scale_layout is ScaleLayout.UE8M0_PACKED)
    x, own_residual, weight = on_device(group, parts[group.rank], own_residual, weight)
    poison(x, x)
    function = group.fused_allreduce_rmsnorm_quant_per_group if fused_only else group.allreduce_rmsnorm_quant
    got = function(
        x,
        own_residual,
        weight,
        eps,
        group_size=group_size,
        emit_bf16=emit_bf16,
        scale_layout=scale_layout,
        weight_bias=weight_bias,
    )
    assert got is not None
    assert got.scale_layout is scale_layout
    assert got.fp8.dtype is torch.float8_e4m3fn
    spec.assert_same(got.residual, want.residual, f"residual {tuple(shape)}")
    spec.assert_codes(got.fp8, quant.codes, f"fp8 {tuple(shape)}")
    spec.assert_scale(got.scale, quant, scale_layout.value)
    assert (got.norm is not None) == emit_bf16
    if got.norm is not None:
        spec.assert_same(got.norm, want.norm, f"norm {tuple(shape)}")
    return got


def bits(t: torch.Tensor | None) -> bytes:
    """All bytes of the values, in the order of the shape."""
    if t is None or not t.numel():
        return b""
    # contiguous() would leave the strides of a single element as they are
    return t.detach().cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def bits_but_nan(t: torch.Tensor | None) -> bytes:
    """As bits, with one NaN for all: its sign and payload are not promised."""
    if t is None or not t.is_floating_point():
        return bits(t)
    return bits(torch.where(t.float().isnan(), torch.nan, t.float()))


def same_on_all_ranks(t: torch.Tensor) -> None:
    """The world's ranks hold the same bits."""
    parts = gathered(t)
    mine = parts[dist.get_rank()].contiguous().view(torch.uint8)
    for rank, part in enumerate(parts):
        assert torch.equal(part.contiguous().view(torch.uint8), mine), f"rank {rank} has other bits"


def random_shape(rng: np.random.Generator, multiple: int = 1, most: int = 1024) -> tuple[int, ...]:
    """[..., H] with H a multiple; sometimes no rows, one, or several leading dimensions."""
    hidden = multiple * int(rng.integers(1, most // multiple + 1))
    rows = int(rng.choice([0, 1, 1, 2, 3, 5]))
    return [(rows, hidden), (hidden,), (1, rows, hidden), (rows, 2, hidden)][int(rng.integers(0, 4))]
