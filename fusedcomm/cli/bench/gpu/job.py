"""What the cases of one run on GPUs share: the ranks' groups, NCCL, votes, and sets of inputs."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

import fusedcomm
from fusedcomm.cli.bench.cases import Case, Inputs
from fusedcomm.cli.bench.gpu.device import CudaDevice
from fusedcomm.cli.bench.gpu.harness import AbsentError
from fusedcomm.cli.bench.gpu.kernels import count_kernels
from fusedcomm.cli.bench.job import FORCING, tuned
from fusedcomm.groups import bootstrap

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Multicast through the switches stays off for every peer: this library never uses it, and it is not ours to use on a
shared server."""

BUILD_MINUTES = 15
"""How long the ranks wait for one of them that compiles a peer."""


def forbid_multicast(environ: MutableMapping[str, str] | None = None) -> None:
    """Before torch touches a GPU."""
    (os.environ if environ is None else environ).update(NO_MULTICAST)


class GpuJob:
    """The ranks of a benchmark under torchrun, a GPU each (or several a GPU, then without NCCL and its likes)."""

    def __init__(self, patience_s: float = 120.0) -> None:
        facts = bootstrap.detect()
        self.patience_s = patience_s
        self.device = CudaDevice(torch.device("cuda", facts.local_rank % torch.cuda.device_count()))
        torch.cuda.set_device(self.device.device)
        self.be_patient(BUILD_MINUTES * 60)
        self.group = fusedcomm.init_distributed(device=self.device.device)
        self.rank, self.world_size = self.group.rank, self.group.world_size
        self.shares_gpus = self.world_size > torch.cuda.device_count()
        self._control: dist.ProcessGroup | None = None
        self._nccl: dist.ProcessGroup | None = None
        self._aligner: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self._control = dist.new_group(backend="gloo", timeout=timedelta(minutes=BUILD_MINUTES))
            if not self.shares_gpus:
                self._nccl = dist.new_group(backend="nccl")
                # Its own communicator: NCCL orders graphs and eager calls on one communicator, which costs time.
                self._aligner = dist.new_group(backend="nccl")
        self._token = torch.zeros(1, device=self.device.device)
        stage = self.group.explain("all_reduce", self._token.shape, self._token.dtype).stage
        self._aligns_itself = stage.value != "process_group"
        self._groups: dict[tuple[object, ...], fusedcomm.GroupCoordinator] = {}
        self.align()
        self.device.finish()

    # ---- groups ----

    def group_with(self, stage: str = "fused", tuning: Mapping[str, int] | None = None) -> fusedcomm.GroupCoordinator:
        """A group whose fastest stage is ``stage``, with this tuning; made at the first request and kept."""
        tuning = dict(tuning or {})
        key = (stage, *sorted(tuning.items()))
        if key == ("fused",):
            return self.group
        if key not in self._groups:
            settings = dataclasses.replace(fusedcomm.Settings.from_environ(), **FORCING[stage])
            with tuned(**tuning):
                self._groups[key] = fusedcomm.GroupCoordinator(device=self.device.device, settings=settings)
        return self._groups[key]

    @property
    def nccl(self) -> dist.ProcessGroup:
        """All ranks through NCCL; AbsentError where there is none."""
        if self._nccl is None:
            raise AbsentError("ranks share GPUs" if self.shares_gpus else "one rank has no process group")
        return self._nccl

    def inputs(self, case: Case, sets: int) -> list[Inputs]:
        """``sets`` sets of rows, to take turns with."""
        return [Inputs(case, self.rank, self.world_size, self.device.device, seed) for seed in range(sets)]

    def count_kernels(self, run: Callable[[], object]) -> Counter[str]:
        """What ``run`` launches, by name."""
        return count_kernels(run, self.device.finish)

    # ---- the ranks together ----

    def align(self) -> None:
        if self._aligner is not None:
            dist.all_reduce(self._token, group=self._aligner)
        elif self._control is not None:
            self.device.finish()
            dist.barrier(self._control)

    def align_beside_load(self) -> None:
        if self._aligns_itself:
            self.group.all_reduce(self._token)
        else:
            self.align()

    def first_reason(self, reason: str) -> str:
        reasons = self._of_all(reason)
        for rank, given in enumerate(reasons):
            if given:
                return given if all(r == given for r in reasons) else f"rank {rank}: {given}"
        return ""

    def from_first_rank(self, number: int) -> int:
        return int(self._of_all(number)[0])

    def of_all_ranks(self, number: float) -> list[float]:
        return self._of_all(number)

    def _of_all(self, value: object) -> list:  # type: ignore[type-arg]
        if self._control is None:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    # ---- life ----

    def be_patient(self, seconds: float | None = None) -> None:
        """From now on, unless called again in time, a rank that is stuck says where, and ends the run."""
        faulthandler.dump_traceback_later(self.patience_s if seconds is None else seconds, exit=True)

    def say(self, text: str) -> None:
        """Progress, from the first rank, on stderr."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        fusedcomm.destroy_distributed()
        faulthandler.cancel_dump_traceback_later()
