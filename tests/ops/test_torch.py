"""The native operators inside torch: schemas, fakes, torch.compile, autograd and inference modes."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import DTYPES, make
from op_samples import block, check_mutation, check_registration, equal, samples
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedcomm import AddRMSNorm, AddRMSNormQuant, ScaleLayout, native, ops

LAYOUTS = list(ScaleLayout)


@pytest.fixture(autouse=True)
def library() -> None:
    assert native.load() is not None, "the native library is not built"


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    check_registration(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_what_the_schema_says_is_mutated(dtype: torch.dtype) -> None:
    check_mutation(dtype)


def test_every_local_operator_has_been_checked() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedcomm::")}
    local = {name.split(".")[0] for name in names if not name.startswith("comm_")}
    # no form for CPUs: tests/gpu/test_sparse_mla_native.py, tests/unit/test_sampling_schemas.py
    gpu = {"sparse_mla_decode_out", "sparse_mla_active_clusters", *native.SAMPLING_OPERATORS}
    assert local - gpu == {name for name, _ in samples(torch.bfloat16)}


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
