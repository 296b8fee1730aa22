"""The indexer's kernels compiled for GPUs that need not be here: how they touch memory, and what they multiply with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import launched
from launched import TARGETS, Compiled, Launch, Target

U8, I32 = torch.uint8, torch.int32
FP8_DOTS = {
    "sm_90": r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3",
    "gfx942": r"v_mfma_f32_\w+_fp8_fp8",
    "gfx950": r"v_mfma_f32_\w+_f8f6f4",
}
targets = pytest.mark.parametrize("target", TARGETS, ids=str)
layouts = pytest.mark.parametrize("preshuffle", [False, True])


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


def record(target: Target, function: str, *arguments: Any) -> Launch:
    """What an operator launches on a target."""
    from fusedcomm import platform
    from fusedcomm.kernels import fp8
    from fusedcomm.kernels.attention import indexer_operators as operators

    with pytest.MonkeyPatch.context() as patch:
        for module in (operators, fp8):
            patch.setattr(module, "device_facts", lambda device: platform.DeviceFacts(str(target), "", b"", 132))
        patch.setattr(operators, "computes_with", fp8.computes_with.__wrapped__)
        return launched.record(patch, operators, target, function, *arguments)


def cache(block_size: int) -> torch.Tensor:
    return torch.zeros(300, block_size, 132, dtype=U8)


def is_fnuz(target: Target, other: bool = False) -> bool:
    """Whether the format is e4m3fnuz: that of the target, or the other one."""
    return (target.fp8 is torch.float8_e4m3fnuz) != other


def write(
    target: Target,
    preshuffle: bool,
    x: torch.dtype = torch.bfloat16,
    *,
    ue8m0: bool = True,
    block_size: int = 64,
    other_format: bool = False,
) -> Compiled:
    k, slots = torch.zeros(999, 128, dtype=x), torch.zeros(999, dtype=torch.int64)
    given = k, cache(block_size), slots, ue8m0, preshuffle, is_fnuz(target, other_format)
    return record(target, "_indexer_k_write", *given).compile(target)


def gather(target: Target, preshuffle: bool, *, block_size: int = 64, requests: int = 4) -> Compiled:
    rows, table = torch.zeros(999, 128, dtype=U8), torch.zeros(requests, 9, dtype=I32)
    given = cache(block_size), rows, torch.zeros(999), table, torch.zeros(requests + 1, dtype=I32), preshuffle
    return record(target, "_indexer_k_gather", *given).compile(target)


def logits(
    target: Target,
    preshuffle: bool,
    num_heads: int = 64,
    *,
    next_n: int = 1,
    block_size: int = 64,
    lens_by_query: bool = False,
    other_format: bool = False,
) -> Compiled:
    q, weights = torch.zeros(2, next_n, num_heads, 128, dtype=U8), torch.zeros(2 * next_n, num_heads)
    lens = torch.zeros((2, next_n) if lens_by_query else (2,), dtype=I32)
    table, out = torch.zeros(2, 9, dtype=I32), torch.zeros(2 * next_n, 500)
    given = q, cache(block_size), weights, lens, table, out, preshuffle, is_fnuz(target, other_format)
    return record(target, "_indexer_logits", *given).compile(target)


def stores(code: Compiled) -> dict[str, int]:
    return {width: n for width, n in code.accesses().items() if width.startswith("store")}


@layouts
def test_write_moves_16_bytes(target: Target, preshuffle: bool) -> None:
    """A thread's 16 elements of a key, their codes, the scale as a whole; nothing waits for another warp."""
    code = write(target, preshuffle)
    assert code.accesses()["load 16"] == 2
    assert stores(code) == {"store 16": 1, "store 4": 1}
    assert code.shared_bytes == 0
    assert not re.search(r"bar\.sync|s_barrier", code.asm)


def loads(code: Compiled) -> list[str]:
    """Loads, stores and shuffles of the machine's code of an NVIDIA GPU, in its order."""
    return re.findall(r"\b(LDG|STG|SHFL)\b", code._disassembled("nvdisasm"))


@layouts
def test_write_waits_once(preshuffle: bool) -> None:
    """Slots and keys are asked for before anything is done with them."""
    code = loads(write(TARGETS[0], preshuffle))
    assert code[:3] == ["LDG"] * 3
    assert "LDG" not in code[3:]


@layouts
def test_gather_moves_16_bytes(target: Target, preshuffle: bool) -> None:
    """All other loads are of the scale and of where the rows are; nothing waits for another warp."""
    code = gather(target, preshuffle)
    rows = 32 * 128 // 16 // code.threads  # pieces of a thread
    assert code.accesses()["load 16"] == rows
    assert stores(code) == {"store 16": rows, "store 4": rows}
    assert set(code.accesses()) == {"load 16", "load 4", "store 16", "store 4"}
    assert code.shared_bytes == 0
    assert not re.search(r"bar\.sync|s_barrier", code.asm)


@layouts
def test_gather_asks_for_the_table_at_once(preshuffle: bool) -> None:
    """A load that nobody uses is there, and before the first of cu_seq_lens has come."""
    code = gather(TARGETS[0], preshuffle)._disassembled("nvdisasm")
    touch, first_use = code.index("LDG.E.STRONG"), code.index("REDUX")
    assert touch < first_use
    assert "BRA" not in code[:touch].split(".text.indexer_k_gather_kernel:")[-1]


@targets
def test_blocks_of_one_token_move_words(target: Target) -> None:
    """Their stride of 132 is a multiple of 4 alone: words, and not bytes."""
    for code in (write(target, False, block_size=1), gather(target, False, block_size=1)):
        assert not {"load 1", "store 1", "load 2", "store 2"} & set(code.accesses())


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("x", [torch.bfloat16, torch.float16, torch.float32])
def test_write_converts_and_divides(target: Target, x: torch.dtype, ue8m0: bool) -> None:
    """By the instruction where Triton has it; two divisions a token at most, correctly rounded; subnormals stay."""
    code = write(target, True, x, ue8m0=ue8m0)
    assert code.converts_to_fp8() == target.hardware_fp8
    code.check_arithmetic()
    divisions = r"\bdiv\.rn\.f32\b" if code.on_nvidia else r"\bv_div_fixup_f32\b"
    assert len(re.findall(divisions, code.asm)) == (0 if ue8m0 else 2)
    corrections = r"\bfma\.rn\.f32\b" if code.on_nvidia else r"\bv_(?:pk_)?fma"
    assert bool(re.search(corrections, code.asm)) == (not ue8m0)
    assert not write(target, True, x, ue8m0=ue8m0, other_format=True).converts_to_fp8()


@layouts
@pytest.mark.parametrize("num_heads", [5, 64, 128])
def test_logits_multiply_fp8(target: Target, preshuffle: bool, num_heads: int) -> None:
    code = logits(target, preshuffle, num_heads)
    assert re.search(FP8_DOTS[str(target)], code.asm)
    assert code.accesses()["load 16"] >= 2
    assert not {"load 1", "load 2"} & set(code.accesses())


@layouts
def test_logits_keep_the_query(preshuffle: bool) -> None:
    """A tile loads its keys, two scales a thread, weights and one entry of the table, and no query."""
    code = logits(TARGETS[0], preshuffle)._disassembled("nvdisasm")
    body = code[: code.rindex("QGMMA")]
    body = body[body.rindex("\n.L_x_") :]  # from the label of the loop on
    assert len(re.findall(r"LDG\.E\.128", body)) == 64 * 128 // 16 // 128
    assert len(re.findall(r"LDG\.E R", body)) == 3
    assert len(re.findall(r"STS\.128", body)) == 64 * 128 // 16 // 128
    assert len(re.findall(r"PRMT", body)) <= 4  # codes stay words


@layouts
def test_logits_fill_a_multiprocessor(preshuffle: bool) -> None:
    """Registers and shared memory for five programs: nothing else hides how long their loads take."""
    code = logits(TARGETS[0], preshuffle)
    usage = code._disassembled("cuobjdump", "-res-usage")
    [registers] = re.findall(r"\bREG:(\d+)", usage)
    assert int(registers) <= 65536 // (5 * 128) // 8 * 8  # given by eights
    assert code.shared_bytes <= 16384


@layouts
def test_the_other_format_is_multiplied_as_bf16(target: Target, preshuffle: bool) -> None:
    """What a device has no FP8 instruction for; subnormals of it are made by a product with one of fp32."""
    code = logits(target, preshuffle, other_format=True)
    code.check_arithmetic()
    assert not re.search(FP8_DOTS[str(target)], code.asm)
    products = r"wgmma\.mma_async\S*\.f32\.bf16\.bf16" if code.on_nvidia else r"v_mfma_f32_\w+_bf16"
    assert re.search(products, code.asm)


def test_an_older_gpu_multiplies_bf16() -> None:
    """One without FP8 at all."""
    ampere = Target("cuda", 80, 32, torch.float8_e4m3fn, hardware_fp8=False)
    code = logits(ampere, True)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.asm


@layouts
def test_nothing_spills(target: Target, preshuffle: bool) -> None:
    for code in (
        write(target, preshuffle),
        write(target, preshuffle, torch.float32, ue8m0=False),
        gather(target, preshuffle),
        logits(target, preshuffle),
        logits(target, preshuffle, block_size=16),
        logits(target, preshuffle, 128, next_n=2, lens_by_query=True),
        logits(target, preshuffle, other_format=True),
    ):
        code.check_registers()
