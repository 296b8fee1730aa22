"""Counting what one decoder layer launches in one decoding step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEFINITION = (
    "A launch is one torch operator that computes or communicates on a rank; views and allocations are none. "
    "Counted in a middle layer while decoding one token."
)
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class LaunchCounter(TorchDispatchMode):
    """Counts launches while ``is_counting``, by operator name (``namespace::name``)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_counting = False
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_counting and _is_launch(func):
            self.launches[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_collectives(self) -> int:
        """Those that all ranks take part in: this library's and torch.distributed's."""
        return sum(n for name, n in self.launches.items() if name.startswith(("fusedcomm::comm_", "c10d::")))


def count_launches(layer: torch.nn.Module, decode: Callable[[Callable[[torch.Tensor], None]], object]) -> LaunchCounter:
    """What ``layer`` launches in the second and later steps of ``decode(on_token)``, which calls on_token a step."""
    counter = LaunchCounter()
    steps = 0

    def on_token(tokens: torch.Tensor) -> None:
        nonlocal steps
        steps += 1

    def enter(*arguments: object) -> None:
        counter.is_counting = steps > 0  # the first step reads the prompt

    def leave(*arguments: object) -> None:
        counter.is_counting = False

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(enter).remove)
        hooks.callback(layer.register_forward_hook(leave).remove)
        with counter:
            decode(on_token)
    return counter


def _is_launch(func: Any) -> bool:
    schema = func._schema
    if schema.name.removeprefix("aten::") in _ALLOCATIONS:
        return False
    # a view returns an alias that it does not write
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
