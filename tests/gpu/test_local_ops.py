"""The local ops on a GPU: to the bit the specification, in every backend, and as torch.compile sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import spec
import torch
from cases import DTYPES, GROUP_SIZES, KINDS, make
from op_samples import block, check_mutation, check_registration, equal
from oracle import Options
from trials import Findings, random_tensor, spoil

from fusedcomm import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout, native, ops, platform
from fusedcomm.ops import dispatch

LAYOUTS = list(ScaleLayout)
HIDDEN = (1, 7, 33, 64, 96, 100, 1000, 1023, 1536, 2048, 4096, 5120, 7168, 8192, 12289, 16384, 16392, 32767, 32768)
ROWS = (0, 1, 3, 17, 130, 600)


@pytest.fixture(scope="module")
def where(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors live."""
    return torch.device("cpu" if request.config.getoption("on_cpu") else "cuda:0")


@pytest.fixture(params=["native", "triton", "torch"])
def backend(request: pytest.FixtureRequest, where: torch.device) -> Iterator[str]:
    """The backends of the local ops that this machine has, behind the same functions."""
    name = str(request.param)
    if name == "native" and where.type == "cuda":
        assert native.load_gpu() is not None, "the GPU library is not there"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FUSEDCOMM_BACKEND", name)
        monkeypatch.setattr(dispatch, "_chosen", {})
        try:
            found = dispatch.local_backend(where.type)
        except Exception as error:
            if name == "native":
                raise
            pytest.skip(f"{name} does not serve {where.type}: {error}")
        assert found == name
        yield name


def some(values: Any, backend: str, *few: Any) -> Any:
    """All values; for Triton, which compiles a kernel for every width, dtype and form, those named."""
    return few if backend == "triton" else values


def check_norms(findings: Findings, seed: int, shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> None:
    kind = ("ordinary", "ordinary", "bits", "specials")[seed % 4]
    x = random_tensor(seed, shape, dtype, kind, where)
    residual = None if seed % 5 == 0 else random_tensor(seed + 1, shape, dtype, "ordinary", where)
    weight = random_tensor(seed + 2, shape[-1:], torch.float32 if seed % 3 == 0 else dtype, "ordinary", where)
    options = Options(eps=(1e-6, 0.0, 1.0)[seed % 3], weight_bias=(0.0, 1.0)[seed % 2])
    what = f"{'x'.join(map(str, shape))} {dtype} {kind} seed={seed}"
    want = oracle.add_norm(x, residual, weight, options)
    got = ops.fused_add_rms_norm(x, residual, weight, options.eps, weight_bias=options.weight_bias)
    findings.check(f"fused_add_rms_norm {what}", oracle.complaint(got, want))
    alone = {"out": oracle.add_norm(x, None, weight, options)["norm"]}
    normed = ops.rms_norm(x, weight, options.eps, weight_bias=options.weight_bias)
    findings.check(f"rms_norm {what}", oracle.complaint(normed, alone))


def check_quants(
    findings: Findings,
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    group_size: int,
    layout: ScaleLayout,
    where: torch.device,
) -> None:
    kind = ("ordinary", "ordinary", "specials")[seed % 3]
    x = random_tensor(seed, shape, dtype, kind, where)
    residual = None if seed % 4 == 0 else random_tensor(seed + 1, shape, dtype, "ordinary", where)
    weight = random_tensor(seed + 2, shape[-1:], dtype, "ordinary", where)
    fp8 = platform.fp8_dtype(where)
    emit = seed % 2 == 0
    options = Options(1e-6, float(seed % 2), group_size, emit, layout, fp8)
    what = f"{'x'.join(map(str, shape))} {dtype} g={group_size} {layout.value} {kind} seed={seed}"
    quant = ops.per_group_quant_fp8(x, group_size=group_size, scale_layout=layout)
    findings.check(f"per_group_quant_fp8 {what}", oracle.complaint(quant, oracle.quantised(x, options), options))
    want = oracle.add_norm(x, residual, weight, options)
    want |= oracle.quantised(want["norm"], options)
    if not emit:
        del want["norm"]
    got = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, **options.quant)
    findings.check(f"fused_add_rms_norm_quant {what}", oracle.complaint(got, want, options))


