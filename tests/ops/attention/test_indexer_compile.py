"""The indexer's kernels compiled for GPUs that need not be here: how they touch memory, and what they multiply with."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

TOKENS = 32


@dataclass(frozen=True)
class Target:
    """A GPU architecture, its FP8 format, whether Triton converts to it by an instruction, and how it multiplies it."""

    backend: str
    arch: int | str
    lanes: int
    fnuz: bool
    hardware_fp8: bool
    fp8_dot: str

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


TARGETS = [
    Target("cuda", 90, 32, fnuz=False, hardware_fp8=True, fp8_dot=r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3"),
    Target("hip", "gfx942", 64, fnuz=True, hardware_fp8=True, fp8_dot=r"v_mfma_f32_\w+_fp8_fp8"),
    Target("hip", "gfx950", 64, fnuz=False, hardware_fp8=False, fp8_dot=r"v_mfma_f32_\w+_f8f6f4"),
]
targets = pytest.mark.parametrize("target", TARGETS, ids=str)
layouts = pytest.mark.parametrize("preshuffle", [False, True])


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@dataclass(frozen=True)
class Compiled:
    """PTX or AMDGCN, and the object that the assembler made of it."""

    target: Target
    asm: str
    object: bytes

    def accesses(self) -> Counter[str]:
        """Loads and stores of global memory by their width: ``{"load 16": 2}`` in bytes, of one thread."""
        found: Counter[str] = Counter()
        if self.target.backend == "cuda":
            for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", self.asm):
                found[f"{'load' if kind == 'ld' else 'store'} {int(count or 1) * int(bits) // 8}"] += 1
            return found
        widths = {
            "byte": 1,
            "ubyte": 1,
            "short": 2,
            "ushort": 2,
            "dword": 4,
            "dwordx2": 8,
            "dwordx3": 12,
            "dwordx4": 16,
        }
        for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", self.asm):
            found[f"{kind} {widths[width]}"] += 1
        return found

    def check_registers(self, tmp_path: Path) -> None:
        """Everything is held in registers."""
        if self.target.backend != "cuda":
            assert re.search(r"\.vgpr_spill_count: 0\b", self.asm)
            assert re.search(r"\.private_segment_fixed_size: 0\b", self.asm)
            return
        assert ".local" not in self.asm
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(self.object)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.search(r"\bSTACK:0 .*\bLOCAL:0\b", usage), usage


def build(
    kernel: Any, target: Target, types: dict[str, str], constants: dict[str, Any], num_warps: int, *aligned: str
) -> Compiled:
    """As launched: pointers, and the ``aligned`` numbers, are multiples of 16. Other arguments are int32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    divisible = [i for i, (n, t) in enumerate(signature.items()) if t.startswith("*") or n in aligned]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
        ),
        target=GPUTarget(target.backend, target.arch, target.lanes),
        options={"num_warps": num_warps, "enable_fp_fusion": kernel.__name__ == "indexer_logits_kernel"},
    )
    names = ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
    return Compiled(target, str(compiled.asm[names[0]]), compiled.asm[names[1]])


def build_write(target: Target, preshuffle: bool, x: str = "bf16", **changes: Any) -> Compiled:
    from fusedcomm.kernels.attention.indexer import indexer_k_write_kernel

    types = {"k_ptr": f"*{x}", "cache_ptr": "*u8", "slot_mapping_ptr": "*i64"}
    constants = {
        "BLOCK_SIZE": 64,
        "STRIDE_UNIT": 16,
        "PRESHUFFLE": preshuffle,
        "UE8M0": True,
        "FNUZ": target.fnuz,
        "HARDWARE_FP8": target.hardware_fp8,
        "TOKENS": TOKENS,
    }
    warps = TOKENS * 128 // (32 * target.lanes)
    return build(indexer_k_write_kernel, target, types, constants | changes, warps, "k_stride")


def build_gather(target: Target, preshuffle: bool, **changes: Any) -> Compiled:
    from fusedcomm.kernels.attention.indexer import indexer_k_gather_kernel

    types = {"cache_ptr": "*u8", "k_ptr": "*u8", "scale_ptr": "*fp32"}
    types |= {"block_table_ptr": "*i32", "cu_seq_lens_ptr": "*i32"}
    constants = {"BLOCK_SIZE": 64, "STRIDE_UNIT": 16, "PRESHUFFLE": preshuffle, "WIDTH": 128, "TOKENS": TOKENS}
    warps = TOKENS * 128 // (32 * target.lanes)
    return build(indexer_k_gather_kernel, target, types, constants | changes, warps)


