"""What a collective will do, decided from facts that all its ranks share.

``choose_plan`` is pure: same facts, same plan, on every rank. That is why no rank can fall back alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import torch

from fusedcomm.comm import aiter
from fusedcomm.env import Settings
from fusedcomm.ops.types import ScaleLayout

FUSED_HIDDEN_ON_GPU = range(8, 16384 + 1, 8)
"""The last dimensions that the fused GPU kernels take; the bare sum takes any."""

OPS = ("all_reduce", "allreduce_rmsnorm", "allreduce_rmsnorm_quant")


class Stage(str, Enum):
    """The ways to complete a collective, fastest first."""

    FUSED = "fused"
    """One launch does all-reduce + add + RMSNorm + quantisation."""
    FUSED_NORM = "fused_norm"
    """One launch does all-reduce + add + RMSNorm; a second quantises."""
    CUSTOM = "custom"
    """Custom all-reduce; one local launch does the rest."""
    PROCESS_GROUP = "process_group"
    """All-reduce of torch.distributed; the same local launch."""

    def __str__(self) -> str:
        return self.value


STAGES_OF = {
    "all_reduce": (Stage.CUSTOM, Stage.PROCESS_GROUP),
    "allreduce_rmsnorm": (Stage.FUSED_NORM, Stage.CUSTOM, Stage.PROCESS_GROUP),
    "allreduce_rmsnorm_quant": (Stage.FUSED, Stage.FUSED_NORM, Stage.CUSTOM, Stage.PROCESS_GROUP),
}


@dataclass(frozen=True)
class Facts:
    """Everything a plan depends on; each field is the same on all ranks (voted at creation, or part of the call)."""

    op: str
    num_tokens: int
    hidden_size: int
    dtype: torch.dtype
    world_size: int
    settings: Settings
    custom_unavailable: str = ""
    """Why the custom stages cannot serve this group; empty if they can."""
    slot_bytes: int = 0
    one_shot_max_bytes: int = 0
    group_size: int = 128
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    device_type: str = "cpu"
    archs: tuple[str, ...] = ()
    """Those of the ranks' GPUs; empty on CPU."""
    aiter_unavailable: str = "not asked"
    """Why aiter serves no call of this group; empty if it may."""


@dataclass(frozen=True)
class Plan:
    """The stages that can serve a call, fastest first, and why each faster one cannot."""

    op: str
    stages: tuple[Stage, ...]
    reasons: dict[Stage, str] = field(default_factory=dict)
    algorithm: str | None = None
    """``"one_shot"`` or ``"two_shot"`` where a custom stage serves."""
    by_aiter: bool = False
    """Whether AMD's aiter makes the stage in place of the library's own kernels."""
    aiter_reason: str = ""
    """On AMD GPUs: why aiter does not."""

    @cached_property
    def stage(self) -> Stage:
        """The stage that the call takes."""
        return self.stages[0]

    @cached_property
    def counter(self) -> str:
        """The name under which GroupCoordinator.stats counts the call."""
        return f"{self.op}.{self.stage}"

    def __str__(self) -> str:
        lines = []
        for stage in STAGES_OF[self.op]:
            if stage is self.stage:
                how = "aiter" if self.by_aiter else self.algorithm
                lines.append(f"{self.op}: {stage}{f' ({how})' if how else ''}   <- taken")
            elif stage in self.reasons:
                lines.append(f"{self.op}: {stage}   not taken: {self.reasons[stage]}")
            else:
                lines.append(f"{self.op}: {stage}   eligible, slower")
        if self.aiter_reason:
            lines.append(f"{self.op}: aiter   not taken: {self.aiter_reason}")
        return "\n".join(lines)


def choose_plan(facts: Facts) -> Plan:
    """The stages open to a call, fastest first; the process group always is."""
    if facts.op not in OPS:
        raise ValueError(f"op: expected one of {OPS}, got {facts.op!r}")
    reasons = {}
    stages = []
    against_aiter = {}
    for stage in STAGES_OF[facts.op]:
        against_aiter[stage] = _why_not_aiter(stage, facts)
        reason = _why_not(stage, facts)
        if reason and against_aiter[stage]:
            is_forced = facts.settings.backend == "aiter" and not facts.aiter_unavailable
            reasons[stage] = against_aiter[stage] if is_forced else reason
        else:
            stages.append(stage)
    taken = stages[0]
    by_aiter = not against_aiter[taken]
    custom = taken is not Stage.PROCESS_GROUP and facts.world_size > 1 and not by_aiter
    aiter_reason = against_aiter[taken] if any(arch.startswith("gfx") for arch in facts.archs) else ""
    algorithm = choose_algorithm(facts) if custom else None
    return Plan(facts.op, tuple(stages), reasons, algorithm, by_aiter, aiter_reason)


def choose_algorithm(facts: Facts) -> str:
    """``"one_shot"`` up to the measured crossing point, ``"two_shot"`` above; the kernel applies the same rule."""
    message_bytes = facts.num_tokens * facts.hidden_size * facts.dtype.itemsize
    return "two_shot" if message_bytes > facts.one_shot_max_bytes else "one_shot"


def _switched_off(stage: Stage, settings: Settings) -> str:
    if settings.disable:
        return "FUSEDCOMM_DISABLE=1"
    switch = {
        Stage.FUSED: "disable_fused_ar_quant",
        Stage.FUSED_NORM: "disable_fused_ar_norm",
        Stage.CUSTOM: "disable_custom_ar",
    }[stage]
    return f"FUSEDCOMM_{switch.upper()}=1" if getattr(settings, switch) else ""


def _why_not_aiter(stage: Stage, facts: Facts) -> str:
    """Why aiter does not make a stage; empty if it does."""
    if stage is Stage.PROCESS_GROUP:
        return facts.aiter_unavailable or "it makes no stage that is open"
    call = (facts.num_tokens, facts.hidden_size, facts.dtype, facts.group_size, facts.archs)
    return facts.aiter_unavailable or _switched_off(stage, facts.settings) or aiter.why_not_call(stage.value, *call)


def _why_not(stage: Stage, facts: Facts) -> str:
    """Why a stage cannot serve by the library's own kernels, or at all; empty if it can."""
    if stage is Stage.PROCESS_GROUP:
        return ""
    settings = facts.settings
    if reason := _switched_off(stage, settings):
        return reason
    if settings.backend not in (None, "native"):
        return f"FUSEDCOMM_BACKEND={settings.backend}"
    if facts.custom_unavailable:
        return facts.custom_unavailable
    if facts.world_size == 1 or facts.op == "all_reduce" or stage is Stage.CUSTOM:
        return ""
    if facts.device_type == "cuda":
        if facts.hidden_size in FUSED_HIDDEN_ON_GPU:
            return ""
        most = FUSED_HIDDEN_ON_GPU[-1]
        return f"the GPU kernels take a last dimension divisible by 8, up to {most}, got {facts.hidden_size}"
    row_bytes = facts.hidden_size * facts.dtype.itemsize
    if row_bytes > facts.slot_bytes:
        return f"a row of {row_bytes} bytes does not fit a slot of {facts.slot_bytes} (FUSEDCOMM_BUFFER_MB)"
    return ""
