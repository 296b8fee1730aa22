"""aiter's part in the attention ops, against a package recorded from the signatures of amd-aiter 0.1.20: no AMD GPU."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import indexer_bodies as bodies
import numpy as np
import pytest
import spec
import torch
from cases import make
from indexer_bodies import HEAD_DIM, TOKEN_BYTES, blocks_of

import fusedcomm
from fusedcomm import Settings
from fusedcomm.aiter_package import MIN_VERSION, resolve
from fusedcomm.comm.aiter import CONTRACT as CONTRACT_OF_COLLECTIVES
from fusedcomm.errors import SettingError
from fusedcomm.ops import attention
from fusedcomm.ops.attention import aiter, dispatch
from fusedcomm.ops.attention.aiter import CONTRACT, INDEXER_K_QUANT_AND_CACHE, find, why_not, why_not_write
from fusedcomm.platform import DeviceFacts

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz

# What the fake writes is what the kernels of that version do: blocks one behind the other, a product with 1 / scale,
# any slot that is not negative. One past the end would be a write to somebody's memory.
CACHE = """
import indexer_bodies, numpy, spec
from torch import Tensor

calls = []

def indexer_k_quant_and_cache(k: Tensor, kv_cache: Tensor, slot_mapping: Tensor, quant_block_size: int, scale_fmt: str,
                              preshuffle: bool = False) -> None:
    calls.append((quant_block_size, scale_fmt, preshuffle, slot_mapping.tolist()))
    blocks, block_size, size = kv_cache.shape
    assert k.is_contiguous() and slot_mapping.is_contiguous() and kv_cache.is_contiguous()
    assert isinstance(scale_fmt, str)
    assert (slot_mapping < blocks * block_size).all(), "written past the end"
    scale = indexer_bodies.quantised(k, kv_cache.dtype, scale_fmt == "ue8m0").scale
    codes = spec.to_fp8(spec.widen(k) * (numpy.float32(1) / scale)[:, None], kv_cache.dtype)
    memory = kv_cache.view(blocks, block_size * size).view(__import__("torch").uint8).numpy()
    indexer_bodies.put(memory, indexer_bodies.Keys(codes, scale), slot_mapping, block_size, preshuffle)

def cp_gather_indexer_k_quant_cache(kv_cache: Tensor, dst_k: Tensor, dst_scale: Tensor, block_table: Tensor,
                                    cu_seq_lens: Tensor, preshuffle: bool = False) -> None:
    raise AssertionError("called")
"""
QK_NORM = """
from torch import Tensor

def fused_qk_rmsnorm(q: Tensor, q_weight: Tensor, q_eps: float, k: Tensor, k_weight: Tensor, k_eps: float,
                     q_out: Tensor | None = None, k_out: Tensor | None = None):
    raise AssertionError("called")

def fused_qk_norm_rope_cache_pts_quant_shuffle(*args, **options):
    raise AssertionError("called")
"""
FILES = {
    "__init__.py": "",
    "jit/core.py": "",
    "dist/__init__.py": "",
    "dist/parallel_state.py": "",
    "ops/__init__.py": "",
    "ops/cache.py": CACHE,
    "ops/fused_qk_norm_rope_cache_quant.py": QK_NORM,
    "ops/fused_qk_rmsnorm_group_quant.py": QK_NORM,
}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a fake amd-aiter on sys.path, and asks for it on a GPU that it serves."""

    def do(
        arch: str = "gfx950",
        backend: str = "aiter",
        version: str = "0.1.20",
        replace: tuple[str, str] = ("", ""),
        **files: str,
    ) -> None:
        for name, text in {**FILES, **files}.items():
            assert replace[0] in "".join(FILES.values())
            path = tmp_path / "aiter" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(*replace) if replace[0] else text)
        metadata = tmp_path / f"amd_aiter-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: amd-aiter\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(aiter, "device_facts", lambda device: DeviceFacts(arch, arch, b"", 0))
        if backend:
            monkeypatch.setenv("FUSEDCOMM_BACKEND", backend)

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]
        aiter._indexer_k_quant_and_cache.cache_clear()

    forget()
    monkeypatch.setattr(dispatch, "_aiter_forced", [])
    monkeypatch.setattr(dispatch, "_chosen", {})
    yield do
    forget()


def write(
    memory: torch.Tensor, k: torch.Tensor, slots: torch.Tensor, block_size: int, fp8: torch.dtype, **options: Any
) -> torch.Tensor:
    """The memory after the op, of which aiter is asked to be the backend."""
    memory = memory.clone()
    cache = memory.as_strided((len(memory), block_size, TOKEN_BYTES), (memory.shape[1], TOKEN_BYTES, 1)).view(fp8)
    attention.indexer_k_quant_and_cache(k, cache, slots, **options)
    return memory


def calls() -> list[Any]:
    return list(sys.modules["aiter.ops.cache"].calls)


# ---- signatures ----


def test_recorded_signatures_take_our_calls(install: Install) -> None:
    install()
    for call in CONTRACT:
        inspect.signature(resolve(call)).bind(*call.parameters)


@pytest.mark.parametrize(
    ("replace", "expected"),
    [
        (("slot_mapping: Tensor, quant_block_size: int", "quant_block_size: int, slot_mapping: Tensor"), "has changed"),
        (("scale_fmt: str,\n", "scale_format: str,\n"), "has changed: expected parameters"),
        (
            ("preshuffle: bool = False) -> None:\n    calls", "preshuffle, layout) -> None:\n    calls"),
            "wants layout as",
        ),
        (("def indexer_k_quant_and_cache", "def renamed"), "has no indexer_k_quant_and_cache"),
    ],
)
def test_what_has_changed_is_refused(install: Install, replace: tuple[str, str], expected: str) -> None:
    install(replace=replace)
    memory = blocks_of(2, 16, 0)
    with pytest.raises(SettingError, match="aiter cannot serve indexer_k_quant_and_cache: ") as error:
        write(memory, torch.ones(2, HEAD_DIM), torch.arange(2), 16, FN)
    assert expected in str(error.value)


def test_parameters_that_we_do_not_pass_may_come(install: Install) -> None:
    install(replace=("preshuffle: bool = False) -> None:\n    calls", "preshuffle=False, later=0) -> None:\n    calls"))
    write(blocks_of(2, 16, 0), torch.ones(2, HEAD_DIM), torch.arange(2), 16, FN)
    assert len(calls()) == 1


def test_it_is_looked_for_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    looked: list[Any] = []
    monkeypatch.setattr(aiter, "resolve", lambda call: looked.append(call) or resolve(call))
    for _ in range(3):
        write(blocks_of(2, 16, 0), torch.ones(2, HEAD_DIM), torch.arange(2), 16, FN)
    assert looked == [INDEXER_K_QUANT_AND_CACHE]
    assert len(calls()) == 3


# ---- who is called ----


@pytest.mark.parametrize(
    ("settings", "arch", "expected"),
    [
        ({}, "gfx942", ""),
        ({}, "gfx950", ""),
        ({"backend": "aiter"}, "gfx950", ""),
        ({"disable": True}, "gfx950", "FUSEDCOMM_DISABLE=1"),
        ({"disable_aiter": True}, "gfx950", "FUSEDCOMM_DISABLE_AITER=1"),
        ({"disable_aiter": True, "backend": "aiter"}, "gfx950", "FUSEDCOMM_DISABLE_AITER=1"),
        ({}, "gfx90a", "not gfx90a"),
        ({}, "sm_90", "not sm_90"),
        ({}, "cpu", "not the CPU"),
    ],
)
def test_which_devices(settings: dict[str, Any], arch: str, expected: str) -> None:
    got = why_not(Settings(**settings), arch)
    assert expected in got
    assert (got == "") is (expected == "")


@pytest.mark.parametrize(
    ("shape", "padding", "fnuz", "arch", "expected"),
    [
        ((3, 16), 0, False, "gfx950", ""),
        ((3, 16), 0, True, "gfx942", ""),
        ((3, 16), 64, False, "gfx950", "blocks of 2112 bytes with nothing between them, not 2176 bytes apart"),
        ((1, 16), 64, False, "gfx950", ""),  # one block has none after it
        ((3, 1), 0, False, "gfx950", ""),
        ((3, 16), 0, True, "gfx950", "the FP8 format of the device (torch.float8_e4m3fn), not torch.float8_e4m3fnuz"),
        ((3, 16), 0, False, "gfx942", "the FP8 format of the device (torch.float8_e4m3fnuz), not torch.float8_e4m3fn"),
    ],
)
def test_which_caches(shape: tuple[int, int], padding: int, fnuz: bool, arch: str, expected: str) -> None:
    memory = torch.zeros(shape[0] * (shape[1] * TOKEN_BYTES + padding), dtype=torch.uint8)
    cache = memory.as_strided((*shape, TOKEN_BYTES), (shape[1] * TOKEN_BYTES + padding, TOKEN_BYTES, 1))
    got = why_not_write(cache, fnuz, arch)
    assert expected in got
    assert (got == "") is (expected == "")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"arch": "cpu"}, "aiter serves gfx94x and gfx95x, not the CPU"),
        ({"arch": "sm_90"}, "aiter serves gfx94x and gfx95x, not sm_90"),
        ({"arch": "gfx942"}, "aiter writes the FP8 format of the device"),
        ({"version": "0.1.19"}, f"aiter is 0.1.19, {MIN_VERSION} or later is needed"),
        ({"__init__.py": "raise RuntimeError('no gfx here')"}, "RuntimeError: no gfx here"),
    ],
)
def test_asked_for_it_is_an_error_if_it_cannot_serve(install: Install, facts: dict[str, str], expected: str) -> None:
    install(**facts)
    memory = blocks_of(2, 16, 0)
    cache = memory.view(2, 16, TOKEN_BYTES).view(FN)
    before = memory.clone()
    with pytest.raises(
        SettingError, match="FUSEDCOMM_BACKEND: aiter cannot serve indexer_k_quant_and_cache: "
    ) as error:
        attention.indexer_k_quant_and_cache(torch.ones(2, HEAD_DIM), cache, torch.arange(2))
    assert expected in str(error.value)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("switch", ["FUSEDCOMM_DISABLE_AITER", "FUSEDCOMM_DISABLE"])
def test_what_is_switched_off_is_not_imported(install: Install, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    install(**{"__init__.py": "raise AssertionError('imported')"})
    monkeypatch.setenv(switch, "1")
    with pytest.raises(SettingError, match=f"{switch}=1"):
        write(blocks_of(2, 16, 0), torch.ones(2, HEAD_DIM), torch.arange(2), 16, FN)
    assert "aiter" not in sys.modules


def test_another_package_of_that_name(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    (tmp_path / "aiter/jit/core.py").unlink()
    with pytest.raises(SettingError, match="is not AMD's"):
        find(INDEXER_K_QUANT_AND_CACHE, Settings(), "gfx950")
    assert "aiter" not in sys.modules


def test_it_never_serves_by_itself(install: Install) -> None:
    """It takes more launches than the library's own kernel, whose slots need no look."""
    install(backend="", **{"__init__.py": "raise AssertionError('imported')"})
    memory, k = blocks_of(2, 16, 0), make(1, (5, HEAD_DIM), torch.bfloat16, "ordinary")
    got = write(memory, k, torch.arange(5), 16, FN)
    want = memory.numpy().copy()
    bodies.put(want, bodies.quantised(k, FN, False), torch.arange(5), 16, False)
    np.testing.assert_array_equal(got.numpy(), want)
    assert "aiter" not in sys.modules


def test_nothing_of_it_is_loaded_where_nobody_asks() -> None:
    program = (
        "import sys, torch; from fusedcomm.ops import attention;"
        "attention.indexer_k_quant_and_cache("
        "torch.ones(1, 128), torch.zeros(1, 16, 132, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64));"
        "assert 'aiter' not in sys.modules and 'fusedcomm.ops.attention.aiter' not in sys.modules"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDCOMM_")}
    subprocess.run([sys.executable, "-c", program], env=environ, check=True)


# ---- calls ----


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize(("arch", "fp8"), [("gfx950", FN), ("gfx942", FNUZ)])
@pytest.mark.parametrize(("block_size", "preshuffle"), [(1, False), (64, False), (16, True), (64, True)])
def test_write(
    install: Install, block_size: int, preshuffle: bool, arch: str, fp8: torch.dtype, scale_fmt: str | None
) -> None:
    """Slots past the end do not get there; scales are the same, codes one step off at most."""
    install(arch)
    memory = blocks_of(-(-48 // block_size), block_size, 0)
    num_slots = len(memory) * block_size
    slots = torch.tensor([3, -1, num_slots, 0, num_slots - 1, 1 << 40, 20, -9, 11])
    k = make(block_size, (9, 300), torch.bfloat16, "ordinary")[:, 40:168]  # rows apart, which it would not see
    got = write(memory, k, slots, block_size, fp8, scale_fmt=scale_fmt, preshuffle=preshuffle)
    sent = torch.where(slots < num_slots, slots, -1).tolist()
    assert calls() == [(128, scale_fmt or "", preshuffle, sent)]
    want = memory.numpy().copy()
    bodies.put(want, bodies.quantised(k, fp8, scale_fmt is not None), slots, block_size, preshuffle)
    kept = [slot for slot in slots.tolist() if 0 <= slot < num_slots]
    ours, theirs = (bodies.get(m, kept, block_size, preshuffle) for m in (want, got.numpy()))
    np.testing.assert_array_equal(theirs.scale, ours.scale)
    values = spec.fp8_values(fp8)
    np.testing.assert_allclose(values[theirs.codes], values[ours.codes], rtol=2**-3, atol=2.0**-9)  # a step of e4m3
    elsewhere = [slot for slot in range(num_slots) if slot not in kept]
    for before, after in zip(
        bodies.get(memory.numpy(), elsewhere, block_size, preshuffle),
        bodies.get(got.numpy(), elsewhere, block_size, preshuffle),
        strict=True,
    ):
        np.testing.assert_array_equal(before.view(np.uint8), after.view(np.uint8))


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 3), (4, 0)])
def test_nothing_to_write_is_no_call(install: Install, tokens: int, blocks: int) -> None:
    """Whose grid would be empty, which HIP refuses."""
    install()
    write(blocks_of(blocks, 16, 0), torch.ones(tokens, HEAD_DIM), torch.zeros(tokens, dtype=torch.int64), 16, FN)
    assert calls() == []


def test_a_padded_cache_is_refused_before_the_call(install: Install) -> None:
    install()
    with pytest.raises(SettingError, match="aiter takes blocks of 2112 bytes with nothing between them, not 2116"):
        write(blocks_of(2, 16, 4), torch.ones(2, HEAD_DIM), torch.arange(2), 16, FN)
    assert calls() == []


def test_an_exception_of_aiter_is_raised(install: Install) -> None:
    install(replace=("    calls.append(", "    raise RuntimeError('HIP error')\n    calls.append("))
    with pytest.raises(RuntimeError, match="HIP error"):
        write(blocks_of(2, 16, 0), torch.ones(2, HEAD_DIM), torch.arange(2), 16, FN)


def test_bad_input_is_told_as_ever(install: Install) -> None:
    install()
    with pytest.raises(ValueError, match=r"slot_mapping: expected shape \[2\], got \(3,\)"):
        write(blocks_of(2, 16, 0), torch.ones(2, HEAD_DIM), torch.arange(3), 16, FN)
    assert "aiter" not in sys.modules


def test_compiles_without_graph_breaks(install: Install) -> None:
    install()
    bodies.chain_compiles("cpu")
    assert len(calls()) == 6


# ---- what is never called ----

# Wrong where q and k have other numbers of rows; or breaking a promise of the op: see fusedcomm.ops.attention.aiter.
NEVER = {"fused_qk_rmsnorm", "cp_gather_indexer_k_quant_cache", "fused_qk_norm_rope_cache_pts_quant_shuffle"}


def test_no_call_is_bound_to_what_breaks_a_promise() -> None:
    """In the contracts, and in any other Call that the sources make or import of aiter that they do."""
    assert NEVER.isdisjoint(call.function for call in (*CONTRACT, *CONTRACT_OF_COLLECTIVES))
    named = 0
    for path in Path(fusedcomm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Call":
                strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert NEVER.isdisjoint(strings), path
                named += 1
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) and node.level == 0 else ""
            assert not [n for n in (*names, module) if n.partition(".")[0] == "aiter"], path
    assert named >= len(CONTRACT) + len(CONTRACT_OF_COLLECTIVES)


def test_grouped_queries_are_normed_by_the_library(install: Install) -> None:
    """With aiter asked for and there: other numbers of heads in q and k, against fp64."""
    install()
    q, k = (make(h, (5, h, 64), torch.float32, "ordinary") for h in (8, 2))
    weight = make(3, (64,), torch.float32, "ordinary")
    got = attention.fused_qk_rmsnorm(q, k, weight, weight, 1e-6)
    for x, y in ((q, got.q), (k, got.k)):
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        torch.testing.assert_close(y.double(), exact, rtol=2.0**-20, atol=1e-7)  # fp32: a sum of 64 squares and a root
    assert "aiter" not in sys.modules


def test_gather_and_logits_are_the_library_s(install: Install) -> None:
    """With aiter asked for and there; its gather would raise."""
    install()
    given = bodies.chain_arguments(7)
    codes, scale, out, _ = bodies.chain(*given)
    assert len(calls()) == 1
    slots = [16 + t for t in range(16)] + list(range(4))
    want = bodies.get(given[1].view(3, -1).numpy(), slots, 16, True)
    np.testing.assert_array_equal(codes[:20].numpy(), want.codes)
    np.testing.assert_array_equal(scale[:20, 0].numpy(), want.scale + np.float32(1))  # chain adds 1
    assert out.isfinite().sum() == 19 + 20
