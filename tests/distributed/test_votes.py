"""What ranks decide together when a group is made: settings, builds, hosts, and set-up that fails on one of them."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool, run_ranks
from ranked import check_all_reduce, check_norm, check_quant, raises, works

import fusedcomm
from fusedcomm import FusedCommError, GroupCoordinator, SettingError, Settings, VersionMismatchError, native
from fusedcomm.comm import symmetric_buffer

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def create(settings: Settings | None = None) -> tuple[GroupCoordinator, list[str]]:
    """A group of the world, and the warnings that this rank saw."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group = GroupCoordinator(settings=settings)
    return group, [str(w.message) for w in caught if "FUSEDCOMM" in str(w.message) or "custom" in str(w.message)]


def stage_of(group: GroupCoordinator) -> str:
    plan = group.explain("all_reduce", (4, 128), torch.float32)
    return str(plan.stage)


# ---- settings that differ by rank ----


def disagree(by_rank: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str], str]:
    settings = Settings(**by_rank[dist.get_rank()])
    group, seen = create(settings)
    with group:
        check_all_reduce(group, 1, (4, 128), torch.float32)
        changed = {
            f.name: getattr(group.settings, f.name)
            for f in dataclasses.fields(Settings)
            if getattr(group.settings, f.name) != getattr(Settings(buffer_mb=2), f.name)
        }
        return changed, seen, stage_of(group)


@pytest.mark.parametrize(
    ("by_rank", "taken", "stage"),
    [
        ([{}, {"disable": True}, {}], {"disable": True}, "process_group"),
        ([{}, {}, {"disable_custom_ar": True}], {"disable_custom_ar": True}, "process_group"),
        ([{"disable_fused_ar_quant": True}, {}, {}], {"disable_fused_ar_quant": True}, "custom"),
        ([{}, {"backend": "torch"}, {}], {"backend": "torch"}, "process_group"),
        ([{"deterministic": True}, {}, {}], {"deterministic": True}, "custom"),
        ([{"timeout_s": 5.0}, {"timeout_s": 90.0}, {"timeout_s": 7.0}], {"timeout_s": 90.0}, "custom"),
        ([{"buffer_mb": 4}, {"buffer_mb": 3}, {"buffer_mb": 8}], {"buffer_mb": 3}, "custom"),
        ([{}, {"debug": True}, {}], {"debug": True}, "custom"),
    ],
)
def test_all_take_the_safer_value_and_rank_0_warns(
    ranks: RankPool, by_rank: list[dict[str, Any]], taken: dict[str, Any], stage: str
) -> None:
    (name,) = taken
    if stage == "process_group":  # Gloo sums in its own order, and the check of the sum is bit-exact
        by_rank = [{**own, "deterministic": True} for own in by_rank]
        taken = {**taken, "deterministic": True}
    results = ranks(3).run(disagree, by_rank)
    for rank, (changed, seen, found) in enumerate(results):
        assert changed == taken
        assert found == stage
        if rank > 0:
            assert seen == []
            continue
        (text,) = [line for line in seen if "differs" in line]
        assert f"FUSEDCOMM_{name.upper()}" in text
        for r, own in enumerate(by_rank):
            assert f"rank {r}: {own.get(name, getattr(Settings(), name))}" in text


def malformed() -> None:
    """One rank's environment is malformed: all ranks say so, with its name, value and what is allowed."""
    own = os.environ.get("FUSEDCOMM_TIMEOUT_S")
    start = time.monotonic()
    text = raises(SettingError, fusedcomm.init_distributed, "FUSEDCOMM_TIMEOUT_S", "'soon'", "seconds", "rank 1")
    assert time.monotonic() - start < 30
    assert isinstance(SettingError(text), ValueError)
    assert (own is not None) == (int(os.environ["RANK"]) == 1)
    assert not dist.is_initialized()  # it was initialised for nothing, and ended again
    os.environ.pop("FUSEDCOMM_TIMEOUT_S", None)
    with fusedcomm.init_distributed() as group:  # and the ranks are in step
        works(group)


def test_a_malformed_setting_on_one_rank_is_an_error_on_all() -> None:
    run_ranks(3, malformed, launcher="spawn", rank_env=[{}, {"FUSEDCOMM_TIMEOUT_S": "soon"}, {}])


