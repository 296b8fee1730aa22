"""Which attention backend a draft worker takes, where its block has to see itself whole."""

from __future__ import annotations

import functools
import itertools
import warnings
from dataclasses import dataclass
from typing import NamedTuple

ROCM_BACKENDS = ("aiter", "triton")
"""What a draft worker takes on AMD GPUs by itself: the first that is supported."""


@dataclass(frozen=True)
class DraftBackendFacts:
    """What the choice depends on. Backends go by the engine's names for them.

    Raises:
        ValueError: a name that is none, or no default that is supported; names the field.
    """

    supported: frozenset[str]
    """Those that can attend to a whole block here, which is not causal."""
    on_rocm: bool
    """Whether the GPUs are AMD's."""
    cuda_default: str = "flashinfer"
    """What is taken off ROCm where nobody's choice is supported."""
    explicit: str | None = None
    """What was asked for, for the draft worker."""
    target: str | None = None
    """What the target model's attention runs on."""

    def __post_init__(self) -> None:
        for field in ("explicit", "target"):
            name = getattr(self, field)
            if name is not None and not (isinstance(name, str) and name):
                raise ValueError(f"{field}: expected the name of a backend or None, got {name!r}")
        if not isinstance(self.supported, frozenset):
            raise ValueError(f"supported: expected a frozenset of names, got {self.supported!r}")
        if self.supported.isdisjoint(self.defaults):
            got = ", ".join(sorted(self.supported)) or "none"
            raise ValueError(f"supported: expected {' or '.join(self.defaults)} among them, got {got}")

    @property
    def defaults(self) -> tuple[str, ...]:
        """What the platform takes by itself, the first that is supported."""
        return ROCM_BACKENDS if self.on_rocm else (self.cuda_default,)


class DraftBackend(NamedTuple):
    """The backend of a draft worker, and what somebody has to be told of it."""

    name: str
    complaint: str
    """Which choices are not supported, and what is taken instead; empty if there are none."""


def choose_draft_backend(facts: DraftBackendFacts) -> DraftBackend:
    """The pure rule: the explicit choice, else the target's backend, else the platform's default.

    A choice that is not supported is passed over, with a complaint. The default is aiter, else triton, on ROCm, and
    ``facts.cuda_default`` elsewhere.
    """
    choices = {"the choice for the draft": facts.explicit, "the target's": facts.target}
    asked = {whose: backend for whose, backend in choices.items() if backend is not None}
    taken = next(backend for backend in (*asked.values(), *facts.defaults) if backend in facts.supported)
    passed_over = list(itertools.takewhile(lambda choice: choice[1] != taken, asked.items()))
    if not passed_over:
        return DraftBackend(taken, "")
    names = " and ".join(f"{backend!r} ({whose})" for whose, backend in passed_over)
    return DraftBackend(
        taken,
        f"{names} cannot attend to a whole block of a draft, which is not causal: "
        f"the draft worker takes {taken!r} instead",
    )


def draft_backend(facts: DraftBackendFacts) -> str:
    """choose_draft_backend's name; a complaint becomes a RuntimeWarning, the same one once in a process."""
    chosen = choose_draft_backend(facts)
    if chosen.complaint:
        _warn_once(chosen.complaint)
    return chosen.name


@functools.cache
def _warn_once(complaint: str) -> None:
    warnings.warn(complaint, RuntimeWarning, stacklevel=3)
