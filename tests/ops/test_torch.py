"""The native operators inside torch: schemas, fakes, torch.compile, autograd and inference modes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cases import DTYPES, make
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedcomm import AddRMSNorm, AddRMSNormQuant, ScaleLayout, native, ops

LAYOUTS = list(ScaleLayout)
FLAGS = {
    ScaleLayout.ROW_MAJOR: (False, False),
    ScaleLayout.COLUMN_MAJOR: (True, False),
    ScaleLayout.UE8M0_PACKED: (False, True),
}


@pytest.fixture(autouse=True)
def library() -> None:
    assert native.load() is not None, "the native library is not built"


def samples(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """(operator, arguments) for every operator without a communicator."""
    x, residual = make(1, (3, 256), dtype, "ordinary"), make(2, (3, 256), dtype, "ordinary")
    weight, out, other = make(3, (256,), dtype, "ordinary"), torch.empty_like(x), torch.empty_like(x)
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (x, weight, 1e-6, 0.0)),
        ("rms_norm_out", (x, weight, 1e-6, 0.0, out)),
        ("fused_add_rms_norm", (x, residual, weight, 1e-6, 1.0)),
        ("fused_add_rms_norm", (x, None, weight.float(), 1e-6, 1.0)),
        ("fused_add_rms_norm_out", (x, residual, weight, 1e-6, 1.0, out, other)),
        ("fused_add_rms_norm_out", (x, None, weight, 1e-6, 1.0, out, other)),
    ]
    for layout in LAYOUTS:
        for fp8 in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            fnuz = fp8 is torch.float8_e4m3fnuz
            quant = ops.per_group_quant_fp8(x, scale_layout=layout, fp8_dtype=fp8)
            found += [
                ("per_group_quant_fp8", (x, 128, *FLAGS[layout], fnuz)),
                ("per_group_quant_fp8_out", (x, 64 if quant.scale.shape[-1] == 4 else 128, quant.fp8, quant.scale)),
                ("fused_add_rms_norm_quant", (x, residual, weight, 1e-6, 0.0, 128, *FLAGS[layout], fnuz)),
                ("fused_add_rms_norm_quant", (x, None, weight, 1e-6, 0.0, 128, *FLAGS[layout], fnuz)),
                (
                    "fused_add_rms_norm_quant_out",
                    (x, residual, weight, 1e-6, 0.0, 128, quant.fp8, quant.scale, out, other),
                ),
                ("fused_add_rms_norm_quant_out", (x, None, weight, 1e-6, 0.0, 128, quant.fp8, quant.scale, out, None)),
            ]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    """Registration, fakes, tracing with dynamic shapes; and the schema, which torch cannot check on FP8 tensors."""
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, arguments in samples(dtype):
        utils = without_schema if "quant" in name else ("test_schema", *without_schema)
        torch.library.opcheck(getattr(torch.ops.fusedcomm, name).default, arguments, test_utils=utils)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_what_the_schema_says_is_mutated(dtype: torch.dtype) -> None:
    """What opcheck's test_schema does, for FP8 tensors too."""
    for name, arguments in samples(dtype):
        operator = getattr(torch.ops.fusedcomm, name).default
        given = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        results = operator(*given)
        results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
        for declared, before, after in zip(operator._schema.arguments, arguments, given, strict=True):
            if not isinstance(before, torch.Tensor):
                continue
            assert after.data_ptr() not in [t.data_ptr() for t in results], f"{name}: a result aliases {declared.name}"
            written = declared.alias_info is not None and declared.alias_info.is_write
            assert written or equal(before, after), f"{name}: {declared.name} is mutated"


def test_every_local_operator_has_been_checked() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedcomm::")}
    local = {name.split(".")[0] for name in names if not name.startswith("comm_")}
    assert local == {name for name, _ in samples(torch.bfloat16)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(256,), (0, 256), (5, 256), (2, 3, 1280)])
