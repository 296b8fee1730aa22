"""init_distributed refuses bad arguments before it looks for the other ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

import fusedcomm
from fusedcomm import GroupCoordinator


@pytest.fixture
def others_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a rank whose peer never comes: a rendezvous would take its whole deadline."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("others_missing")
@pytest.mark.parametrize(
    "arguments",
    [
        {"timeout": -1},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"timeout": 1e9},
        {"timeout": "60"},
        {"device": "cuda"},
        {"device": "no such device"},
        {"device": 1.5},
        {"tp_size": 3},
        {"tp_size": 0},
        {"tp_size": -2},
        {"tp_size": 1.0},
        {"tp_size": "2"},
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        fusedcomm.init_distributed(**arguments)
    assert not dist.is_initialized()


@pytest.mark.parametrize("arguments", [{"timeout": -1}, {"timeout": "60"}, {"device": "cuda"}], ids=str)
def test_bad_arguments_of_a_group(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: expected "):
        GroupCoordinator(**arguments)
