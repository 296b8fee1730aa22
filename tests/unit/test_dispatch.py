"""Which backend serves the local ops, from facts alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusedcomm import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops.dispatch import choose_local_backend


def choose(
    device_type: str = "cuda", *, cpu: bool = True, gpu: bool = True, triton: bool = True, **settings: object
) -> str:
    return choose_local_backend(
        Settings(**settings),  # type: ignore[arg-type]
        device_type,
        native_available=cpu,
        gpu_native_available=gpu,
        triton_available=triton,
    )


@pytest.mark.parametrize(
    ("device_type", "facts", "expected"),
    [
        ("cpu", {}, "native"),
        ("cpu", {"cpu": False}, "torch"),  # never the interpreter by itself
        ("cuda", {}, "native"),
        ("cuda", {"cpu": False}, "native"),
        ("cuda", {"gpu": False}, "triton"),
        ("cuda", {"gpu": False, "triton": False}, "torch"),
        ("cpu", {"disable": True}, "torch"),
        ("cuda", {"disable": True}, "torch"),
        ("cuda", {"backend": "triton"}, "triton"),
        ("cuda", {"backend": "torch"}, "torch"),
        ("cpu", {"backend": "triton"}, "triton"),
        ("cuda", {"backend": "native", "disable": True}, "native"),
        ("cuda", {"backend": "aiter"}, "native"),  # the local part of what aiter sums
        ("cuda", {"backend": "aiter", "gpu": False}, "triton"),
    ],
)
def test_the_rule(device_type: str, facts: dict[str, object], expected: str) -> None:
    assert choose(device_type, **facts) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device_type", "facts", "usable"),
    [
        ("cpu", {"backend": "native", "cpu": False, "triton": False}, "torch on cpu"),
        ("cuda", {"backend": "native", "gpu": False}, "torch or triton on cuda"),
        ("cuda", {"backend": "triton", "triton": False}, "torch or native on cuda"),
        ("cpu", {"backend": "triton", "triton": False}, "torch or native on cpu"),
        ("cpu", {"backend": "aiter", "triton": False}, "torch or native on cpu"),
    ],
)
def test_a_forced_backend_that_cannot_serve(device_type: str, facts: dict[str, object], usable: str) -> None:
    with pytest.raises(SettingError, match=f"FUSEDCOMM_BACKEND: expected {usable} here, got '{facts['backend']}'"):
        choose(device_type, **facts)  # type: ignore[arg-type]


def test_triton_on_cpu_without_its_interpreter_is_refused() -> None:
    program = "import torch, fusedcomm.ops as ops; ops.rms_norm(torch.ones(1, 8), torch.ones(8), 0.0)"
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environ | {"FUSEDCOMM_BACKEND": "triton"}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "SettingError: FUSEDCOMM_BACKEND: expected torch or native on cpu here, got 'triton'" in result.stderr
