"""What the compilers made of the kernels of sampling and verification, read from assembly; nothing is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ROOT / "build/targets"
NO_TOOLS = 3
SOURCES = ("draw", "filters", "verify")

FILTERS = ("top_k_renorm", "top_p_renorm", "top_k_top_p_renorm", "min_p_renorm")
DRAWS = ("sample", "sample_top_k_first", "sample_joint")
VERIFICATIONS = ("chain_speculative_sampling", "dflash_chain_verify", "tree_speculative_sampling")
OPERATIONS = {
    "TopKRenorm": "top_k_renorm",
    "TopPRenorm": "top_p_renorm",
    "TopKTopPRenorm": "top_k_top_p_renorm",
    "MinPRenorm": "min_p_renorm",
    "SoftmaxTemperature": "softmax_temperature",
    "Sample": "sample",
    "SampleTopKFirst": "sample_top_k_first",
    "SampleJoint": "sample_joint",
    "VerifyChain": "chain_speculative_sampling",
    "VerifyBlock": "dflash_chain_verify",
    "VerifyTree": "tree_speculative_sampling",
}
SEARCHES = {"top_k_renorm", "top_p_renorm", "top_k_top_p_renorm", "sample_top_k_first", "sample_joint"}

pytestmark = pytest.mark.timeout(1800)
CLUSTERS = pytest.mark.parametrize("target", ["sm_90", "sm_100"])
AMD = pytest.mark.parametrize("target", ["gfx942", "gfx950"])


class Kernel(NamedTuple):
    """A kernel, the type of its rows, how many blocks may share one, its code, and the compiler's figures."""

    name: str
    dtype: str
    blocks: int
    code: str
    used: dict[str, int]

    def __repr__(self) -> str:
        return f"{self.name}<{self.dtype}> of {self.blocks} blocks"

    def count(self, pattern: str) -> int:
        return len(re.findall(rf"^\s*(?:@!?%p\d+\s+)?{pattern}(?=[\s;])", self.code, re.M))


