"""When the compiled kernel of sparse MLA decode is called, and with what; the kernel itself needs a Hopper GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusedcomm import native
from fusedcomm.kernels.attention import sparse_mla_hopper as hopper
from fusedcomm.kernels.attention.sparse_mla_splits import Plan
from fusedcomm.platform import DeviceFacts


def facts(arch: str) -> Any:
    return lambda device: DeviceFacts(arch, arch, b"", 132)


@pytest.fixture
def hopper_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "is_wanted", lambda: True)
    monkeypatch.setattr(hopper, "device_facts", facts("sm_90"))
    monkeypatch.setattr(native, "load_gpu", lambda: object())
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "CUDA")


def takes(rows: int = 3, heads: int = 64, *, fnuz: bool = False, **changes: torch.Tensor) -> bool:
    q, out = torch.zeros(rows, heads, 512).bfloat16(), torch.zeros(rows, heads, 512).bfloat16()
    return hopper.takes(changes.get("q", q), changes.get("out", out), fnuz)


@pytest.mark.usefixtures("hopper_is_there")
def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes()
    assert takes(heads=128)
    assert takes(heads=1)
    assert not takes(fnuz=True)
    apart = torch.zeros(3, 64, 1024).bfloat16()[..., :512]
    assert not takes(q=apart)
    assert not takes(out=apart)
    assert not takes(q=torch.zeros(3 * 64 * 512 + 4).bfloat16()[4:].view(3, 64, 512))
    monkeypatch.setattr(hopper, "MAX_ROWS", 3)
    assert takes(rows=3)
    assert not takes(rows=4)


@pytest.mark.usefixtures("hopper_is_there")
@pytest.mark.parametrize("missing", ["asked for", "Hopper", "library", "architecture of the library"])
def test_without_any_of_these_triton_serves(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "asked for":
        monkeypatch.setattr(hopper, "is_wanted", lambda: False)
    elif missing == "Hopper":
        monkeypatch.setattr(hopper, "device_facts", facts("sm_100"))
    elif missing == "library":
        monkeypatch.setattr(native, "load_gpu", lambda: None)
    else:
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    assert not takes()


@pytest.mark.skipif(native.load() is None, reason="the native library is not installed")
@pytest.mark.parametrize("how", [Plan(64, 1, False), Plan(32, 3, False), Plan(16, 3, True)])
def test_the_call_fits_the_operator(how: Plan) -> None:
    """Bound to the schema that the compiled library declares, and received as it was meant."""
    received: list[tuple[Any, ...]] = []
    library = torch.library.Library("fusedcomm", "IMPL")
    library.impl("sparse_mla_decode_out", lambda *arguments: received.append(arguments), "CPU")
    q, out, sink = torch.zeros(2, 64, 512).bfloat16(), torch.zeros(2, 64, 512).bfloat16(), torch.zeros(64)
    main = torch.zeros(1, 64, 584, dtype=torch.uint8), torch.zeros(2, 5).int(), torch.ones(2).int(), None
    extra = torch.zeros(1, 4, 584, dtype=torch.uint8), torch.zeros(7).int(), None, torch.zeros(3).int()
    partial, lse = torch.zeros(how.num_splits * out.numel()), torch.zeros(how.num_splits * 128)
    try:
        hopper.decode(q, main, extra, sink, 0.5, how, out, partial, lse)
    finally:
        library._destroy()
    apart = (partial, lse) if how == Plan(32, 3, False) else (None, None)
    [got] = received
    want = (q, *main, *extra, sink, 0.5, how.block_heads, how.num_splits, out, *apart)
    assert len(got) == len(want)
    assert all(a is b or a == b for a, b in zip(got, want, strict=True) if not isinstance(b, torch.Tensor))
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.data_ptr() == b.data_ptr()
            assert a.shape == b.shape


@pytest.fixture
def forget_plans() -> Iterator[None]:
    hopper._active_clusters.cache_clear()
    hopper.plan.cache_clear()
    yield
    hopper._active_clusters.cache_clear()
    hopper.plan.cache_clear()


@pytest.mark.usefixtures("forget_plans")
@pytest.mark.skipif(native.load() is None, reason="the native library is not installed")
def test_clusters_are_asked_for_once_by_device_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schema that the compiled library declares; what is then chosen depends on the answers."""
    asked: list[tuple[int, ...]] = []

    def answer(device: int, dim: int, block_heads: int, num_splits: int) -> int:
        asked.append((device, dim, block_heads, num_splits))
        return 8 if block_heads == 16 and num_splits <= 5 and dim == 512 else 0

    monkeypatch.setattr(hopper, "device_facts", facts("sm_90"))
    library = torch.library.Library("fusedcomm", "IMPL")
    library.impl("sparse_mla_active_clusters", answer, "BackendSelect")  # in front of what asks the driver
    try:
        assert hopper.plan(3, 512, 1, 128, 10, None) == Plan(16, 5, True)
        assert hopper.plan(3, 512, 1, 64, 10, 4) == Plan(16, 4, True)
        assert not hopper.plan(3, 576, 1, 128, 10, None).merged
    finally:
        library._destroy()
    want = {(3, dim, heads, splits) for dim in (512, 576) for heads in (16, 32) for splits in range(1, 17)}
    assert set(asked) == want
    assert len(asked) == len(want)
