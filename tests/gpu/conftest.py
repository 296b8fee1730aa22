"""Which jobs of ranks the GPU tests run on: one rank a GPU for 2, 3, 4 of them, and several ranks a GPU.

Ranks that share a GPU take turns on it (a collective costs milliseconds), so tests do less there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPool
from ranked import GPU_TIMEOUT_S

NO_GPU = "no GPU: torch.cuda.is_available() is False"
ENV = {"FUSEDCOMM_TIMEOUT_S": f"{GPU_TIMEOUT_S:g}"}


@dataclass(frozen=True)
class World:
    """Ranks and the GPUs that they share; on_cpu: neither, to try the tests themselves."""

    size: int
    gpus: int
    on_cpu: bool = False

    @property
    def shared(self) -> bool:
        """Whether ranks share a GPU."""
        return self.size > self.gpus

    @property
    def rank_gpus(self) -> int | None:
        """What the harness is told."""
        return None if self.on_cpu else self.gpus

    def __str__(self) -> str:
        return f"{self.size}/{self.gpus}"


@dataclass(frozen=True)
class Job:
    """A standing job of ranks: what the fixture ``world`` gives to a test."""

    world: World
    pool: RankPool

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.world.size

    @property
    def shared(self) -> bool:
        """Whether ranks share a GPU."""
        return self.world.shared

    @property
    def light(self) -> bool:
        """Whether to do little: ranks share a GPU, or there is none."""
        return self.world.shared or self.world.on_cpu

    def run(self, body: Callable[..., Any], *args: Any, timeout: float = 100.0) -> list[Any]:
        """Runs body(*args) on every rank."""
        __tracebackhide__ = True
        return self.pool(self.world.size, ENV, self.world.rank_gpus).run(body, *args, timeout=timeout)

    def few(self, many: int, few: int) -> int:
        """A count that fits: ``few`` where there is little to do."""
        return few if self.light else many


def _gpus(config: pytest.Config) -> int:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = config.getoption("gpus")
    if wanted is None:
        return there
    if there and not 1 <= wanted <= there:
        raise pytest.UsageError(f"--gpus: expected 1 to {there}, got {wanted}")
    return wanted if there or config.getoption("on_cpu") else 0


def _worlds(config: pytest.Config) -> list[World]:
    """Every job of this machine; without a GPU one, so that tests are collected and skipped."""
    on_cpu = config.getoption("on_cpu")
    gpus = max(_gpus(config), 1)
    sizes = [(size, size) for size in (2, 3, 4, 8) if size <= gpus]
    sizes += {1: [(2, 1), (4, 1)], 2: [(4, 2)], 3: [(6, 3)]}.get(gpus, [(2 * gpus, gpus)] if gpus == 4 else [])
    chosen = config.getoption("worlds")
    if chosen:
        try:
            sizes = [(int(a), int(b)) for a, b in (pair.split("/") for pair in chosen.split(","))]
        except ValueError:
            raise pytest.UsageError(f"--worlds: expected ranks/GPUs, as in 4/4,8/4, got {chosen!r}") from None
    return [World(size, on, on_cpu) for size, on in sizes]


def _selected(worlds: list[World], which: str) -> list[World]:
    """all: every one; main: the largest with one rank a GPU; main+shared: and those that share;
    pair: the smallest; even: those of 4 and more ranks, an even number; divides: main+shared of 2, 4 and 8 ranks."""
    own = [world for world in worlds if not world.shared]
    main = own[-1:] or worlds[:1]
    shared = [world for world in worlds if world.shared]
    both = [*main, *(world for world in shared if world not in main)]
    return {
        "all": worlds,
        "main": main,
        "main+shared": both,
        "divides": [world for world in both if world.size in (2, 4, 8)],
        "pair": worlds[:1],
        "even": [world for world in worlds if world.size >= 4 and world.size % 2 == 0],
    }[which]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives every test that takes a ``world`` its jobs."""
    if "world" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("worlds")
        worlds = _selected(_worlds(metafunc.config), marker.args[0] if marker else "all")
        metafunc.parametrize("world", worlds, ids=str, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what cannot run here, with the reason."""
    on_cpu = config.getoption("on_cpu")
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if on_cpu and item.get_closest_marker("needs_cuda"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA: this run is --on-cpu"))
        elif not on_cpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session", autouse=True)
def _start_jobs(request: pytest.FixtureRequest, ranks: RankPool) -> None:
    """Starts the standing jobs of all tests at once: each takes seconds to import torch."""
    worlds = []
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        world = callspec.params.get("world") if callspec else None
        skipped = item.get_closest_marker("skip") is not None
        if isinstance(world, World) and world not in worlds and not skipped:
            worlds.append(world)
    ranks.start([(world.size, ENV, world.rank_gpus) for world in worlds])


@pytest.fixture
def world(request: pytest.FixtureRequest, ranks: RankPool) -> Job:
    """A standing job of ranks on the GPUs."""
    return Job(request.param, ranks)


@pytest.fixture(scope="session")
def gpus(request: pytest.FixtureRequest) -> int:
    """How many GPUs the tests may use; with --on-cpu, pretend to."""
    return max(_gpus(request.config), 1)


@pytest.fixture(scope="session")
def pair_on(request: pytest.FixtureRequest, gpus: int) -> int | None:
    """The ``gpus`` of a job of two ranks that a test starts for itself: one each where there are two."""
    return None if request.config.getoption("on_cpu") else min(gpus, 2)