def compiled(target: str) -> list[tuple[Path, str]]:
    """The assembly of each source."""
    command = [sys.executable, str(ROOT / "launch/compile_gpu.py"), str(TARGETS), target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == NO_TOOLS:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    suffix = "s" if target.startswith("gfx") else "ptx"
    paths = [TARGETS / target / f"sampling/{name}.{suffix}" for name in SOURCES]
    return [(path, path.read_text()) for path in paths]


def named(symbol: str) -> tuple[str, str, int]:
    """The operation, the type of its rows, and how many blocks may share one."""
    if "greedy_chain_verify_kernel" in symbol:
        return "greedy_chain_verify", "float", 1
    row = r"row_kernelINS\d_\d+([A-Z][A-Za-z]+?)(?:I(?:f|NS0_\d+(BFloat16|Half)E)E)?ENS\d_6TeamOfILi(\d+)E"
    match = re.search(row, symbol)
    assert match, symbol
    return OPERATIONS[match[1]], match[2] or "float", int(match[3])


def nvidia(target: str) -> list[Kernel]:
    found = []
    for path, text in compiled(target):
        log = path.with_suffix(".txt").read_text()
        for symbol, code in re.findall(r"\.entry (_Z\w+)\(.*?\n\{(.*?)\n\}\n", text, re.S):
            properties = rf"properties for {symbol}\n.*?(\d+) bytes stack.*?(\d+) bytes spill stores, (\d+) .*\n"
            about = re.search(properties + r".*Used (\d+) registers", log)
            assert about, symbol
            stack, stores, loads, registers = map(int, about.groups())
            found.append(
                Kernel(*named(symbol), code, {"stack": stack, "spilled": stores + loads, "registers": registers})
            )
    return complete(found, has_clusters=target in ("sm_90", "sm_100"))


def amd(target: str) -> list[Kernel]:
    found = []
    for _, text in compiled(target):
        for entry in text[text.index("amdhsa.kernels:") :].split("\n  - ")[1:]:
            symbol = re.search(r"\.name: +(_Z\w+)", entry)
            if not symbol:
                continue
            start = re.search(rf"^{symbol[1]}:.*$", text, re.M)
            assert start, symbol[1]
            code = text[start.end() : text.index(".Lfunc_end", start.end())]
            used = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", entry, re.M)}
            found.append(Kernel(*named(symbol[1]), code, used))
    return complete(found, has_clusters=False)


def complete(kernels: list[Kernel], has_clusters: bool) -> list[Kernel]:
    """All that there are; without clusters those of wide teams are empty, and left out."""
    types, teams = ("float", "BFloat16", "Half"), (8, 16)
    names = {
        (name, dtype, most) for name in (*FILTERS, "softmax_temperature", *DRAWS) for dtype in types for most in teams
    }
    names |= {(name, "float", most) for name in VERIFICATIONS for most in teams} | {("greedy_chain_verify", "float", 1)}
    assert {(kernel.name, kernel.dtype, kernel.blocks) for kernel in kernels} == names
    assert len(kernels) == len(names)
    if has_clusters:
        return kernels
    assert not any(kernel.count(r"(ld\.global|global_load)\S*") for kernel in kernels if kernel.blocks == 16)
    return [kernel for kernel in kernels if kernel.blocks != 16]


# Bytes of stack, and of stores and loads: a few words that live through a whole kernel (two searches and what was asked
# for). All others have none.
SPILLS = {
    ("sm_90", "sample_joint"): (8, 8),
    ("sm_90", "sample_top_k_first"): (8, 32),
    ("sm_90", "top_k_top_p_renorm"): (8, 8),
    ("sm_90", "top_p_renorm"): (8, 20),
    ("sm_100", "sample_top_k_first"): (8, 16),
}
LIGHT = {"sample", "min_p_renorm", "softmax_temperature"}


@CLUSTERS
def test_little_spills_and_several_blocks_fit(target: str) -> None:
    """Two blocks of 512 threads have all the registers of a multiprocessor if each has 64; three, if it has 40."""
    for kernel in nvidia(target):
        stack, spilled = SPILLS.get((target, kernel.name), (0, 0))
        assert kernel.used["stack"] <= stack, kernel
        assert kernel.used["spilled"] <= spilled, kernel
        assert kernel.used["registers"] <= (40 if kernel.name in LIGHT else 64), kernel


@CLUSTERS
def test_blocks_of_a_team_send_and_do_not_fence(target: str) -> None:
    """Values go to another block's memory with the count of their bytes; a fence of the GPU would take longer."""
    for kernel in nvidia(target):
        if kernel.name == "greedy_chain_verify":  # a block a row
            assert not kernel.count(r"st\.async\S*"), kernel
            continue
        assert kernel.count(r"st\.async\S*"), kernel
        assert not kernel.count(r"(fence\.acq_rel|fence\.sc|membar)\S*"), kernel
        assert not kernel.count(r"barrier\.cluster\.arrive(\.release)?(\.aligned)?"), kernel
        assert not kernel.count(r"ld\.shared::cluster\S*"), kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_rows_are_read_sixteen_bytes_at_a_time(target: str) -> None:
    """Eight where an element has two; and results are written sixteen at a time."""
    for kernel in nvidia(target):
        if kernel.name == "greedy_chain_verify":
            continue
        load = r"ld\.global\.v4\.\w32" if kernel.dtype == "float" else r"ld\.global\.v2\.\w32"
        assert kernel.count(load), kernel
        assert bool(kernel.count(r"st\.global\.v4\.\w32")) is (kernel.name in (*FILTERS, "softmax_temperature")), kernel
        assert not kernel.count(r"(ld|st|atom|red)\.(v[24]\.)?\w\d+"), f"{kernel}: addresses of no known space"


@CLUSTERS
def test_rows_are_read_once(target: str) -> None:
    """A batch of quads, or one by one where rows are not aligned; then values are in shared memory."""
    for kernel in nvidia(target):
        if kernel.name in FILTERS and kernel.dtype == "float":
            assert kernel.count(r"ld\.global\.v4\.\w32") == 4, kernel
            assert kernel.count(r"ld\.shared\.v4\.\w32"), kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_sums_are_words(target: str) -> None:
    """64 bits would be a loop of compare-and-swap; every bin of a search is one addition, or two."""
    for kernel in nvidia(target):
        assert not kernel.count(r"(atom|red)\S*\.(cas|b64|u64)\S*"), kernel
        assert bool(kernel.count(r"(atom|red)\.shared\.add\.u32")) or kernel.name == "greedy_chain_verify", kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_arithmetic_is_ieee(target: str) -> None:
    """Nothing is contracted or approximated but the exponential; nothing that is subnormal is flushed."""
    for kernel in nvidia(target):
        assert not kernel.count(r"(add|sub|mul|mad|fma)(\.ftz)?\.f32"), kernel
        if kernel.name != "softmax_temperature":
            assert not kernel.count(r"\S*\.(approx|ftz)\S*"), kernel
            divides = kernel.name in (*FILTERS, "sample_top_k_first")  # by multiplications whose remainder is exact
            assert bool(kernel.count(r"fma\.rn\.f32")) == divides, kernel


@AMD
def test_amd_has_no_scratch(target: str) -> None:
    for kernel in amd(target):
        used = kernel.used
        # scalar registers may go to lanes of a vector register, never to memory
        assert used["vgpr_spill_count"] == used["private_segment_fixed_size"] == 0, kernel
        assert used["wavefront_size"] == 64, kernel
        assert not kernel.count(r"(scratch|flat|buffer)_\S+"), kernel


@AMD
def test_amd_reads_vectors_and_adds_words(target: str) -> None:
    for kernel in amd(target):
        if kernel.name == "greedy_chain_verify":
            continue
        assert kernel.count(r"global_load_dwordx4" if kernel.dtype == "float" else r"global_load_dwordx2"), kernel
        assert kernel.count(r"ds_add_(rtn_)?u32"), kernel
        assert not kernel.count(r"ds_(cmpst|cmpswap|wrxchg)\S*"), kernel
        if kernel.name in SEARCHES:
            assert kernel.count(r"ds_bpermute_b32|v_\w+_dpp\S*"), kernel
