"""What the compiler made of the kernels for Hopper's warpgroup instructions, read from PTX; nothing is run here."""

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
LAYOUTS = {0: 512, 1: 576}  # MlaLayout: elements of a query

pytestmark = pytest.mark.timeout(1800)


class Kernel(NamedTuple):
    """An instantiation of sparse_mla: which layout, its PTX, and what ptxas says of it."""

    layout: int
    code: str
    used: str


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    compile_command = [sys.executable, str(ROOT / "launch/compile_gpu.py"), str(TARGETS), "sm_90"]
    done = subprocess.run(compile_command, capture_output=True, text=True)
    if done.returncode == NO_TOOLS:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    text = (TARGETS / "sm_90/hopper/sparse_mla.ptx").read_text()
    used = (TARGETS / "sm_90/hopper/sparse_mla.txt").read_text()
    found = []
    for symbol, code in re.findall(r"\.entry (_Z\w+)\(.*?\n\{(.*?)\n\}\n", text, re.S):
        layout = re.search(r"MlaLayoutE(\d)E", symbol)
        properties = re.search(rf"Function properties for {symbol}\n(.*)\n(.*)\n", used)
        assert layout, symbol
        assert properties, symbol
        found.append(Kernel(int(layout[1]), code, properties[1] + properties[2]))
    assert {k.layout for k in found} == set(LAYOUTS)
    return found


def test_the_products_are_warpgroup_instructions(kernels: list[Kernel]) -> None:
    """Of a tile of 64 keys: QK in steps of 16 elements; PV by two warpgroups, 256 columns each, in steps of 16 keys."""
    for kernel in kernels:
        queries = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.bf16\.bf16", kernel.code)
        values = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n256k16\.f32\.bf16\.bf16", kernel.code)
        steps = LAYOUTS[kernel.layout] // 16
        assert len(queries) == 3 * steps  # before the loop, and in each of its two buffers
        assert len(values) == 2 * 2 * 4  # warpgroups, buffers, steps
        assert not re.search(r"\bmma\.sync", kernel.code)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.used
        assert "Used 168 registers" in kernel.used, "what setmaxnreg shares out is three times this"


def test_warpgroups_ask_for_no_more_registers_than_a_block_has(kernels: list[Kernel]) -> None:
    """One that asks for more waits for ever."""
    for kernel in kernels:
        asked = [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernel.code)]
        assert len(asked) == 3
        assert sum(asked) <= 3 * 168
        assert all(n % 8 == 0 for n in asked)


def test_the_cache_is_read_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        gathers = re.findall(r"ld\.global\.L1::no_allocate\.(\S+)", kernel.code)
        assert set(gathers) == {"v4.u32"}


def test_no_multicast(kernels: list[Kernel]) -> None:
    assert not any("multimem" in kernel.code for kernel in kernels)