def test_the_oracle_on_this_device(where: torch.device) -> None:
    """What judges the rest: the same bits as the NumPy specification, for all kinds of values."""
    findings = Findings()
    for seed, (kind, dtype) in enumerate(itertools.product(KINDS, DTYPES)):
        for hidden in (256, 1280, 4096):
            x, residual = make(seed, (5, hidden), dtype, kind), make(seed + 1, (5, hidden), dtype, "ordinary")
            weight = make(seed + 2, (hidden,), dtype, "ordinary")
            want = spec.add_norm(spec.widen(x), residual, weight, 1e-6, dtype, 1.0)
            options = Options(1e-6, 1.0, scale_layout=ScaleLayout.UE8M0_PACKED if seed % 2 else ScaleLayout.ROW_MAJOR)
            got = oracle.add_norm(x.to(where), residual.to(where), weight.to(where), options)
            quant = oracle.quantised(got["norm"], options)
            expected = spec.quantise(want.norm, 128, ue8m0=bool(seed % 2))
            total = oracle.rank_order_sum([x.to(where), residual.to(where), x.to(where)])
            try:
                spec.assert_same(got["norm"], want.norm, "norm")
                spec.assert_same(got["residual"], want.residual, "residual")
                spec.assert_codes(quant["fp8"], expected.codes)
                if not seed % 2:
                    spec.assert_same(quant["scale"], expected.scale, "scale")
                spec.assert_same(total, spec.rank_order_sum([x, residual, x]), "sum")
                complaint = ""
            except AssertionError as error:
                complaint = str(error)
            findings.check(f"{kind} {dtype} H={hidden}", complaint)
    findings.settle()


@pytest.mark.smoke
def test_norms(backend: str, where: torch.device) -> None:
    findings = Findings()
    hidden_sizes, dtypes = some(HIDDEN, backend, 1000, 4096), some(DTYPES, backend, torch.bfloat16)
    for seed, (hidden, dtype) in enumerate(itertools.product(hidden_sizes, dtypes)):
        for number, rows in enumerate(ROWS if hidden <= 16384 else (1, 3)):
            if backend != "native" and rows > 130:
                continue
            check_norms(findings, 7 * seed + number, (rows, hidden), dtype, where)
        check_norms(findings, seed, (hidden,), dtype, where)
    check_norms(findings, 1, (2, 3, 0, 128), torch.bfloat16, where)
    check_norms(findings, 1, (2, 3, 5, 128), torch.bfloat16, where)
    findings.settle(backend)


@pytest.mark.smoke
def test_quantisation(backend: str, where: torch.device) -> None:
    findings = Findings()
    sizes, dtypes = some([h for h in HIDDEN if h % 32 == 0], backend, 1536), some(DTYPES, backend, torch.bfloat16)
    for seed, (hidden, layout, dtype) in enumerate(itertools.product(sizes, LAYOUTS, dtypes)):
        for number, rows in enumerate((0, 1, 5, 66) if backend == "native" and hidden <= 16384 else (1, 5)):
            for group_size in (g for g in GROUP_SIZES if hidden % g == 0):
                if group_size != 128 and ((seed + number) % 3 or backend == "triton"):
                    continue
                check_quants(findings, 5 * seed + number, (rows, hidden), dtype, group_size, layout, where)
        if hidden % 128 == 0:
            check_quants(findings, seed, (2, 3, hidden), dtype, 128, layout, where)
    findings.settle(backend)


