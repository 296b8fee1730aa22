"""What the peers of one run share: the ranks, MPI, and groups with given settings and tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import fusedcomm
from fusedcomm.comm.tuning import Tuning, slot_bytes
from fusedcomm.groups import bootstrap

FORCING: dict[str, dict[str, Any]] = {
    "fused": {},
    "fused_norm": {"disable_fused_ar_quant": True},
    "custom": {"disable_fused_ar_quant": True, "disable_fused_ar_norm": True},
    "process_group": {"disable_fused_ar_quant": True, "disable_fused_ar_norm": True, "disable_custom_ar": True},
}
"""The settings under which each stage is the fastest one left."""

NEVER = 1 << 62
ALGORITHMS: dict[str, dict[str, int]] = {
    "one_shot": {"one_shot_max_bytes": NEVER},
    "two_shot": {"one_shot_max_bytes": 0},
}


def check_tuning(overrides: Mapping[str, int]) -> None:
    """ValueError unless all are fields of Tuning."""
    known = {f.name for f in dataclasses.fields(Tuning)}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"tuning: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}")


@contextlib.contextmanager
def tuned(**overrides: int) -> Iterator[None]:
    """Groups made inside take these values instead of the fields of their Tuning; on all ranks alike."""
    check_tuning(overrides)
    with contextlib.ExitStack() as patches:
        for name in ("choose_tuning", "choose_gpu_tuning"):
            for module in _modules_with(name):
                patches.enter_context(mock.patch.object(module, name, _overriding(getattr(module, name), overrides)))
        yield


def _modules_with(name: str) -> list[ModuleType]:
    """Where a group may look a function of fusedcomm.comm.tuning up."""
    modules = [
        module for path, module in sys.modules.items() if path.startswith(("fusedcomm.groups.", "fusedcomm.comm."))
    ]
    return [module for module in modules if hasattr(module, name)]


def _overriding(choose: Callable[..., Any], overrides: Mapping[str, int]) -> Callable[..., Any]:
    def chosen(*arguments: Any, **options: Any) -> Any:
        tuning = choose(*arguments, **options)
        own = {f.name for f in dataclasses.fields(tuning)}  # a GPU's has fewer
        return dataclasses.replace(tuning, **{k: v for k, v in overrides.items() if k in own})

    return chosen


class Job:
    """The ranks of a benchmark, under mpiexec (then ``mpi`` is the communicator) or torchrun (None)."""

    def __init__(self) -> None:
        facts = bootstrap.detect()
        # a core each, as a launcher would set it; more threads than cores would measure the scheduler
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // facts.world_size))
        self.group = fusedcomm.init_distributed()
        self.rank, self.world_size = self.group.rank, self.group.world_size
        self.mpi: Any = _mpi_world() if facts.launcher == "mpi" else None
        self._groups: dict[tuple[object, ...], fusedcomm.GroupCoordinator] = {}

    def group_with(self, stage: str = "fused", tuning: Mapping[str, int] | None = None) -> fusedcomm.GroupCoordinator:
        """A group whose fastest stage is ``stage``, with this tuning; made at the first request and kept."""
        tuning = dict(tuning or {})
        key = (stage, *sorted(tuning.items()))
        if key == ("fused",):
            return self.group
        if key not in self._groups:
            settings = dataclasses.replace(fusedcomm.Settings.from_environ(), **FORCING[stage])
            with tuned(**tuning):
                self._groups[key] = fusedcomm.GroupCoordinator(settings=settings)
        return self._groups[key]

    def barrier(self) -> None:
        self.group.barrier()

    def from_first_rank(self, number: int) -> int:
        return int(self.group.broadcast(torch.tensor([number], dtype=torch.int64)).item())

    def of_all_ranks(self, number: float) -> list[float]:
        gathered: list[float] = self.group.all_gather(torch.tensor([number], dtype=torch.float64), dim=0).tolist()
        return gathered

    def set_up_seconds(self, times: int = 5) -> float:
        """How long making a group takes: the slowest rank, the median of several."""
        samples = []
        for _ in range(times):
            dist.barrier()
            start = time.perf_counter()
            group = fusedcomm.GroupCoordinator()
            samples.append(max(self.of_all_ranks(time.perf_counter() - start)))
            group.close()
        return sorted(samples)[times // 2]

    def slab_bytes(self) -> int:
        """Shared memory of one rank of a group with the default settings; 0 without the native library."""
        library = fusedcomm.native.load()
        return 0 if library is None else int(library.segment_bytes(slot_bytes(self.group.settings.buffer_mb_on("cpu"))))

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        fusedcomm.destroy_distributed()


def _mpi_world() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD
