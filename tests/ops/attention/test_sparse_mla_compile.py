"""The sparse MLA kernels compiled for GPUs that need not be here: what they multiply, load and hold in registers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from launched import TARGETS, Compiled, Launch, Target

BF16, U8, I32 = torch.bfloat16, torch.uint8, torch.int32
targets = pytest.mark.parametrize("target", TARGETS, ids=str)
layouts = pytest.mark.parametrize("token_bytes", [584, 656])
# each layout and each kind of list once: a compilation takes seconds
forms = pytest.mark.parametrize(("token_bytes", "full"), [(584, True), (656, False)])
NVIDIA = TARGETS[0]


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def launches(monkeypatch: pytest.MonkeyPatch, target: Target, function: str, *arguments: Any) -> list[Launch]:
    """What an operator launches on a target; the tensors, on the CPU, stay as they are."""
    from fusedcomm import platform
    from fusedcomm.kernels import fp8
    from fusedcomm.kernels.attention import sparse_mla_operators as operators

    found: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *given: Any, **options: Any) -> None:
        found.append(Launch(kernel, grid, given, options))

    with monkeypatch.context() as patch:
        patch.setattr(operators, "launch", launch)
        for module in (operators, fp8):
            patch.setattr(module, "device_facts", lambda device: platform.DeviceFacts(str(target), "", b"", 132))
        patch.setattr(operators, "computes_with", fp8.computes_with.__wrapped__)
        patch.setattr(operators, "converts_to", lambda fp8, device: fp8 is target.fp8 and target.hardware_fp8)
        getattr(operators, function)(*arguments)
    return found


def cache(block_size: int, token_bytes: int) -> torch.Tensor:
    stride = -(-block_size * token_bytes // 576) * 576
    return torch.zeros(2, stride, dtype=U8).as_strided((2, block_size, token_bytes), (stride, token_bytes, 1))


def decode(
    monkeypatch: pytest.MonkeyPatch, target: Target, num_heads: int, token_bytes: int, *, full: bool = False
) -> list[Launch]:
    """Of one dense list, or, ``full``, of two ragged ones in two parts."""
    rows, head_dim = 2, 512 if token_bytes == 584 else 576
    q, out = (torch.zeros(rows, num_heads, n, dtype=BF16) for n in (head_dim, 512))
    keys: tuple[Any, ...] = torch.zeros(rows, 640, dtype=I32), torch.zeros(rows, dtype=I32), None
    extra: tuple[Any, ...] = (None,) * 4
    if full:
        keys = torch.zeros(1280, dtype=I32), None, torch.zeros(rows + 1, dtype=I32)
        extra = cache(4, token_bytes), *keys
    fnuz = target.fp8 is torch.float8_e4m3fnuz
    options = torch.zeros(num_heads), 0.1, 2 if full else 1, fnuz, out
    given = q, cache(64, token_bytes), *keys, *extra, *options
    return launches(monkeypatch, target, "_sparse_mla_decode", *given)


def instructions(code: Compiled) -> list[tuple[int, str]]:
    """Address and text of each instruction of a cubin."""
    sass = code._disassembled("cuobjdump", "-sass")
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]


def loop_of(code: Compiled) -> str:
    """The instructions of the largest loop: from where the longest jump back goes to."""
    found = instructions(code)
    jumps = [(int(m[1], 16), at) for at, text in found if (m := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text))]
    first, last = max(((to, at) for to, at in jumps if to < at), key=lambda jump: jump[1] - jump[0])
    return "\n".join(text for at, text in found if first <= at <= last)


@pytest.mark.parametrize("num_heads", [16, 32, 128])
@forms
def test_hopper(monkeypatch: pytest.MonkeyPatch, token_bytes: int, num_heads: int, full: bool) -> None:
    """What is multiplied, loaded, kept in shared memory and in registers."""
    found = decode(monkeypatch, NVIDIA, num_heads, token_bytes, full=full)
    assert len(found) == (2 if full else 1)  # one launch, and one that reduces
    launch, head_tiles = found[0], -(-num_heads // 64)
    assert launch.grid == (2 * head_tiles * (2 if full else 1),)
    code = launch.compile(NVIDIA)
    loop = loop_of(code)
    columns = 512 if token_bytes == 584 else 576
    if num_heads == 128:
        # 64 heads by 64 keys in two halves, once, not once for each warp group; then 256 of 512 values for each group
        assert len(re.findall(r"wgmma\.mma_async\S*\.m64n32k16\.f32\.bf16\.bf16", code.asm)) == columns // 16
        assert len(re.findall(r"wgmma\.mma_async\S*\.m64n256k16\.f32\.bf16\.bf16", code.asm)) == 64 // 16
        assert "mma.sync" not in code.asm
    else:
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.asm
        assert "wgmma" not in code.asm
        # From shared memory, by the instruction for matrices (512 bytes), come queries, weights for each warp and the
        # values of its columns, and nothing else: keys never come back for the scores.
        warps = code.threads // 32
        assert loop.count("LDSM") == (num_heads * (columns + 64) * 2 + 64 * 512 * 2 // warps) // 512
    # every byte of the tile's values in loads of 16, before the loop and in it
    pieces = 9 if token_bytes == 584 else 10
    gathers = pieces * 64 * 64 // (16 * code.threads)
    assert loop.count("LDG.E.128") == gathers
    assert code.accesses()["load 16"] >= 2 * gathers
    assert "cvt.rn.f16x2.e4m3x2" in code.asm
    # 64 heads fill a multiprocessor; two programs of 16 fit, of 114 KB each
    assert code.shared_bytes <= (227 if num_heads > 16 else 113) * 1024
    # Accumulators and the next keys leave few registers: what the compiler cannot keep it reads again, some of it in
    # the loop (Triton 3.6: nothing, 3.9: up to 16 words). It never writes there.
    assert "STL" not in loop
    assert loop.count("LDL") <= 16
    assert sum("STL" in text for _, text in instructions(code)) <= 32


@pytest.mark.parametrize("num_heads", [16, 64])
@pytest.mark.parametrize("target", TARGETS[1:], ids=str)
@forms
def test_amd(monkeypatch: pytest.MonkeyPatch, token_bytes: int, target: Target, num_heads: int, full: bool) -> None:
    launch = decode(monkeypatch, target, num_heads, token_bytes, full=full)[0]
    code = launch.compile(target)
    code.check_registers()
    assert re.search(r"v_mfma_f32_(16x16x16|32x32x8|16x16x32|32x32x16)_bf16", code.asm)
    pieces = 9 if token_bytes == 584 else 10
    assert code.accesses()["load 16"] >= 2 * pieces * 64 * 64 // (16 * code.threads)
    assert code.shared_bytes <= (64 if str(target) == "gfx942" else 160) * 1024
    assert re.search(r"v_cvt_(pk_f32_fp8|scalef32_pk_f32_fp8|f32_fp8)", code.asm)


@targets
def test_a_format_that_the_device_has_not(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """The other one's codes are widened by integers."""
    from dataclasses import replace

    other = torch.float8_e4m3fn if target.fp8 is torch.float8_e4m3fnuz else torch.float8_e4m3fnuz
    launch = decode(monkeypatch, replace(target, fp8=other), 16, 584)[0]
    assert not launch.options["HARDWARE_FP8"]
    code = launch.compile(target)
    assert not re.search(r"e4m3x2|v_cvt_\w*fp8", code.asm)


@targets
def test_reduction(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    code = decode(monkeypatch, target, 16, 584, full=True)[1].compile(target)
    code.check_registers()
    assert code.accesses()["load 16"] >= 2 * 512 * 4 // (16 * code.threads)  # two parts of 512 fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@targets
@layouts
def test_writer(monkeypatch: pytest.MonkeyPatch, token_bytes: int, target: Target, dtype: torch.dtype) -> None:
    kv = torch.zeros(9, 512 if token_bytes == 584 else 576, dtype=dtype)
    given = kv, cache(64, token_bytes), torch.arange(9), target.fp8 is torch.float8_e4m3fnuz
    (launch,) = launches(monkeypatch, target, "_sparse_mla_write", *given)
    assert math.prod(launch.grid) == 3
    code = launch.compile(target)
    code.check_registers()
    assert code.converts_to_fp8() == target.hardware_fp8
    # a thread has 16 codes, which lie together, of a token and loads what they are made of as widely as it can
    accesses = code.accesses()
    assert accesses["load 16"] >= 16 * dtype.itemsize // 16
    assert accesses["store 16"] + 2 * accesses["store 8"] >= 1
