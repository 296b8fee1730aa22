"""Which backend serves the ops of sampling."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusedcomm import Settings, native
from fusedcomm.errors import SettingError
from fusedcomm.ops.sampling.dispatch import choose_sampling_backend


@pytest.mark.parametrize(
    ("device_type", "settings", "native_available", "chosen"),
    [
        ("cpu", {}, False, "torch"),
        ("cpu", {}, True, "native"),
        ("cpu", {"disable": True}, True, "torch"),
        ("cpu", {"backend": "torch"}, True, "torch"),
        ("cuda", {}, False, "torch"),
        ("cuda", {}, True, "native"),
        ("cpu", {"backend": "torch"}, False, "torch"),
        ("cuda", {"backend": "torch"}, True, "torch"),
        ("cuda", {"backend": "native"}, True, "native"),
        ("cuda", {"disable": True}, True, "torch"),
        ("cuda", {"disable": True, "backend": "native"}, True, "native"),
        ("cuda", {"backend": "aiter"}, True, "native"),  # it makes collectives
        ("cuda", {"backend": "aiter"}, False, "torch"),
    ],
)
def test_the_rule(device_type: str, settings: dict[str, object], native_available: bool, chosen: str) -> None:
    wanted = Settings(**settings)  # type: ignore[arg-type]
    assert choose_sampling_backend(wanted, device_type, native_available=native_available) == chosen


@pytest.mark.parametrize(
    ("device_type", "backend", "native_available", "usable"),
    [
        ("cpu", "native", False, "torch"),
        ("cpu", "triton", False, "torch"),
        ("cuda", "native", False, "torch"),
        ("cuda", "triton", True, "torch or native"),
        ("cpu", "aiter", True, "torch or native"),
    ],
)
def test_a_forced_backend_that_cannot_serve(
    device_type: str, backend: str, native_available: bool, usable: str
) -> None:
    message = f"FUSEDCOMM_BACKEND: expected {usable} for sampling on {device_type} here, got '{backend}'"
    with pytest.raises(SettingError, match=message):
        choose_sampling_backend(Settings(backend=backend), device_type, native_available=native_available)


def test_settings_are_read_at_the_first_call() -> None:
    program = "import torch; from fusedcomm.ops import sampling; sampling.sampling_from_probs(torch.ones(1, 2))"
    environ = os.environ | {"FUSEDCOMM_BACKEND": "triton"}
    result = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert result.returncode == 1
    usable = "torch" if native.load() is None else "torch or native"
    assert f"SettingError: FUSEDCOMM_BACKEND: expected {usable} for sampling on cpu here, got 'triton'" in result.stderr
