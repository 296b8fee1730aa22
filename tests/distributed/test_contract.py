"""The collectives on real ranks: to the bit what the specification says, at every size and in any order."""

from __future__ import annotations

import contract
import pytest
from harness import RankPool

WORLD_SIZES = (2, 3, 6, 8)


# ---- shapes, dtypes, kinds of values ----


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_reduce_of_all_shapes(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.sums_of_all_shapes)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_norms_of_all_shapes(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.norms_of_all_shapes)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_quantised_norms_of_all_shapes(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.quants_of_all_shapes)


@pytest.mark.parametrize("world_size", [3, 8])
def test_all_kinds_of_values(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.all_kinds_of_values)


@pytest.mark.parametrize("world_size", [2, 8])
def test_negative_zeros_become_zero(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.negative_zeros)


# ---- the same bits: on all ranks, alone and among others, one-shot and two-shot, by every stage ----


@pytest.mark.parametrize("world_size", [3, 8])
def test_same_bits_on_all_ranks(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.against_torch_distributed)


@pytest.mark.parametrize("world_size", [3, 8])
def test_a_row_has_the_same_bits_alone_and_among_many(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.one_row_alone_and_among_many)


def test_sizes_around_the_crossing_of_one_shot_and_two_shot(ranks: RankPool) -> None:
    ranks(8).run(contract.around_the_crossing_point)


@pytest.mark.parametrize("world_size", [2, 3])
def test_inputs_larger_than_the_slab(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.larger_than_the_slab, timeout=120)


@pytest.mark.parametrize("world_size", [3, 8])
def test_every_stage_gives_the_same_bits(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.every_op_by_every_stage, timeout=180)


def test_the_process_group_alone(ranks: RankPool) -> None:
    ranks(3).run(contract.process_group_within_reason)


def test_fused_methods_return_none_where_not_eligible(ranks: RankPool) -> None:
    ranks(2).run(contract.fused_or_none)


# ---- many calls ----


@pytest.mark.parametrize(("world_size", "calls"), [(3, 200), (8, 1000)])
def test_a_thousand_calls_of_any_kind(ranks: RankPool, world_size: int, calls: int) -> None:
    ranks(world_size).run(contract.a_thousand_calls, world_size, calls, timeout=280)


# ---- forms of calling ----


def test_out_forms(ranks: RankPool) -> None:
    ranks(3).run(contract.out_forms)


@pytest.mark.parametrize("world_size", [2, 8])
def test_out_forms_of_fused_collectives(ranks: RankPool, world_size: int) -> None:
    ranks(world_size).run(contract.fused_out_forms, timeout=180)


def test_out_forms_at_world_size_one() -> None:
    contract.fused_out_forms()


def test_out_of_fused_methods_that_return_none(ranks: RankPool) -> None:
    ranks(2).run(contract.fused_out_or_none)


def test_inputs_that_are_not_contiguous(ranks: RankPool) -> None:
    ranks(2).run(contract.strided_inputs)


def test_functions_of_the_package(ranks: RankPool) -> None:
    ranks(2).run(contract.module_functions)


def test_counters(ranks: RankPool) -> None:
    ranks(2).run(contract.counters)


def test_explain(ranks: RankPool) -> None:
    ranks(2).run(contract.explanations)