def build_logits(target: Target, preshuffle: bool, num_heads: int = 64, **changes: Any) -> Compiled:
    from fusedcomm.kernels.attention.indexer import indexer_logits_kernel

    types = {"q_ptr": "*u8", "cache_ptr": "*u8", "weights_ptr": "*fp32", "out_ptr": "*fp32"}
    types |= {"block_table_ptr": "*i32", "context_lens_ptr": "*i32"}
    block_heads = max(triton.next_power_of_2(num_heads), 16)
    constants = {
        "NUM_HEADS": num_heads,
        "BLOCK_HEADS": block_heads,
        "BLOCK_SIZE": 64,
        "STRIDE_UNIT": 16,
        "LENS_BY_QUERY": False,
        "PRESHUFFLE": preshuffle,
        "FNUZ": target.fnuz,
        "FP8_DOT": True,
        "TOKENS": 128,
    }
    return build(indexer_logits_kernel, target, types, constants | changes, 8 if block_heads > 32 else 4)


@targets
@layouts
def test_write_moves_16_bytes(target: Target, preshuffle: bool) -> None:
    """A thread's 32 elements of the keys and of their codes, and one scale as a whole."""
    accesses = build_write(target, preshuffle).accesses()
    assert accesses["load 16"] == 4
    assert {width: n for width, n in accesses.items() if width.startswith("store")} == {"store 16": 2, "store 4": 1}


@targets
@layouts
def test_gather_moves_16_bytes(target: Target, preshuffle: bool) -> None:
    """All other loads are of the scale and of where the rows are."""
    accesses = build_gather(target, preshuffle).accesses()
    assert accesses["load 16"] == 2
    assert {width: n for width, n in accesses.items() if width.startswith("store")} == {"store 16": 2, "store 4": 1}
    assert set(accesses) == {"load 16", "load 4", "store 16", "store 4"}


@targets
def test_blocks_of_one_token_move_words(target: Target) -> None:
    """Their stride of 132 is a multiple of 4 alone: words, and not bytes."""
    odd = {"BLOCK_SIZE": 1, "STRIDE_UNIT": 4}
    for accesses in (build_write(target, False, **odd).accesses(), build_gather(target, False, **odd).accesses()):
        assert not {"load 1", "store 1", "load 2", "store 2"} & set(accesses)


@targets
@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
def test_write_converts_and_divides(target: Target, x: str) -> None:
    """By the instruction where Triton has it; quotients are correctly rounded, subnormals are not flushed."""
    asm = build_write(target, True, x).asm
    instruction = "cvt.rn.satfinite.e4m3x2.f32" if target.backend == "cuda" else "v_cvt_pk_fp8_f32"
    assert (instruction in asm) == target.hardware_fp8
    assert instruction not in build_write(target, True, x, HARDWARE_FP8=False, FNUZ=not target.fnuz).asm
    if target.backend == "cuda":
        assert set(re.findall(r"\bdiv\.\S*f32\b", asm)) == {"div.rn.f32"}
        assert ".ftz" not in asm
    else:
        assert "v_div_fixup_f32" in asm
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", asm)


@targets
@layouts
@pytest.mark.parametrize("num_heads", [5, 64, 128])
def test_logits_multiply_fp8(target: Target, preshuffle: bool, num_heads: int) -> None:
    compiled = build_logits(target, preshuffle, num_heads)
    assert re.search(target.fp8_dot, compiled.asm)
    assert compiled.accesses()["load 16"] >= 4
    assert not {"load 1", "load 2"} & set(compiled.accesses())


@targets
@layouts
def test_the_other_format_is_multiplied_as_bf16(target: Target, preshuffle: bool) -> None:
    """What a device has no FP8 instruction for; subnormals of it are made by a product with one of fp32."""
    asm = build_logits(target, preshuffle, FNUZ=not target.fnuz, FP8_DOT=False).asm
    assert not re.search(target.fp8_dot, asm)
    if target.backend == "cuda":
        assert re.search(r"wgmma\.mma_async\S*\.f32\.bf16\.bf16", asm)
        assert ".ftz" not in asm
    else:
        assert re.search(r"v_mfma_f32_\w+_bf16", asm)
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", asm)


def test_an_older_gpu_multiplies_bf16() -> None:
    """One without FP8 at all."""
    ampere = Target("cuda", 80, 32, fnuz=False, hardware_fp8=False, fp8_dot="")
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in build_logits(ampere, True, FP8_DOT=False).asm


@targets
@layouts
def test_nothing_spills(target: Target, preshuffle: bool, tmp_path: Path) -> None:
    for compiled in (
        build_write(target, preshuffle),
        build_write(target, preshuffle, "fp32"),
        build_gather(target, preshuffle),
        build_logits(target, preshuffle),
        build_logits(target, preshuffle, 128, LENS_BY_QUERY=True),
        build_logits(target, preshuffle, FP8_DOT=False),
    ):
        compiled.check_registers(tmp_path)