def test_fakes_have_the_strides_of_the_real_results(layout: ScaleLayout, shape: tuple[int, ...]) -> None:
    x, weight = make(1, shape, torch.bfloat16, "ordinary"), torch.ones(shape[-1])
    real = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, scale_layout=layout, emit_bf16=True)
    with FakeTensorMode() as mode:
        fake_x, fake_weight = mode.from_tensor(x), mode.from_tensor(weight)
        fake = ops.fused_add_rms_norm_quant(fake_x, fake_x, fake_weight, 1e-6, scale_layout=layout, emit_bf16=True)
    for a, b in zip(real[:4], fake[:4], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, layout: ScaleLayout) -> tuple[Any, ...]:
    """All local ops with what surrounds them in a model."""
    norm, residual = ops.fused_add_rms_norm(x * 2, residual, weight, 1e-6)
    again = ops.rms_norm(norm + 1, weight, 1e-6, weight_bias=1.0)
    quant = ops.per_group_quant_fp8(again, scale_layout=layout)
    full = ops.fused_add_rms_norm_quant(again, residual, weight, 1e-6, emit_bf16=True, scale_layout=layout)
    return norm, residual, again, quant.fp8, quant.scale, *full[:4]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.stride() == b.stride() and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_without_graph_breaks(backend: str, layout: ScaleLayout) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler: found neither g++ nor clang++")
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    weight = make(3, (1280,), torch.bfloat16, "ordinary")
    for rows in (4, 4, 7):  # the second shape makes the first dimension dynamic
        x = make(rows, (rows, 1280), torch.bfloat16, "ordinary")
        residual = make(9, (rows, 1280), torch.bfloat16, "finite")
        got, want = compiled(x, residual, weight, layout), block(x, residual, weight, layout)
        assert all(equal(a, b) for a, b in zip(got, want, strict=True))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(make(1, (256,), torch.float32, "ordinary"))
        self.linear = torch.nn.Linear(256, 256)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> AddRMSNormQuant:
        return ops.fused_add_rms_norm_quant(self.linear(x), residual, self.weight, 1e-6, emit_bf16=True)


@torch.no_grad()
def test_compile_of_a_module() -> None:
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, residual = make(2, (5, 256), torch.float32, "ordinary"), make(3, (5, 256), torch.float32, "ordinary")
    got, want = compiled(x, residual), layer(x, residual)
    assert got.scale_layout is ScaleLayout.ROW_MAJOR
    assert all(equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))


def test_compile_keeps_what_out_forms_mutate() -> None:
    def into(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        ops.rms_norm(x, weight, 1e-6, out=out)
        return out + 1

    torch._dynamo.reset()
    x, weight, out = make(1, (3, 64), torch.float32, "ordinary"), torch.ones(64), torch.zeros(3, 64)
    got = torch.compile(into, backend="aot_eager", fullgraph=True)(x, weight, out)
    want = ops.rms_norm(x, weight, 1e-6)
    assert torch.equal(out, want)
    assert torch.equal(got, want + 1)


def test_compile_of_the_fused_out_form() -> None:
    def into(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return ops.fused_add_rms_norm(x, residual, weight, 1e-6, out=AddRMSNorm(out, residual)).norm * 2

    torch._dynamo.reset()
    x, weight = make(1, (3, 64), torch.float32, "ordinary"), torch.ones(64)
    residual, out = make(2, (3, 64), torch.float32, "ordinary"), torch.zeros(3, 64)
    want = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    got = torch.compile(into, backend="aot_eager", fullgraph=True)(x, residual, weight, out)
    assert torch.equal(out, want.norm)
    assert torch.equal(residual, want.residual)
    assert torch.equal(got, want.norm * 2)


def test_inference_mode_and_no_grad() -> None:
    x, weight = make(1, (3, 256), torch.bfloat16, "ordinary"), torch.nn.Parameter(torch.ones(256))
    want = ops.rms_norm(x, weight.detach(), 1e-6)
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, weight, 1e-6), want)
    with torch.inference_mode():
        assert torch.equal(ops.rms_norm(x, weight, 1e-6), want)
        assert torch.equal(ops.rms_norm(x, weight, 1e-6, out=torch.empty_like(x)), want)


def test_a_gradient_is_not_wrong_in_silence() -> None:
    """The ops are for inference: a backward pass through one is refused, or torch warns of it."""
    x = torch.ones(3, 256, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(256), 1e-6)
    if not y.requires_grad:
        return
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        y.sum().backward()