def settings_by_environment() -> tuple[str, float, int]:
    with fusedcomm.init_distributed() as group:
        works(group)
        return stage_of(group), group.settings.timeout_s, group.settings.buffer_mb


def test_settings_come_from_the_environment() -> None:
    env = {"DISABLE": "1", "DETERMINISTIC": "1", "TIMEOUT_S": "33", "BUFFER_MB": "5"}
    env = {f"FUSEDCOMM_{name}": text for name, text in env.items()}
    found = run_ranks(2, settings_by_environment, launcher="spawn", env=env)
    assert found == [("process_group", 33.0, 5)] * 2


def unusable_backend(backend: str) -> None:
    text = raises(SettingError, fusedcomm.init_distributed, "FUSEDCOMM_BACKEND: expected", f"got '{backend}'", "rank 2")
    allowed = text.partition("got")[0]
    assert "torch" in allowed
    assert "native" in allowed
    assert backend not in allowed


@pytest.mark.parametrize("backend", ["triton", "aiter"])
def test_a_backend_that_cannot_serve_is_an_error_on_all(backend: str) -> None:
    run_ranks(3, unusable_backend, backend, launcher="spawn", rank_env=[{}, {}, {"FUSEDCOMM_BACKEND": backend}])


# ---- builds and hosts ----


def another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load()
    assert library is not None
    if dist.get_rank() == 1:
        monkeypatch.setattr(library, "build_id", lambda: b"f" * 16)
    raises(VersionMismatchError, GroupCoordinator, "different builds", "rank 1 " + "f" * 16, "rank 0 ")


def patched(body: Callable[[pytest.MonkeyPatch], Any]) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = body(monkeypatch)
    with GroupCoordinator() as group:  # the ranks are in step, and the next group is an ordinary one
        works(group)
        assert stage_of(group) == "custom"
    return result


def run_another_build() -> None:
    patched(another_build)


def test_mixed_builds_are_an_error_on_all_ranks(ranks: RankPool) -> None:
    ranks(3).run(run_another_build)


def fallback(expected: str) -> None:
    """All ranks use the process group together; rank 0 warns once, with the reason."""
    group, seen = create(Settings(deterministic=True))
    with group:
        assert stage_of(group) == "process_group"
        assert expected in group.explain("all_reduce", (4, 128), torch.float32).reasons["custom"]
        check_all_reduce(group, 1, (4, 129), torch.bfloat16)
        check_norm(group, 2, (4, 129), torch.bfloat16)
        check_quant(group, 3, (4, 128), torch.bfloat16)
        group.barrier()
    if dist.get_rank() == 0:
        (text,) = seen
        assert expected in text
        assert "all ranks use the process group" in text
    else:
        assert seen == []


def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 2:
        monkeypatch.setattr(native, "load", lambda: None)
    fallback("rank 2 has no native library")


def other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 1:
        monkeypatch.setattr("torch.__version__", "2.11.0")
    fallback("rank 1 runs torch 2.11.0")


