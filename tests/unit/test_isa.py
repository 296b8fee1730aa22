"""What the compilers made of the GPU kernels, read from assembly: no GPU is needed, and no AMD one was there.

launch/compile_gpu.py compiles into build/targets, minutes if the kernels changed; where its tools are missing, these
tests are skipped with the reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ROOT / "build/targets"
NO_TOOLS = 3

AMD = pytest.mark.parametrize("target", ["gfx942", "gfx950"])
NVIDIA = pytest.mark.parametrize("target", ["sm_90"])
pytestmark = pytest.mark.timeout(1800)


class Kernel(NamedTuple):
    """One instantiation, e.g. one_shot_norm<BFloat16, 8, 1, …>."""

    name: str
    dtype: str
    parameters: tuple[int, ...]
    code: str
    resources: dict[str, int]

    def __repr__(self) -> str:
        return f"{self.name}<{', '.join([self.dtype, *map(str, self.parameters)])}>"

    @property
    def communicates(self) -> bool:
        return self.name.startswith(("one_shot", "two_shot"))

    @property
    def norms(self) -> bool:
        return "norm" in self.name

    @property
    def quantises(self) -> bool:
        return self.norms or self.name == "local_quant"

    @property
    def has_long_rows(self) -> bool:
        """More than 8192 elements, four packs a thread: no model that is about has them, and registers run out."""
        packs = {"one_shot_norm": 1, "two_shot_norm": 1, "local_norm": 0}
        return self.name in packs and self.parameters[packs[self.name]] > 2

    @property
    def is_for_decoding(self) -> bool:
        """A few tokens, rows of up to 4096 elements: what a decoder runs 72 times a token."""
        return self.name == "one_shot_sum" or (self.name == "one_shot_norm" and self.parameters[1] == 1)

    def instructions(self) -> Counter[str]:
        words = (re.match(r"[{\s]*(?:@!?%p\d+\s+)?([\w.]+)", line) for line in self.code.splitlines())
        return Counter(word[1] for word in words if word)

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions().items() if re.fullmatch(pattern, name))

    def lines(self, pattern: str) -> list[str]:
        return [line for line in map(str.strip, self.code.splitlines()) if re.match(pattern, line)]


def kernels(target: str) -> list[Kernel]:
    """All kernels of a target, compiled if they are not up to date."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/compile_gpu.py"), str(TARGETS), target], capture_output=True, text=True
    )
    if done.returncode == NO_TOOLS:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = []
    for path in sorted((TARGETS / target).glob("*.s" if target.startswith("gfx") else "*.ptx")):
        found += read_amd(path.read_text()) if path.suffix == ".s" else read_ptx(path)
    assert {k.dtype for k in found} == {"BFloat16", "Half", "f"}
    assert {k.name for k in found} >= {"one_shot_sum", "one_shot_norm", "two_shot_sum", "two_shot_norm", "local_norm"}
    return found


def read_amd(text: str) -> list[Kernel]:
    """Code lies between a kernel's label and the end of its function, resources in the metadata at the end."""
    resources = {}
    for entry in text[text.index("amdhsa.kernels:") :].split("\n  - ")[1:]:
        if name := re.search(r"\.name: +(_Z\w+)", entry):
            resources[name[1]] = {k: int(v) for k, v in re.findall(r"\.(\w+): +(\d+)$", entry, re.M)}
    found = []
    for symbol, used in resources.items():
        start = re.search(rf"^{symbol}:.*$", text, re.M)
        assert start, symbol
        code = text[start.end() : text.index(".Lfunc_end", start.end())]
        code = re.sub(r"^\s*[.;].*$|;.*$|^\S+:", "", code, flags=re.M)
        found.append(Kernel(*template_of(symbol), code, used))
    return found


def read_ptx(path: Path) -> list[Kernel]:
    """PTX, and what ptxas says that each kernel uses."""
    used = {}
    for symbol, stack, stores, loads in re.findall(
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        path.with_suffix(".txt").read_text(),
    ):
        used[symbol] = {"stack": int(stack), "spilled": int(stores) + int(loads)}
    entries = re.findall(r"\.entry (_Z\w+)\(.*?\n\{(.*?)\n\}\n", path.read_text(), re.S)
    return [Kernel(*template_of(symbol), code, used[symbol]) for symbol, code in entries]


