"""When the compiled kernel of sparse MLA decode is called, and with what; the kernel itself needs a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusedcomm import native
from fusedcomm.kernels.attention import sparse_mla_hopper as hopper
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
@pytest.mark.parametrize("num_splits", [1, 3])
def test_the_call_fits_the_operator(num_splits: int) -> None:
    """Bound to the schema that the compiled library declares, and received as it was meant."""
    received: list[tuple[Any, ...]] = []
    library = torch.library.Library("fusedcomm", "IMPL")
    library.impl("sparse_mla_decode_out", lambda *arguments: received.append(arguments), "CPU")
    q, out, sink = torch.zeros(2, 64, 512).bfloat16(), torch.zeros(2, 64, 512).bfloat16(), torch.zeros(64)
    main = torch.zeros(1, 64, 584, dtype=torch.uint8), torch.zeros(2, 5).int(), torch.ones(2).int(), None
    extra = torch.zeros(1, 4, 584, dtype=torch.uint8), torch.zeros(7).int(), None, torch.zeros(3).int()
    partial, lse = torch.zeros(num_splits * out.numel()), torch.zeros(num_splits * 128)
    try:
        hopper.decode(q, main, extra, sink, 0.5, num_splits, out, partial, lse)
    finally:
        library._destroy()
    several = (partial, lse) if num_splits > 1 else (None, None)
    [got] = received
    want = (q, *main, *extra, sink, 0.5, num_splits, out, *several)
    assert len(got) == len(want)
    assert all(a is b or a == b for a, b in zip(got, want, strict=True) if not isinstance(b, torch.Tensor))
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.data_ptr() == b.data_ptr()
            assert a.shape == b.shape
