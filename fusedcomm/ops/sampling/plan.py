"""What an op of sampling or of speculative verification runs on, decided from facts; pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusedcomm.env import Settings
from fusedcomm.errors import SettingError
from fusedcomm.native import SAMPLING_OPERATORS

OPERATORS = {name.removesuffix("_out"): name for name in SAMPLING_OPERATORS}
"""The operator behind each op, by the op's name."""

AS_GOOD_IN_TRITON = (
    "chain_speculative_sampling",
    "dflash_chain_verify",
    "greedy_chain_verify",
    "tree_speculative_sampling_target_only",
)
"""The ops that Triton serves by itself, where nothing compiled does. Those that filter or draw are a program a row and
a pass over it for a few bits of a threshold: with few rows torch's sort is faster (docs/sampling.md)."""

BACKENDS = ("native", "triton", "torch", "aiter")
"""Fastest first, and last the one that never serves by itself."""

WhyNot = Callable[[str], str]
"""Why a backend cannot serve an op on a type of device; empty if it can."""


@dataclass(frozen=True)
class SamplingPlan:
    """The backend that serves an op on tensors of a type of device, and why each other one does not."""

    op: str
    device_type: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)
    """By backend; one that could serve, and is slower, has none."""

    def __str__(self) -> str:
        return "\n".join(f"{self.op}: {backend}   {self._verdict(backend)}" for backend in BACKENDS)

    def _verdict(self, backend: str) -> str:
        if backend == self.backend:
            return "<- taken"
        reason = self.reasons.get(backend)
        return f"not taken: {reason}" if reason else "eligible, slower"


def choose_sampling_backend(settings: Settings, op: str, device_type: str, why_not: WhyNot) -> str:
    """The rule: native where it is, else Triton on a GPU for what it does as well, else torch; or what is asked for.

    A setting that asks for aiter is about collectives as well: on a GPU it gives aiter what aiter can serve, and leaves
    the rest to the rule. ``why_not`` is asked of a backend only where that comes into question, for the answer may
    take an import of Triton or of aiter.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND`` asks for what cannot serve the op; names what could.
    """
    wanted = settings.backend
    if wanted == "aiter" and device_type != "cpu":
        if not why_not("aiter"):
            return "aiter"
        wanted = None
    if wanted is None:
        return next((backend for backend in _by_itself(settings, op, device_type) if not why_not(backend)), "torch")
    if reason := why_not(wanted):
        usable = " or ".join(backend for backend in ("torch", "native", "triton") if not why_not(backend))
        raise SettingError(
            f"FUSEDCOMM_BACKEND: expected {usable} for {op} on {device_type} here, got {wanted!r}: {reason}"
        )
    return wanted


def explain_choice(settings: Settings, op: str, device_type: str, why_not: WhyNot) -> SamplingPlan:
    """choose_sampling_backend, with the reasons; ``why_not`` is asked of every backend that no setting rules out.

    Raises:
        SettingError: as choose_sampling_backend.
    """
    taken = choose_sampling_backend(settings, op, device_type, why_not)
    others = [backend for backend in BACKENDS if backend != taken]
    reasons = {
        backend: _passed_over(settings, op, device_type, backend, taken) or why_not(backend) for backend in others
    }
    return SamplingPlan(op, device_type, taken, {backend: reason for backend, reason in reasons.items() if reason})


def _by_itself(settings: Settings, op: str, device_type: str) -> tuple[str, ...]:
    """What serves without being asked for, if it can, in place of torch."""
    if settings.disable:
        return ()
    return ("native", "triton") if device_type != "cpu" and op in AS_GOOD_IN_TRITON else ("native",)


def _passed_over(settings: Settings, op: str, device_type: str, backend: str, taken: str) -> str:
    """Which setting, or rule, leaves a backend out before anybody asks whether it could serve; empty if none does."""
    if backend == "aiter":
        return ""  # it knows the settings itself
    if settings.backend == taken:
        return f"FUSEDCOMM_BACKEND={taken}"
    if backend == "torch" or backend in _by_itself(settings, op, device_type):
        return ""
    if settings.disable:
        return "FUSEDCOMM_DISABLE=1"
    if device_type == "cpu":
        return "on the CPU it is Triton's interpreter, which FUSEDCOMM_BACKEND=triton has to ask for"
    return "torch is faster for few rows; FUSEDCOMM_BACKEND=triton has to ask for it"