def test_against_the_specification(backend: str, where: torch.device) -> None:
    """Without the oracle between: small tensors of every kind, judged by NumPy."""
    findings = Findings()
    dtypes = some(DTYPES, backend, torch.bfloat16)
    for seed, (kind, dtype, layout) in enumerate(itertools.product(KINDS, dtypes, LAYOUTS)):
        x, residual = make(seed, (5, 1280), dtype, kind), make(seed + 1, (5, 1280), dtype, "ordinary")
        weight = make(seed + 2, (1280,), dtype, "ordinary")
        want = spec.add_norm(spec.widen(x), residual, weight, 1e-6, dtype)
        quant = spec.quantise(want.norm, 128, ue8m0=layout is ScaleLayout.UE8M0_PACKED)
        got = ops.fused_add_rms_norm_quant(
            x.to(where), residual.to(where), weight.to(where), 1e-6, emit_bf16=True, scale_layout=layout
        )
        try:
            spec.assert_same(got.residual, want.residual, "residual")
            spec.assert_same(got.norm, want.norm, "norm")
            spec.assert_codes(got.fp8, quant.codes)
            spec.assert_scale(got.scale, quant, layout.value)
            complaint = ""
        except AssertionError as error:
            complaint = str(error)
        findings.check(f"{kind} {dtype} {layout.value}", complaint)
    findings.settle(backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_conversion_to_fp8(backend: str, where: torch.device, dtype: torch.dtype) -> None:
    """All values of a 16-bit type, or a million fp32 bit patterns, by the scales that their groups have."""
    if dtype is torch.float32:
        values = random_tensor(3, (1 << 20,), dtype, "bits", where)
    else:
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=where)
        values = bits.to(torch.int16).view(dtype)
    findings = Findings()
    fp8 = platform.fp8_dtype(where)
    for order in (torch.argsort(values.abs().float()), torch.randperm(len(values), device=where)):
        x = values[order].view(-1, 1024)
        options = Options(group_size=32, fp8_dtype=fp8)
        got = ops.per_group_quant_fp8(x, group_size=32)
        findings.check("sorted, then shuffled", oracle.complaint(got, oracle.quantised(x, options), options))
    findings.settle(f"{backend} {dtype}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_forms_and_aliases(backend: str, where: torch.device, layout: ScaleLayout) -> None:
    findings = Findings()
    for seed, (dtype, shape) in enumerate(
        itertools.product(
            some(DTYPES, backend, torch.float16),
            some([(128,), (7, 384), (2, 3, 1280), (0, 256), (66, 4096)], backend, (7, 384), (0, 384)),
        )
    ):
        x, residual = (random_tensor(seed + n, shape, dtype, "ordinary", where) for n in (0, 1))
        weight = random_tensor(seed + 2, shape[-1:], dtype, "ordinary", where)
        what = f"{shape} {dtype} {layout.value}"
        pair = oracle.add_norm(x, residual, weight, Options())
        into = AddRMSNorm(torch.empty_like(x), torch.empty_like(x))
        spoil(into)
        got = ops.fused_add_rms_norm(x, residual, weight, 1e-6, out=into)
        assert got.norm is into.norm
        findings.check(f"out= {what}", oracle.complaint(got, pair))
        r = residual.clone()
        got = ops.fused_add_rms_norm(x, r, weight, 1e-6, out=AddRMSNorm(torch.empty_like(x), r))
        findings.check(f"residual in place {what}", oracle.complaint(got, pair))
        r, y = residual.clone(), x.clone()
        findings.check(
            f"both in place {what}",
            oracle.complaint(ops.fused_add_rms_norm(y, r, weight, 1e-6, out=AddRMSNorm(y, r)), pair),
        )
        y = x.clone()
        alone = {"out": oracle.add_norm(x, None, weight, Options())["norm"]}
        findings.check(f"norm in place {what}", oracle.complaint(ops.rms_norm(y, weight, 1e-6, out=y), alone))
        options = Options(scale_layout=layout, emit_bf16=True, fp8_dtype=platform.fp8_dtype(where))
        full = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, **options.quant)
        want = {**pair, **oracle.quantised(pair["norm"], options)}
        findings.check(f"quantised {what}", oracle.complaint(full, want, options))
        spoil(full)
        again = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, **options.quant, out=full)
        assert again.fp8 is full.fp8
        findings.check(f"quantised out= {what}", oracle.complaint(again, want, options))
        r, y = residual.clone(), x.clone()
        aliased = AddRMSNormQuant(full.fp8, full.scale, r, y, layout)
        again = ops.fused_add_rms_norm_quant(y, r, weight, 1e-6, **options.quant, out=aliased)
        findings.check(f"quantised in place {what}", oracle.complaint(again, want, options))
        quant = GroupQuant(full.fp8, full.scale, layout)
        spoil(quant)
        ops.per_group_quant_fp8(x, scale_layout=layout, out=quant)
        findings.check(f"quantise out= {what}", oracle.complaint(quant, oracle.quantised(x, options), options))
    findings.settle(backend)


