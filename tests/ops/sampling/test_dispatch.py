"""Which backend serves the ops of sampling."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusedcomm import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops.sampling.dispatch import choose_sampling_backend


@pytest.mark.parametrize(
    ("device_type", "settings"),
    [
        ("cpu", {}),
        ("cuda", {}),
        ("cpu", {"backend": "torch"}),
        ("cuda", {"backend": "torch"}),
        ("cuda", {"disable": True}),
        ("cuda", {"backend": "aiter"}),  # it makes collectives
    ],
)
def test_the_rule(device_type: str, settings: dict[str, object]) -> None:
    assert choose_sampling_backend(Settings(**settings), device_type) == "torch"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device_type", "backend"),
    [("cpu", "native"), ("cpu", "triton"), ("cuda", "native"), ("cuda", "triton"), ("cpu", "aiter")],
)
def test_a_forced_backend_that_cannot_serve(device_type: str, backend: str) -> None:
    message = f"FUSEDCOMM_BACKEND: expected torch for sampling on {device_type} here, got '{backend}'"
    with pytest.raises(SettingError, match=message):
        choose_sampling_backend(Settings(backend=backend), device_type)


def test_settings_are_read_at_the_first_call() -> None:
    program = "import torch; from fusedcomm.ops import sampling; sampling.sampling_from_probs(torch.ones(1, 2))"
    environ = os.environ | {"FUSEDCOMM_BACKEND": "native"}
    result = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert result.returncode == 1
    assert "SettingError: FUSEDCOMM_BACKEND: expected torch for sampling on cpu here, got 'native'" in result.stderr
