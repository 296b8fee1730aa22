"""The harness must report what the other distributed tests rely on it to report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from harness import DEAD, RankFailure, RankGroup, RankPool, run_ranks


def rank_and_size() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def gathered_ranks(scale: int) -> list[int]:
    import torch
    import torch.distributed as dist

    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([dist.get_rank() * scale]))
    return [int(part) for part in parts]


def raises_on_rank_1() -> None:
    seen = int(os.environ["RANK"])
    print(f"printed by {seen}")
    assert seen != 1


def exits_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        print("last words", flush=True)
        os._exit(3)
    time.sleep(600)


def a_place_to_hang() -> None:
    time.sleep(600)


def hangs_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        a_place_to_hang()


def is_killed_on_rank_1() -> str:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def crashes_while_exiting() -> None:
    import atexit

    atexit.register(os._exit, 7)


def starts_a_child_and_hangs() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(f"child {child.pid}", flush=True)
    time.sleep(600)


def variables(names: list[str]) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def returns_what_does_not_pickle() -> object:
    return lambda: None


@pytest.mark.parametrize("launcher", ["torchrun", "spawn"])
def test_results_come_in_rank_order(launcher: str) -> None:
    assert run_ranks(3, rank_and_size, launcher=launcher) == [(0, 3), (1, 3), (2, 3)]


def test_mpiexec_starts_the_ranks(mpiexec: str) -> None:
    assert run_ranks(2, mpi_rank, launcher="mpiexec") == [0, 1]


def mpi_rank() -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank()


def test_pool_keeps_its_job_and_torch_is_initialised(ranks: RankPool) -> None:
    group = ranks(2)
    assert group.run(gathered_ranks, 3) == [[0, 3], [0, 3]]
    assert group.run(gathered_ranks, 4) == [[0, 4], [0, 4]]
    assert ranks(2) is group


def test_pool_replaces_a_broken_job() -> None:
    pool = RankPool()
    try:
        broken = pool(2)
        with pytest.raises(RankFailure):
            broken.run(raises_on_rank_1)
        assert pool(2).run(gathered_ranks, 1) == [[0, 1], [0, 1]]
        with pytest.raises(RuntimeError, match="broken by an earlier body"):
            broken.run(rank_and_size)
    finally:
        pool.close()


def test_a_raising_rank_is_shown_with_its_values_and_output() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(3, raises_on_rank_1, launcher="spawn")
    text = str(failure.value)
    assert "failed on 1 of 3 ranks" in text
    assert "----- rank 1 -----" in text
    assert "assert seen != 1" in text
    assert "seen = 1" in text
    assert "printed by 1" in text
    assert "printed by 0" not in text


@pytest.mark.parametrize("launcher", ["torchrun", "spawn"])
def test_a_rank_that_exits_is_missed_at_once(launcher: str) -> None:
    with RankGroup(2, launcher=launcher) as group:
        start = time.monotonic()
        with pytest.raises(RankFailure) as failure:
            group.run(exits_on_rank_1, timeout=120)
        assert time.monotonic() - start < 60
    text = str(failure.value)
    assert "----- rank 1 -----\ndied before its body was done" in text
    assert "last words" in text


def test_a_hanging_rank_is_ended_and_shows_where_it_hangs() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, hangs_on_rank_1, launcher="spawn", timeout=2)
    text = str(failure.value)
    assert "failed on 1 of 2 ranks" in text
    assert "not done after 2 s" in text
    assert "in a_place_to_hang" in text


def test_an_expected_death_is_no_failure_and_an_unexpected_life_is() -> None:
    assert run_ranks(3, is_killed_on_rank_1, launcher="spawn", expect_dead={1}) == [
        "survived",
        DEAD,
        "survived",
    ]
    with pytest.raises(RankFailure, match="rank 0 -----\nwas expected to die"):
        run_ranks(3, is_killed_on_rank_1, launcher="spawn", expect_dead={0, 1})


def test_a_crash_while_exiting_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="failed while exiting: exit codes"):
        run_ranks(2, crashes_while_exiting, launcher="torchrun")


def test_nothing_is_left_running() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(1, starts_a_child_and_hangs, launcher="spawn", timeout=2)
    pid = int(str(failure.value).partition("child ")[2].split()[0])
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_environment_by_job_by_rank_and_by_launcher() -> None:
    names = ["SHARED", "OWN", "RANK", "SLURM_PROCID"]
    env, rank_env = {"SHARED": "s"}, [{"OWN": "a"}, {"OWN": "b"}]
    expected = {
        "torchrun": [["s", "a", "0", None], ["s", "b", "1", None]],
        "spawn": [["s", "a", "0", None], ["s", "b", "1", None]],
        "slurm": [["s", "a", None, "0"], ["s", "b", None, "1"]],
        "bare": [["s", "a", None, None], ["s", "b", None, None]],
    }
    for launcher, values in expected.items():
        assert run_ranks(2, variables, names, launcher=launcher, env=env, rank_env=rank_env) == values


def test_a_result_that_does_not_pickle_is_reported() -> None:
    with pytest.raises(RankFailure, match="pickle"):
        run_ranks(1, returns_what_does_not_pickle, launcher="spawn")


def test_bodies_and_launchers_are_checked() -> None:
    with (
        pytest.raises(ValueError, match="body: expected a module-level function"),
        RankGroup(1, launcher="bare") as group,
    ):
        group.run(lambda: None)
    with pytest.raises(ValueError, match="launcher: expected one of torchrun"):
        run_ranks(1, rank_and_size, launcher="rsh")
    with pytest.raises(ValueError, match="rank_env: expected 2 mappings, got 1"):
        run_ranks(2, rank_and_size, rank_env=[{}])
