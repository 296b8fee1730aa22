"""Shares of a matrix must cover it, once where they are not meant to repeat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedcomm.layers.sharding import RowShard, check_fp8_shard, even_shard, kv_head_shard, ragged_shard

WORLD_SIZES = st.integers(1, 16)


@given(rows=st.integers(0, 50), world_size=WORLD_SIZES)
def test_even_shards_cover_in_order(rows: int, world_size: int) -> None:
    shards = [even_shard(rows * world_size, r, world_size, name="size") for r in range(world_size)]
    assert [i for shard in shards for i in shard.rows] == list(range(rows * world_size))
    assert {len(shard.rows) for shard in shards} == {rows}


@given(size=st.integers(0, 400), world_size=WORLD_SIZES)
def test_ragged_shards_cover_in_order(size: int, world_size: int) -> None:
    shards = [ragged_shard(size, r, world_size) for r in range(world_size)]
    assert [i for shard in shards for i in shard.rows] == list(range(size))
    assert max(len(shard.rows) for shard in shards) == -(-size // world_size)


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "expected"),
    [
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 2, [[0], [1]]),
        (2, 8, [[0], [0], [0], [0], [1], [1], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
        (4, 1, [[0, 1, 2, 3]]),
    ],
)
def test_kv_heads_divide_or_repeat(num_kv_heads: int, world_size: int, expected: list[list[int]]) -> None:
    assert [list(kv_head_shard(num_kv_heads, r, world_size).rows) for r in range(world_size)] == expected


def test_a_query_head_finds_its_kv_head_on_its_own_rank() -> None:
    num_heads, num_kv_heads, world_size = 16, 2, 8
    for rank in range(world_size):
        heads = even_shard(num_heads, rank, world_size, name="num_heads").rows
        needed = {head * num_kv_heads // num_heads for head in heads}
        assert needed == set(kv_head_shard(num_kv_heads, rank, world_size).rows)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads: expected a multiple of the group's 3 ranks, got 8"):
        even_shard(8, 0, 3, name="num_heads")
    with pytest.raises(ValueError, match=r"num_kv_heads: expected a multiple or a divisor of .*6.*got 4"):
        kv_head_shard(4, 0, 6)


@pytest.mark.parametrize(
    ("shard", "fits"),
    [
        (RowShard(200, range(200)), True),  # the whole may end inside a block
        (RowShard(512, range(128, 256)), True),
        (RowShard(512, range(64, 128)), False),
        (RowShard(192, range(96, 192)), False),
    ],
)
def test_fp8_shards_are_whole_blocks(shard: RowShard, fits: bool) -> None:
    if fits:
        check_fp8_shard(shard, name="out_features")
    else:
        with pytest.raises(ValueError, match="out_features: expected a multiple of 128 a rank for block-FP8"):
            check_fp8_shard(shard, name="out_features")
