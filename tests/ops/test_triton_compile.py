"""Triton's kernels compiled for GPUs that need not be here: that they do, and what the instructions are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

HIDDEN, BLOCK, GROUP_SIZE = 7168, 8192, 128
POINTERS = {"weight_ptr": "*fp32", "fp8_ptr": "*u8", "scale_ptr": "*fp32"}  # others are of the dtype of x
SCALARS = {"scale_row_stride": "i32", "scale_column_stride": "i32", "eps": "fp32", "weight_bias": "fp32"}


@dataclass(frozen=True)
class Target:
    """A GPU architecture, the FP8 format of its instructions, and whether Triton has the instruction."""

    backend: str
    arch: int | str
    lanes: int
    fnuz: bool
    hardware_fp8: bool

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def num_warps(self) -> int:
        return BLOCK // (16 * self.lanes)


TARGETS = [
    Target("cuda", 90, 32, fnuz=False, hardware_fp8=True),
    Target("hip", "gfx942", 64, fnuz=True, hardware_fp8=True),
    Target("hip", "gfx950", 64, fnuz=False, hardware_fp8=False),
]
targets = pytest.mark.parametrize("target", TARGETS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def assembly(
    kernel: Any, target: Target, x: str, constants: dict[str, Any], *, fusion: bool = False, **pointers: str
) -> str:
    """The PTX or AMDGCN of a kernel; as an object too, so the assembler has taken it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: f"*{x}" for name in kernel.arg_names if name.endswith("_ptr")} | POINTERS | pointers | SCALARS
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget(target.backend, target.arch, target.lanes),
        options={"num_warps": target.num_warps, "enable_fp_fusion": fusion},
    )
    assert compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    return str(compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"])


def norm_quant(target: Target, x: str = "bf16", **options: Any) -> str:
    from fusedcomm.kernels.norm import rms_norm_quant_kernel

    fusion = options.pop("fusion", False)
    constants = {
        "norm_ptr": None,
        "HIDDEN": HIDDEN,
        "BLOCK": BLOCK,
        "GROUP_SIZE": GROUP_SIZE,
        "PACKED": False,
        "FNUZ": target.fnuz,
        "HARDWARE_FP8": target.hardware_fp8,
    }
    return assembly(rms_norm_quant_kernel, target, x, constants | options, fusion=fusion)


def squares(asm: str, target: Target) -> list[str]:
    """The third operand of each fused multiply-add that multiplies a register by itself; packed ones count twice."""
    if target.backend == "cuda":
        return [m[1] for m in re.findall(r"fma\.rn\.f32\s+\S+, (%\w+), \1, (\S+);", asm)]
    found = re.findall(r"v_fma_f32 v\d+, (v\d+), \1, (\S+)", asm)
    packed = re.findall(r"v_pk_fma_f32 v\[[\d:]+\], (v\[[\d:]+\]), \1, (\S+)", asm)
    fused = re.findall(r"v_fmac_f32\S* (v\d+), (v\d+), \2\b", asm)
    return [m[1] for m in found + 2 * packed] + [m[0] for m in fused]


@targets
@pytest.mark.parametrize("fusion", [False, True])
def test_squares_are_rounded_before_they_are_added(target: Target, fusion: bool) -> None:
    """Even where a compiler is let to contract (torch.compile's, say, knows no such option)."""
    found = squares(norm_quant(target, fusion=fusion), target)
    assert len(found) == BLOCK // (target.num_warps * target.lanes)  # one for each element of a thread
    assert set(found) == {"0f00000000" if target.backend == "cuda" else "0"}


@targets
@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
def test_the_arithmetic_is_that_of_ieee(target: Target, x: str) -> None:
    asm = norm_quant(target, x)
    if target.backend == "cuda":
        operations = set(re.findall(r"\b(?:div|sqrt|rsqrt|rcp|add|mul|fma)\.\S*f32\b", asm))
        assert {"div.rn.f32", "sqrt.rn.f32"} <= operations
        assert operations <= {
            "div.rn.f32",
            "sqrt.rn.f32",
            "add.f32",
            "add.rn.f32",
            "mul.f32",
            "mul.rn.f32",
            "fma.rn.f32",
        }
        assert ".ftz" not in asm
        return
    assert "v_div_fixup_f32" in asm
    assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", asm), "subnormals are flushed"
    assert re.search(r"\.amdhsa_float_round_mode_32 0\b", asm)


@targets
def test_conversion_to_fp8(target: Target) -> None:
    """By the instruction where Triton has it, and by integers anywhere."""
    instruction = "cvt.rn.satfinite.e4m3x2.f32" if target.backend == "cuda" else "v_cvt_pk_fp8_f32"
    assert (instruction in norm_quant(target)) == target.hardware_fp8
    assert instruction not in norm_quant(target, HARDWARE_FP8=False, FNUZ=not target.fnuz)


@targets
def test_nothing_spills(target: Target) -> None:
    """On NVIDIA ptxas allocates registers; here only what the PTX asks for is seen."""
    asm = norm_quant(target)
    if target.backend == "cuda":
        assert ".local" not in asm
    else:
        assert re.search(r"\.vgpr_spill_count: 0\b", asm)
        assert re.search(r"\.private_segment_fixed_size: 0\b", asm)
        assert re.search(r"\.wavefront_size: 64\b", asm)


@targets
@pytest.mark.parametrize("packed", [False, True])
def test_group_quantisation(target: Target, packed: bool) -> None:
    from fusedcomm.kernels.quant import group_quant_kernel

    constants = {
        "HIDDEN": HIDDEN,
        "BLOCK": 4096,
        "GROUP_SIZE": GROUP_SIZE,
        "PACKED": packed,
        "FNUZ": target.fnuz,
        "HARDWARE_FP8": target.hardware_fp8,
    }
    assembly(group_quant_kernel, target, "bf16", constants, scale_ptr="*i32" if packed else "*fp32")


@targets
@pytest.mark.parametrize("missing", [(), ("residual_ptr", "residual_out_ptr"), ("residual_ptr",)])
def test_norm(target: Target, missing: tuple[str, ...]) -> None:
    from fusedcomm.kernels.norm import rms_norm_kernel

    constants: dict[str, Any] = {"HIDDEN": HIDDEN, "BLOCK": BLOCK} | dict.fromkeys(missing)
    assembly(rms_norm_kernel, target, "bf16", constants, weight_ptr="*bf16")
