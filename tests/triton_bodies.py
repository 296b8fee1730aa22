"""Bodies of tests of the Triton backend that need more than results: they run where the backend does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import make
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedcomm import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout, ops
from fusedcomm.ops import reference

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Both None, or the same shape, strides and bits."""
    if a is None or b is None:
        return a is b
    bits = BITS[a.element_size()]
    a, b = a.cpu(), b.cpu()
    return a.stride() == b.stride() and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def all_equal(a: Any, b: Any) -> bool:
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


def results_in_place_of_inputs(device: str, dtype: torch.dtype, hidden: int) -> None:
    """Every alias that the docstrings allow."""
    weight = make(3, (hidden,), dtype, "ordinary")

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(make(seed, (3, hidden), dtype, "ordinary").to(device) for seed in (1, 2))  # type: ignore[return-value]

    want = reference.fused_add_rms_norm(*(t.cpu() for t in inputs()), weight, 1e-6)
    alone = reference.rms_norm(inputs()[0].cpu(), weight, 1e-6)
    weight = weight.to(device)
    aliases: list[Callable[[torch.Tensor, torch.Tensor], AddRMSNorm]] = [
        lambda x, residual: AddRMSNorm(x, residual),
        lambda x, residual: AddRMSNorm(torch.empty_like(x), residual),
        lambda x, residual: AddRMSNorm(x, torch.empty_like(x)),
        lambda x, residual: AddRMSNorm(residual, x),
    ]
    for alias in aliases:
        x, residual = inputs()
        out = alias(x, residual)
        got = ops.fused_add_rms_norm(x, residual, weight, 1e-6, out=out)
        assert got.norm is out.norm
        assert got.residual is out.residual
        assert all_equal(got, want)
    x, residual = inputs()
    assert equal(ops.rms_norm(x, weight, 1e-6, out=x), alone)
    if hidden % 128:
        return
    full = reference.fused_add_rms_norm_quant(*(t.cpu() for t in inputs()), weight.cpu(), 1e-6, emit_bf16=True)
    x, residual = inputs()
    fp8, scale = torch.empty_like(full.fp8, device=device), torch.empty_like(full.scale, device=device)
    into = AddRMSNormQuant(fp8, scale, residual, x, full.scale_layout)
    got_all = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, emit_bf16=True, out=into)
    assert all_equal(got_all[:4], full[:4])


def only_its_own_memory_is_written(device: str, layout: ScaleLayout, groups: int) -> None:
    """fp8 and scale lie in the middle of poisoned memory; padding rows stay as they were."""
    for rows in (1, 3, 4, 5):
        x = make(rows, (rows, groups * 32), torch.bfloat16, "ordinary")
        want = reference.per_group_quant_fp8(x, group_size=32, scale_layout=layout)
        memory = torch.full((4096,), -7, dtype=torch.int32, device=device)
        codes = torch.full((x.numel() + 256,), 0x55, dtype=torch.uint8, device=device)
        scale = memory.view(want.scale.dtype).as_strided(want.scale.shape, want.scale.stride(), 64)
        fp8 = codes[128:-128].view(torch.float8_e4m3fn).view(x.shape)
        ops.per_group_quant_fp8(x.to(device), group_size=32, scale_layout=layout, out=GroupQuant(fp8, scale, layout))
        expected = torch.full((4096,), -7, dtype=torch.int32)
        at = expected.view(want.scale.dtype).as_strided(want.scale.shape, want.scale.stride(), 64)
        at.copy_(want.scale)
        assert torch.equal(memory.cpu(), expected)
        assert torch.equal(codes.cpu()[128:-128].view(x.shape), want.fp8.view(torch.uint8))
        assert bool((codes[:128] == 0x55).all())
        assert bool((codes[-128:] == 0x55).all())


