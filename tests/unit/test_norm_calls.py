"""What stays the same from call to call of a fused collective: made once, found by value."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from fusedcomm.comm import native_collectives
from fusedcomm.comm.native_collectives import NativeCollectives, NormCall
from fusedcomm.ops.types import ScaleLayout

ROW, COLUMN = ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR


class Collectives(NativeCollectives):
    """Over operators that note the NormCall that they are given."""

    def __init__(self) -> None:
        self.calls: list[NormCall] = []
        native: Any = types.SimpleNamespace(
            operator=self.operator, comm_in_call=lambda handle: 0, comm_failure=lambda handle: 0
        )
        super().__init__(native, 6)

    def operator(self, name: str) -> Any:
        def run(address: int, *tensors: object) -> tuple[object, ...]:
            self.calls.append(NormCall.from_buffer_copy(NormCall.from_address(address)))
            return (1, 2, 3, None, True) if name.endswith("quant") else (1, 2, True)

        return run

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        raise NotImplementedError

    def quant(self, eps: Any = 1e-6, bias: Any = 0.0, group: Any = 128, emit: Any = False, layout: Any = ROW) -> Any:
        """The fields that the operator saw."""
        x: Any = None
        self.allreduce_rmsnorm_quant(x, x, x, eps, bias, group, emit, layout)
        call = self.calls[-1]
        return tuple(getattr(call, name) for name, _ in NormCall._fields_)


def test_the_operator_sees_what_was_asked_for() -> None:
    made = Collectives()
    assert made.quant() == (6, 1e-6, 0.0, 128, 0, 0, 0)
    assert made.quant(1e-5, 1.0, 64, True, COLUMN) == (6, 1e-5, 1.0, 64, 1, 1, 0)
    assert made.quant(layout=ScaleLayout.UE8M0_PACKED)[-1] == 1
    assert made.quant() == (6, 1e-6, 0.0, 128, 0, 0, 0)
    assert len(made._kept) == 3


def test_a_norm_alone_has_a_call_of_its_own() -> None:
    made = Collectives()
    x: Any = None
    assert made.allreduce_rmsnorm(x, x, x, 1e-6, 0.5) == (1, 2)
    assert (made.calls[-1].weight_bias, made.calls[-1].group_size) == (0.5, 0)


def test_a_number_is_found_by_its_value() -> None:
    made = Collectives()
    eps = torch.tensor(0.5)
    for value in (0.5, 0.25):
        eps.fill_(value)
        assert made.quant(eps)[1] == made.quant(float(eps))[1] == value
    made.quant(0, False, 128)
    made.quant(0.0, 0, 128, 0)
    assert len(made._kept) == 3


@pytest.mark.parametrize("bad", [{"group": 128.5}, {"eps": "small"}, {"layout": "row_major"}, {"eps": [1.0]}])
def test_what_is_no_number_reaches_no_operator(bad: dict[str, Any]) -> None:
    made = Collectives()
    with pytest.raises((TypeError, ValueError, KeyError)):
        made.quant(**bad)
    assert made.calls == []


def test_a_caller_that_changes_eps_at_every_call_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_collectives, "_MAX_NORM_CALLS", 4)
    made = Collectives()
    for i in range(20):
        assert made.quant(float(i))[1] == i
        assert len(made._kept) == len(made._norm_calls) <= 4
