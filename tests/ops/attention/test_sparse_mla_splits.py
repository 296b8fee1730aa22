"""How many parts keys are split into, what a program takes, and the memory that partial results go through."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusedcomm.kernels.attention import workspace as module
from fusedcomm.kernels.attention.sparse_mla_splits import MAX_SPLITS, Plan, choose_plan, choose_splits, tile_of
from fusedcomm.kernels.attention.workspace import workspace

CPU = torch.device("cpu")


# ---- splits ----


def test_a_full_device_is_not_split() -> None:
    """16 heads and 256 rows on 132 multiprocessors of two programs; 128 heads and 128 rows on as many of one."""
    assert choose_splits(256, 32, 264) == 1
    assert choose_splits(256, 32, 132) == 1


def test_an_empty_device_is_filled() -> None:
    """A row of 640 keys: one tile for each program; of 2048: as many parts as there may be."""
    assert choose_splits(1, 10, 264) == 10
    assert choose_splits(2, 10, 132) == 10
    assert choose_splits(1, 32, 264) == MAX_SPLITS
    assert choose_splits(8, 32, 132) == MAX_SPLITS


def test_what_is_shorter_than_the_reduction_is_not_split() -> None:
    assert choose_splits(1, 1, 132) == 1
    assert choose_splits(1, 2, 132) == 1
    assert choose_splits(1, 0, 132) == 1


def test_splits_never_make_it_longer() -> None:
    """Of all numbers of parts the one that is chosen takes the least time, by waves of programs and their tiles."""
    for programs in (1, 3, 40, 133, 200, 512, 1000):
        for tiles in (1, 3, 10, 32, 40):
            for slots in (4, 132, 264):
                chosen = choose_splits(programs, tiles, slots)

                def time(splits: int, programs: int = programs, tiles: int = tiles, slots: int = slots) -> int:
                    return -(-programs * splits // slots) * (-(-tiles // splits) + 2) + 3 * (splits > 1)

                assert 1 <= chosen <= min(MAX_SPLITS, tiles)
                assert all(time(chosen) <= time(n) for n in range(1, min(MAX_SPLITS, tiles) + 1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950", "cpu"])
def test_tiles(arch: str) -> None:
    """All heads are in a tile; only sm_90 has those of wgmma, and AMD none whose operands are mma.sync's."""
    for heads in range(1, 129):
        tile = tile_of(heads, arch)
        assert tile.heads in (16, 32, 64)
        assert tile.heads <= max(16, 2 * heads)
        assert tile.merged == (arch in ("sm_90", "cpu") and heads > 32)
        assert tile.in_registers == (not arch.startswith("gfx") and not tile.merged)


# ---- the compiled kernel ----

# What the driver of an H200 says, from 1 block in a cluster on: a cluster stays within a part of the GPU.
_ACTIVE = [132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7]
_CLUSTERS = {heads: [0, *_ACTIVE] for heads in (16, 32)}
_NO_CLUSTERS = {heads: [0] * 17 for heads in (16, 32)}


def plan(
    rows: int, heads: int, tiles: int, splits: int | None = None, clusters: dict[int, list[int]] = _CLUSTERS
) -> Plan:
    return choose_plan(rows, heads, tiles, 132, clusters, splits)


def test_a_few_rows_take_small_blocks_that_merge() -> None:
    """640 keys are ten tiles. As many blocks as run at a time; those without a key help to merge."""
    assert plan(1, 64, 10) == Plan(16, 10, True)
    assert plan(2, 64, 10) == plan(1, 128, 10) == Plan(16, 9, True)  # 8 clusters of ten blocks do not run at a time
    assert plan(4, 64, 10) == plan(2, 128, 10) == Plan(16, 6, True)
    assert plan(4, 128, 10) == Plan(32, 6, True)
    assert plan(1, 16, 32) == Plan(16, 16, True)


def test_many_rows_take_blocks_of_all_their_heads() -> None:
    assert plan(256, 16, 32) == Plan(16, 1, False)
    assert plan(128, 32, 32) == Plan(32, 1, False)
    assert plan(128, 64, 32) == Plan(64, 1, False)
    assert plan(128, 128, 32) == Plan(64, 1, False)


def test_what_is_short_is_one_split() -> None:
    for heads in (1, 16, 64, 128):
        assert plan(1, heads, 0).num_splits == 1
        assert plan(1, heads, 1).num_splits == 1


def test_nothing_merges_where_too_few_clusters_run() -> None:
    for rows in (1, 2, 8, 100):
        for heads in (8, 32, 128):
            assert not plan(rows, heads, 32, clusters=_NO_CLUSTERS).merged
            assert not plan(rows, heads, 32, 7, _NO_CLUSTERS).merged
    assert plan(1, 128, 32, clusters=_NO_CLUSTERS).num_splits > 1
    one_at_a_time = {heads: [1] * 17 for heads in (16, 32)}
    assert not plan(1, 128, 10, clusters=one_at_a_time).merged
    up_to_eight = {heads: [*found[:9], *(0 for _ in found[9:])] for heads, found in _CLUSTERS.items()}
    assert plan(1, 128, 10, clusters=up_to_eight) == Plan(16, 8, True)
    assert plan(1, 128, 32, 8, up_to_eight).merged
    assert not plan(1, 128, 32, 9, up_to_eight).merged


def test_splits_that_are_asked_for_are_taken() -> None:
    for rows in (1, 3, 64, 300):
        for heads in (1, 16, 48, 128):
            for splits in range(1, 17):
                for tiles in (0, 3, 40):
                    chosen = plan(rows, heads, tiles, splits)
                    assert chosen.num_splits == splits
                    assert chosen.block_heads in (16, 32, 64)
                    assert not chosen.merged or (splits > 1 and chosen.block_heads < 64)


# ---- memory ----


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    module._held.memory.clear()
    yield
    module._held.memory.clear()


def test_memory_is_kept_and_only_grows() -> None:
    first = workspace(100, CPU)
    assert (first.shape, first.dtype) == ((100,), torch.float32)
    at = first.data_ptr()
    assert workspace(7, CPU).data_ptr() == at
    assert workspace(128, CPU).data_ptr() == at  # the power of two that it was rounded up to
    larger = workspace(1000, CPU)
    assert larger.numel() == 1000
    assert workspace(100, CPU).data_ptr() == larger.data_ptr()
    assert len(module._held.memory) == 1


def test_threads_have_their_own() -> None:
    """Or two launches of one of them could lie around one of another's, on the stream that both use."""
    mine, theirs = workspace(64, CPU).data_ptr(), []
    thread = threading.Thread(target=lambda: theirs.append(workspace(64, CPU)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine
    assert workspace(64, CPU).data_ptr() == mine


def test_streams_have_their_own_and_captures_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by a device that is pretended: which memory goes where is decided on the host."""
    stream, capturing = [1], [False]
    real = torch.empty
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: real(n, dtype=dtype))
    gpu = torch.device("cuda", 0)
    first = workspace(64, gpu)
    stream[0] = 2
    second = workspace(64, gpu)
    assert second.data_ptr() != first.data_ptr()
    stream[0], capturing[0] = 1, True
    captured = [workspace(64, gpu), workspace(64, gpu)]
    assert len({t.data_ptr() for t in (first, second, *captured)}) == 4
    capturing[0] = False
    assert workspace(64, gpu).data_ptr() == first.data_ptr()
    assert set(module._held.memory) == {(gpu, 1), (gpu, 2)}