def unloadable_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank cannot load its library: not one rank raises and the others wait."""
    if dist.get_rank() == 1:

        def fails() -> None:
            raise OSError("undefined symbol: aoti_torch_new")

        monkeypatch.setattr(native, "load", fails)
    raises(FusedCommError, GroupCoordinator, "undefined symbol", "rank 1")


def run_no_library() -> None:
    patched(no_library)


def run_other_torch() -> None:
    patched(other_torch)


def run_unloadable_library() -> None:
    patched(unloadable_library)


@pytest.mark.parametrize("body", [run_no_library, run_other_torch, run_unloadable_library])
def test_ranks_that_are_not_alike(ranks: RankPool, body: Callable[[], None]) -> None:
    ranks(3).run(body)


def other_host() -> None:
    host = "one" if dist.get_rank() < 2 else "two"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group = GroupCoordinator(settings=Settings(host_id=host, deterministic=True))
    seen = [str(w.message) for w in caught if "custom" in str(w.message)]
    with group:
        assert stage_of(group) == "process_group"
        assert "another host" in str(group.explain("all_reduce", (4, 128), torch.float32))
        works(group)
        assert len(seen) == (dist.get_rank() == 0)
        assert all("rank 2 is on another host" in text for text in seen)
    members = [r for r in range(3) if (r < 2) == (dist.get_rank() < 2)]
    with GroupCoordinator(members, settings=Settings(host_id=host)) as group:  # a group within a host
        assert stage_of(group) == "custom"
        works(group)


def test_ranks_on_several_hosts_use_the_process_group(ranks: RankPool) -> None:
    ranks(3).run(other_host)


def other_host_by_environment() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fusedcomm.init_distributed() as group:
            group.barrier()
            return stage_of(group)


def test_the_host_can_be_given_by_the_environment() -> None:
    rank_env = [{"FUSEDCOMM_HOST_ID": "a"}, {"FUSEDCOMM_HOST_ID": "b"}]
    assert run_ranks(2, other_host_by_environment, launcher="spawn", rank_env=rank_env) == ["process_group"] * 2


# ---- set-up that fails on one rank ----


def fail_on(monkeypatch: pytest.MonkeyPatch, rank: int, name: str, error: OSError = NO_SPACE) -> None:
    """os.<name>, as symmetric_buffer calls it, fails on one rank."""
    if dist.get_rank() == rank:

        def fails(*args: object) -> None:
            raise error

        monkeypatch.setattr(symmetric_buffer.os, name, fails)


def nothing_left() -> None:
    assert not [path.name for path in Path("/dev/shm").glob(f"fusedcomm-*-{os.getpid()}-*")]
    assert "fusedcomm" not in Path("/proc/self/maps").read_text().replace("libfusedcomm", "").replace("/fusedcomm/", "")


def no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, 1, "posix_fallocate")
    fallback("rank 1: cannot allocate")
    nothing_left()
    fallback("No space left on device")


def no_space_on_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, 0, "posix_fallocate")
    fallback("rank 0: cannot allocate")
    nothing_left()


def no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without memfd: all take /dev/shm, and the custom stages serve."""
    fail_on(monkeypatch, 2, "memfd_create", OSError(errno.ENOSYS, "not implemented"))
    group, seen = create()
    with group:
        assert stage_of(group) == "custom"
        assert seen == []
        assert not [path.name for path in Path("/dev/shm").glob(f"fusedcomm-*-{os.getpid()}-*")]
        maps = Path("/proc/self/maps").read_text()
        assert maps.count("/dev/shm/fusedcomm-") == group.world_size
        assert "memfd:fusedcomm" not in maps
        works(group)
        check_quant(group, 1, (700, 1024), torch.bfloat16)
    nothing_left()


def no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 2:

        def fails(export: object) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        monkeypatch.setattr(symmetric_buffer, "_attach", fails)
    fallback("rank 2: cannot map the segment of rank 0")
    nothing_left()


def run_no_space() -> None:
    patched(no_space)


def run_no_space_on_rank_0() -> None:
    patched(no_space_on_rank_0)


def run_no_memfd() -> None:
    patched(no_memfd)


def run_no_mapping() -> None:
    patched(no_mapping)


@pytest.mark.parametrize("body", [run_no_space, run_no_space_on_rank_0, run_no_memfd, run_no_mapping])
def test_set_up_that_fails_on_one_rank(ranks: RankPool, body: Callable[[], None]) -> None:
    ranks(3).run(body)


def limited_files() -> None:
    """A real limit, on one rank: a file may not grow to the size of its segment."""
    import resource

    if int(os.environ["RANK"]) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group = fusedcomm.init_distributed()
    with group:
        assert stage_of(group) == "process_group"
        assert "rank 1" in str(group.explain("all_reduce", (4, 128), torch.float32))
        group.barrier()
    assert len([w for w in caught if "rank 1" in str(w.message)]) == (int(os.environ["RANK"]) == 0)


def test_a_limit_on_one_rank_moves_all_to_the_process_group() -> None:
    run_ranks(3, limited_files, launcher="spawn")


# ---- FUSEDCOMM_DEBUG=1 on good calls ----


def debugged() -> None:
    with GroupCoordinator(settings=Settings(debug=True)) as group:
        for seed in range(3):
            check_all_reduce(group, seed, (4, 129), torch.bfloat16)
            check_norm(group, seed, (4, 129), torch.bfloat16)
            check_quant(group, seed, (4, 128), torch.bfloat16)
            group.barrier()


def test_debugging_changes_no_result(ranks: RankPool) -> None:
    ranks(3).run(debugged)
