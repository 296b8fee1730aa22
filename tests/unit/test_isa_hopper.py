"""What the compiler made of the kernels for Hopper's warpgroup instructions, PTX and machine code; nothing is run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ROOT / "build/targets"
NO_TOOLS = 3
LAYOUTS = {0: 512, 1: 576}  # MlaLayout: elements of a query
HEADS = (16, 32, 64)  # of a block
REGISTERS = 3 * 168  # of three warpgroups, which a third of a multiprocessor has for each

pytestmark = pytest.mark.timeout(1800)


class Kernel(NamedTuple):
    """An instantiation of sparse_mla: which layout and heads a block, its PTX, what ptxas says of it, its symbol."""

    layout: int
    heads: int
    code: str
    used: str
    symbol: str


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    compile_command = [sys.executable, str(ROOT / "launch/compile_gpu.py"), str(TARGETS), "sm_90"]
    done = subprocess.run(compile_command, capture_output=True, text=True)
    if done.returncode == NO_TOOLS:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    text = (TARGETS / "sm_90/hopper/sparse_mla.ptx").read_text()
    used = (TARGETS / "sm_90/hopper/sparse_mla.txt").read_text()
    assert "Potential Performance Loss" not in used, "matrix instructions that wait for each other"
    found = []
    for symbol, code in re.findall(r"\.entry (_Z\w+)\(.*?\n\{(.*?)\n\}\n", text, re.S):
        layout = re.search(r"MlaLayoutE(\d)E", symbol)
        narrow = re.search(r"NarrowILi(\d+)E", symbol)
        properties = re.search(rf"Function properties for {symbol}\n(.*)\n(.*)\n", used)
        assert layout, symbol
        assert properties, symbol
        heads = int(narrow[1]) if narrow else 64
        found.append(Kernel(int(layout[1]), heads, code, properties[1] + properties[2], symbol))
    assert {(k.layout, k.heads) for k in found} == {(layout, heads) for layout in LAYOUTS for heads in HEADS}
    return found


def products(kernel: Kernel, columns: int, transposed: str) -> int:
    """How many products [64, columns] of 16 elements each there are; which operands have K over their rows."""
    instruction = rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}k16\.f32\.bf16\.bf16 .*, p, 1, 1, {transposed};"
    return len(re.findall(instruction, kernel.code))


def test_the_products_are_warpgroup_instructions(kernels: list[Kernel]) -> None:
    """Of a tile of 64 keys: QK in steps of 16 elements, PV in steps of 16 keys.

    64 heads: PV by two warpgroups, 256 columns each, one of them with its left operand in registers; QK stands before
    the loop and in each of its two buffers. Fewer: QK before the loop and in it, PV once for each 64 of 512 columns.
    """
    for kernel in kernels:
        steps = LAYOUTS[kernel.layout] // 16
        if kernel.heads == 64:
            assert products(kernel, 64, "0, 0") == 3 * steps
            assert products(kernel, 256, "0, 1") == products(kernel, 256, "1") == 2 * 4
        else:
            assert products(kernel, kernel.heads, "0, 0") == 2 * steps
            assert products(kernel, kernel.heads, "1, 0") == 8 * 4
        assert not re.search(r"\bmma\.sync", kernel.code)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.used
        assert "Used 168 registers" in kernel.used, "what setmaxnreg shares out is three times this"


def test_warpgroups_ask_for_no_more_registers_than_a_block_has(kernels: list[Kernel]) -> None:
    """One that asks for more waits for ever."""
    for kernel in kernels:
        asked = sorted(int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernel.code))
        if kernel.heads == 64:
            assert len(asked) == 3
            assert sum(asked) <= REGISTERS
        else:  # a consumer and, with fewer registers, two producers
            assert len(asked) == 2
            assert 2 * asked[0] + asked[1] <= REGISTERS
        assert all(n % 8 == 0 for n in asked)


class Instruction(NamedTuple):
    """Of a kernel's machine code: its text, the scoreboards that it waits for, and that which its result will set."""

    text: str
    waits: frozenset[int]
    sets: int