def test_awkward_inputs(backend: str, where: torch.device) -> None:
    """Views that begin anywhere, strides, expanded dimensions; a row does not depend on the others."""
    findings = Findings()
    for dtype in some(DTYPES, backend, torch.bfloat16):
        weight = random_tensor(1, (1024,), dtype, "ordinary", where)
        room = random_tensor(2, (9 * 1024 + 16,), dtype, "ordinary", where)
        views = {f"{n} elements in": room[n : n + 9 * 1024].view(9, 1024) for n in (0, 1, 2, 3, 4, 8)}
        base = views["0 elements in"]
        views["transposed"] = base.t().contiguous().t()
        views["every other column"] = torch.stack([base, base], -1).flatten(-2)[:, ::2]
        views["expanded"] = base[3].expand(9, 1024)
        for name, x in views.items():
            want = oracle.add_norm(x.contiguous(), x.contiguous(), weight, Options())
            findings.check(f"{name} {dtype}", oracle.complaint(ops.fused_add_rms_norm(x, x, weight, 1e-6), want))
            quant = oracle.quantised(x.contiguous(), Options(fp8_dtype=platform.fp8_dtype(where)))
            findings.check(f"{name} {dtype} fp8", oracle.complaint(ops.per_group_quant_fp8(x), quant))
        many = random_tensor(3, (600, 1024), dtype, "ordinary", where)
        together = ops.fused_add_rms_norm_quant(many, None, weight, 1e-6)
        for row in (0, 17, 599):
            alone = ops.fused_add_rms_norm_quant(many[row : row + 1], None, weight, 1e-6)
            wrong = [int(oracle.different(a, b[row : row + 1])) for a, b in zip(alone[:3], together[:3], strict=True)]
            findings.check(f"row {row} {dtype}", f"differs when alone: {wrong}" if any(wrong) else "")
    findings.settle(backend)


@pytest.mark.needs_cuda
def test_in_graphs_and_on_side_streams(where: torch.device) -> None:
    findings = Findings()
    x = random_tensor(1, (17, 4096), torch.bfloat16, "ordinary", where)
    weight = random_tensor(2, (4096,), torch.bfloat16, "ordinary", where)
    options = Options(emit_bf16=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, emit_bf16=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, emit_bf16=True)
    for seed in range(5):
        x.copy_(random_tensor(seed, (17, 4096), torch.bfloat16, "ordinary", where))
        want = oracle.add_norm(x, x, weight, options)
        want |= oracle.quantised(want["norm"], options)
        spoil(results)
        graph.replay()
        findings.check(f"replay {seed}", oracle.complaint(results, want, options))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = ops.fused_add_rms_norm_quant(x, x, weight, 1e-6, emit_bf16=True)
        torch.cuda.current_stream().wait_stream(stream)
        findings.check(f"side stream {seed}", oracle.complaint(aside, want, options))
    findings.settle()


@pytest.mark.needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one(where: torch.device) -> None:
    torch.cuda.set_device(0)
    other = torch.device("cuda:1")
    findings = Findings()
    for seed in range(3):
        check_norms(findings, seed, (17, 4096), torch.bfloat16, other)
        check_quants(findings, seed, (17, 4096), torch.bfloat16, 128, LAYOUTS[seed], other)
    assert torch.cuda.current_device() == 0
    findings.settle()


@pytest.mark.needs_cuda
def test_tensors_on_two_devices_are_refused(where: torch.device) -> None:
    x, w = torch.ones(4, 256, device=where), torch.ones(256, device=where)
    with pytest.raises(ValueError, match=r"weight: expected device cuda:0, got cpu"):
        ops.rms_norm(x, w.cpu(), 1e-6)
    with pytest.raises(ValueError, match=r"residual: expected device cuda:0 like x, got cpu"):
        ops.fused_add_rms_norm(x, x.cpu(), w, 1e-6)
    with pytest.raises(ValueError, match=r"out: expected device cuda:0 like x, got cpu"):
        ops.rms_norm(x, w, 1e-6, out=x.cpu())


def test_opcheck(where: torch.device) -> None:
    check_registration(torch.bfloat16, where)
    for dtype in DTYPES:
        check_mutation(dtype, where)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(where: torch.device, compiler: str) -> None:
    if compiler == "inductor" and where.type == "cpu":
        pytest.skip("tests/ops/test_torch.py has it")
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    weight = make(3, (1280,), torch.bfloat16, "ordinary").to(where)
    for rows, layout in ((4, LAYOUTS[0]), (7, LAYOUTS[0]), (9, LAYOUTS[1])):
        arguments: Any = [
            t.to(where)
            for t in (
                make(rows, (rows, 1280), torch.bfloat16, "ordinary"),
                make(9, (rows, 1280), torch.bfloat16, "finite"),
            )
        ]
        got, want = compiled(*arguments, weight, layout), block(*arguments, weight, layout)
        assert all(equal(a, b) for a, b in zip(got, want, strict=True)), f"{rows} rows, {layout.value}"
