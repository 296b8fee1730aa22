"""The CPU contract on GPUs: the same bodies, on the device that their ranks were given."""

from __future__ import annotations

from typing import Any

import contract
import pytest

BODIES = [
    contract.sums_of_all_shapes,
    contract.norms_of_all_shapes,
    contract.quants_of_all_shapes,
    contract.all_kinds_of_values,
    contract.negative_zeros,
    contract.against_torch_distributed,
    contract.process_group_within_reason,
    contract.fused_or_none,
    contract.out_forms,
    contract.fused_out_forms,
    contract.fused_out_or_none,
    contract.strided_inputs,
]
API = [contract.module_functions, contract.counters, contract.explanations]


@pytest.mark.worlds("main+shared")
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_contract(world: Any, body: Any) -> None:
    world.run(body)


@pytest.mark.worlds("pair")
@pytest.mark.parametrize("body", API, ids=lambda body: body.__name__)
def test_api(world: Any, body: Any) -> None:
    world.run(body)


@pytest.mark.smoke
@pytest.mark.worlds("main+shared")
def test_every_stage_gives_the_same_bits(world: Any) -> None:
    world.run(contract.every_op_by_every_stage)


def test_many_calls_of_any_kind(world: Any) -> None:
    world.run(contract.a_thousand_calls, world.size, world.few(300, 100))