def machine_code(symbol: str) -> list[Instruction]:
    """What nvdisasm, which comes with Triton, reads. The upper 23 bits of an instruction are for the scheduler:
    4 of stall, 1 of yield, 3 for the scoreboard of the result, 3 for that of the operands, 6 to wait for."""
    spec = importlib.util.find_spec("triton")
    tool = Path((spec and spec.origin) or "").parent / "backends/nvidia/bin/nvdisasm"
    if not tool.is_file():
        pytest.skip("no nvdisasm")
    command = [tool, "-hex", TARGETS / "sm_90/hopper/sparse_mla.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, section = text.partition(f"\n.text.{symbol}:\n")
    body, _, _ = section.partition("\n//-----")
    word = r"/\* 0x([0-9a-f]{16}) \*/"
    found = []
    for line, _, upper in re.findall(rf"/\*[0-9a-f]{{4,}}\*/ +(.*?);? +{word}\s+{word}", body):
        control = int(upper, 16) >> 41
        waits = frozenset(i for i in range(6) if control >> 11 >> i & 1)
        found.append(Instruction(line, waits, control >> 5 & 7))
    assert found, symbol
    return found


def test_the_producer_unpacks_while_the_next_tokens_are_on_their_way(kernels: list[Kernel]) -> None:
    """No wait for a scoreboard of theirs, which the assembler gives other loads as well, comes soon after they set out,
    and they set out soon after one.

    To unpack a token takes some 400 instructions, to find one some 150.
    """
    for kernel in kernels:
        code = machine_code(kernel.symbol)
        start = max(i for i, one in enumerate(code) if "USETMAXREG" in one.text)  # of the last warpgroups
        gathers = [i for i, one in enumerate(code) if i > start and "LDG.E.NA.128" in one.text]
        pieces = 2 + (7 if kernel.layout == 0 else 8)
        assert len(gathers) == 3 * pieces  # before the loop, and for each of its two sets of registers
        set_by = {code[i].sets for i in gathers}
        waits = [i for i, one in enumerate(code) if i > start and (one.waits & set_by or "EXIT" in one.text)]
        for first, last in ((gathers[pieces], gathers[2 * pieces - 1]), (gathers[2 * pieces], gathers[-1])):
            before, after = max(i for i in waits if i < first), min(i for i in waits if i > last)
            assert last - before < 150, kernel.symbol
            assert after - last > 250, kernel.symbol


def test_the_cache_is_read_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        gathers = re.findall(r"ld\.global\.L1::no_allocate\.(\S+)", kernel.code)
        assert set(gathers) == {"v4.u32"}


def test_a_token_of_up_to_32_heads_is_prefetched(kernels: list[Kernel]) -> None:
    """All its bytes, by one instruction in each of the producer's two passes, and its scales where they lie apart."""
    for kernel in kernels:
        tokens = re.findall(r"cp\.async\.bulk\.prefetch\.L2\.global \[%\w+\], (\d+);", kernel.code)
        scales = re.findall(r"\sprefetch\.global\.L2 ", kernel.code)
        is_narrow, bytes_of_token = kernel.heads < 64, "576" if kernel.layout == 0 else "656"
        assert tokens == [bytes_of_token] * (2 * is_narrow)
        assert len(scales) == (2 if is_narrow and kernel.layout == 0 else 0)


def test_a_cluster_merges_splits_of_up_to_32_heads(kernels: list[Kernel]) -> None:
    """By consumers, by producers and by blocks without a key, each between two barriers of the cluster: so none reads
    what is not there yet, and none leaves while it is read. Each loads 16 bytes at a time from up to 16 blocks."""
    for kernel in kernels:
        steps = r"barrier\.cluster\.((?:arrive|wait)\S*)\.aligned;|ld\.shared::cluster\.v([24])\.f32"
        found = ["".join(one) for one in re.findall(steps, kernel.code)]
        before, after = ["arrive.release", "wait.acquire"], ["arrive.relaxed", "wait"]
        assert found == (3 * (before + 16 * ["2", "4"] + after) if kernel.heads < 64 else [])


def test_no_multicast(kernels: list[Kernel]) -> None:
    assert not any("multimem" in kernel.code for kernel in kernels)