def memory_under_columns_is_of_whole_fours_of_rows(device: str, layout: ScaleLayout) -> None:
    for shape in ((256,), (1, 384), (2, 384), (3, 384), (3, 3, 384), (4, 384)):
        x, weight = make(1, shape, torch.bfloat16, "ordinary").to(device), torch.ones(shape[-1], device=device)
        results: list[GroupQuant | AddRMSNormQuant] = [ops.per_group_quant_fp8(x, scale_layout=layout)]
        for emit in (False, True):
            results.append(ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=emit))
        padded = (x.numel() // shape[-1] + 3) // 4 * 4
        for got in results:
            assert got.fp8.shape == x.shape
            assert got.fp8.is_contiguous()
            assert got.fp8.untyped_storage().nbytes() == padded * shape[-1]
            assert got.scale.untyped_storage().nbytes() == 4 * padded * got.scale.shape[-1]


def _block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, layout: ScaleLayout) -> tuple[Any, ...]:
    """All local ops with what surrounds them in a model."""
    norm, residual = ops.fused_add_rms_norm(x * 2, residual, weight, 1e-6)
    again = ops.rms_norm(norm + 1, weight, 1e-6, weight_bias=1.0)
    quant = ops.per_group_quant_fp8(again, scale_layout=layout)
    full = ops.fused_add_rms_norm_quant(again, residual, weight, 1e-6, emit_bf16=True, scale_layout=layout)
    return norm, residual, again, quant.fp8, quant.scale, *full[:4]


def compiles_without_graph_breaks(device: str, backend: str, layout: ScaleLayout) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_block, backend=backend, fullgraph=True)
    weight = make(3, (384,), torch.bfloat16, "ordinary").to(device)
    for rows in (4, 4, 7):  # the second shape makes the first dimension dynamic
        x = make(rows, (rows, 384), torch.bfloat16, "ordinary").to(device)
        residual = make(9, (rows, 384), torch.bfloat16, "ordinary").to(device)
        assert all_equal(compiled(x, residual, weight, layout), _block(x, residual, weight, layout))


def _into(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return ops.fused_add_rms_norm(x, residual, weight, 1e-6, out=AddRMSNorm(out, residual)).norm * 2


def compiled_code_mutates_as_eager_code_does(device: str) -> None:
    torch._dynamo.reset()
    x, residual = (make(seed, (3, 64), torch.float32, "ordinary").to(device) for seed in (1, 2))
    weight, out = torch.ones(64, device=device), torch.zeros(3, 64, device=device)
    want = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    got = torch.compile(_into, backend="aot_eager", fullgraph=True)(x, residual, weight, out)
    assert equal(out, want.norm)
    assert equal(residual, want.residual)
    assert equal(got, want.norm * 2)


def fakes_have_the_strides_of_results(device: str, layout: ScaleLayout) -> None:
    for shape in ((256,), (0, 256), (5, 256), (2, 3, 384)):
        x, weight = make(1, shape, torch.bfloat16, "ordinary").to(device), torch.ones(shape[-1], device=device)
        real = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=True)
        with FakeTensorMode() as mode:
            fakes = mode.from_tensor(x), mode.from_tensor(weight)
            fake = ops.fused_add_rms_norm_quant(fakes[0], fakes[0], fakes[1], 1e-6, scale_layout=layout, emit_bf16=True)
        for a, b in zip(real[:4], fake[:4], strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def opcheck(device: str) -> None:
    """Registration, fakes and tracing of the operators; and the schema, which torch cannot check on FP8 tensors."""
    x, residual = (make(seed, (3, 256), torch.bfloat16, "ordinary").to(device) for seed in (1, 2))
    weight, norm, r = torch.ones(256, device=device), torch.empty_like(x), torch.empty_like(x)
    fp8, scale, _ = reference.per_group_quant_fp8(x)
    found = {
        "rms_norm": [(x, residual, weight, 1e-6, 0.0, norm, r), (x, None, weight, 1e-6, 0.0, norm, None)],
        "rms_norm_quant": [
            (x, residual, weight, 1e-6, 0.0, 128, fp8, scale, r, norm),
            (x, None, weight, 1e-6, 0.0, 128, fp8, scale, r, None),
        ],
        "group_quant": [(x, 128, fp8, scale)],
    }
    ops.rms_norm(x, weight, 1e-6)  # registers them
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, samples in found.items():
        utils = without_schema if "quant" in name else ("test_schema", *without_schema)
        for arguments in samples:
            torch.library.opcheck(getattr(torch.ops.fusedcomm_triton, name).default, arguments, test_utils=utils)


def graph_replays(device: str) -> None:
    """A CUDA graph with every op in it, replayed on other inputs."""
    weight = make(3, (384,), torch.bfloat16, "ordinary").to(device)
    x, residual = (make(seed, (7, 384), torch.bfloat16, "ordinary").to(device) for seed in (1, 2))
    layout = ScaleLayout.UE8M0_PACKED
    _block(x, residual, weight, layout)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _block(x, residual, weight, layout)
    for seed in (3, 4):
        x.copy_(make(seed, (7, 384), torch.bfloat16, "ordinary"))
        graph.replay()
        assert all_equal(results, _block(x, residual, weight, layout))