def template_of(symbol: str) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and whole numbers of a mangled template of namespace fusedcomm::gpu."""
    match = re.match(r"_ZN9fusedcomm3gpu\d+(\w+?)I(?:NS0_\d+(BFloat16|Half)E|(f))((?:L[ib]\d+E)*)E", symbol)
    assert match, symbol
    return match[1], match[2] or match[3], tuple(int(n) for n in re.findall(r"L[ib](\d+)E", match[4]))


# ---- AMD ----


@AMD
def test_amd_flagged_words_bypass_the_caches(target: str) -> None:
    """Free slots, messages and the words shared with the host are read and written at system scope (sc0 sc1)."""
    for kernel in kernels(target):
        if not kernel.communicates:
            continue
        # a Vec is read as two halves; of plain loads of 8 bytes there are those of the slabs' addresses
        loads = kernel.lines(r"global_load_dwordx2 .* sc0 sc1$")
        sent = kernel.lines(r"global_store_dwordx4 .* sc0 sc1$")
        world = kernel.parameters[0]
        assert len(loads) >= 2 * world, kernel  # polled
        assert len(sent) >= 2 * world - 1, kernel  # to all others, and every slot freed
        if kernel.name == "one_shot_sum":
            assert len(kernel.lines(r"global_load_dwordx4 ")) == 1, kernel  # x
        assert kernel.lines(r"global_load_dword .*sc0 sc1"), f"{kernel}: nothing polls the host's words"
        assert not kernel.lines(r"flat_|buffer_load|buffer_store|global_.* nt"), kernel


@AMD
def test_amd_no_scratch_and_no_spills(target: str) -> None:
    for kernel in kernels(target):
        if kernel.has_long_rows:
            continue
        used = kernel.resources
        assert used["vgpr_spill_count"] == 0, f"{kernel}: vector registers spilt"
        # private_segment_fixed_size may be a few bytes that nothing touches, where scalar registers were spilt
        assert not kernel.lines(r"scratch_|buffer_(load|store)"), f"{kernel}: memory of the thread's own"
        if kernel.is_for_decoding:
            assert used["private_segment_fixed_size"] == 0, kernel
            # elsewhere some go to lanes of a vector register, never to memory
            assert used["sgpr_spill_count"] == 0, f"{kernel}: scalar registers spilt"


@AMD
def test_amd_waves_of_64(target: str) -> None:
    for kernel in kernels(target):
        assert kernel.resources["wavefront_size"] == 64, kernel
        if kernel.norms:
            # six steps to sum a wave, and six to sum the sums of waves
            assert kernel.count(r"ds_bpermute_b32|ds_swizzle_b32|v_\w+_dpp|v_permlane\w+") >= 12, kernel
            across_halves = r"v_xor_b32\w* v\d+, 32, |v_permlane32_swap"
            assert kernel.lines(across_halves), f"{kernel}: no step from one half of a wave to the other"


@AMD
def test_amd_fp8_is_the_instruction_and_the_format_of_the_chip(target: str) -> None:
    """The instruction is the same; gfx942 takes it for FNUZ (up to 240), gfx950 for OCP (up to 448)."""
    limits = {"gfx942": ("0x43700000", "0x43e00000"), "gfx950": ("0x43e00000", "0x43700000")}
    wanted, other = limits[target]
    for kernel in kernels(target):
        assert bool(kernel.count("v_cvt_pk_fp8_f32")) is kernel.quantises, kernel
        if kernel.quantises:
            assert wanted in kernel.code, kernel
        assert other not in kernel.code, kernel


@AMD
def test_amd_contracts_nothing(target: str) -> None:
    """a*b+c is two roundings: the front end leaves no permission to contract, and bare sums have no multiply-add."""
    for kernel in kernels(target):
        if kernel.name.endswith("_sum"):
            assert not kernel.count(r"v_(pk_)?(fma|fmac|fmaak|fmamk|mad|mac)_f(16|32)\w*"), kernel
    for path in sorted((TARGETS / target).glob("kernels_*.ll")):
        text = path.read_text()
        assert "llvm.fma.f32" in text, path  # what the source asks for
        assert "fmuladd" not in text, path
        assert "contract" not in text, path


@AMD
def test_amd_code_objects_are_linked(target: str) -> None:
    kernels(target)
    objects = sorted((TARGETS / target).glob("kernels_*.co"))
    assert len(objects) == 3
    for path in objects:
        header = path.read_bytes()[:20]
        assert header[:4] == b"\x7fELF"
        assert int.from_bytes(header[18:20], "little") == 224, "not for AMD GPUs"  # EM_AMDGPU


# ---- NVIDIA ----


@NVIDIA
def test_nvidia_flagged_words_are_relaxed_at_system_scope(target: str) -> None:
    for kernel in kernels(target):
        if not kernel.communicates:
            continue
        loads = kernel.count(r"ld\.relaxed\.sys\.global\.v4\.u32")
        stores = kernel.count(r"st\.relaxed\.sys\.global\.v4\.u32")
        assert loads, kernel
        assert stores, kernel
        if kernel.name == "one_shot_sum":
            world = kernel.parameters[0]
            assert (loads, stores) == (world, 2 * world - 1), kernel
        assert kernel.count(r"ld\.relaxed\.sys\.global\.u32"), f"{kernel}: nothing polls the host's words"


@NVIDIA
def test_nvidia_no_spills(target: str) -> None:
    """In what decoding and prefill run; fp32 may spill a few bytes, and so may two-shot, which gains by more blocks."""
    for kernel in kernels(target):
        if kernel.dtype == "f" or kernel.has_long_rows:
            continue
        if kernel.name.startswith("two_shot"):
            assert kernel.resources["spilled"] <= 160, kernel
        else:
            assert kernel.resources == {"stack": 0, "spilled": 0}, kernel


@NVIDIA
def test_nvidia_contracts_nothing(target: str) -> None:
    """An add or mul without a rounding in its name may be contracted by ptxas; bare sums have no multiply-add."""
    for kernel in kernels(target):
        assert not kernel.count(r"(add|sub|mul|mad)(\.ftz)?\.f32"), kernel
        assert not kernel.count(r".*\.approx.*"), kernel
        if kernel.name.endswith("_sum"):
            assert kernel.count(r"add\.rn\.f32"), kernel
            assert not kernel.count(r"fma\..*"), kernel


@NVIDIA
def test_nvidia_fp8_is_the_instruction(target: str) -> None:
    for kernel in kernels(target):
        assert bool(kernel.count(r"cvt\.rn\.satfinite\.e4m3x2\.f32")) is kernel.quantises, kernel


@NVIDIA
def test_nvidia_no_multicast(target: str) -> None:
    for kernel in kernels(target):
        assert "multimem" not in kernel.code, kernel
