"""A sum over ranks that nobody has completed yet, as a type of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fusedcomm.groups.coordinator import GroupCoordinator


class UnreducedSumError(TypeError, AttributeError):
    """A PartialSum was used as if it were a tensor.

    It is an AttributeError too, so that ``hasattr`` and ``getattr(x, name, default)`` keep their meaning.
    """


def refuse(use: str) -> NoReturn:
    """Raises UnreducedSumError for ``use`` of a PartialSum."""
    raise UnreducedSumError(
        f"{use}: expected a tensor, got a PartialSum, this rank's share of a sum that is not reduced; call "
        ".reduce() first, or hand it to a norm's forward_with_allreduce_fusion"
    )


@dataclass(frozen=True, eq=False)
class PartialSum:
    """This rank's addend ``tensor [..., H]`` of a sum over the ranks of ``group``.

    Using it as a tensor (arithmetic, torch functions, indexing, tensor methods) raises UnreducedSumError, a
    TypeError: a forgotten reduction is an error and not a wrong number.
    """

    tensor: torch.Tensor
    group: GroupCoordinator

    def reduce(self) -> torch.Tensor:
        """The sum over the group, the same bits on every rank; a collective call, all ranks take part."""
        return self.group.all_reduce(self.tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        refuse(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        if hasattr(torch.Tensor, name) and not name.startswith("__"):
            refuse(f"PartialSum.{name}")
        raise AttributeError(f"'PartialSum' object has no attribute '{name}'")


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: PartialSum, *args: object) -> NoReturn:
        refuse(name)

    method.__name__ = name
    return method


# Python looks operators up on the type, past __getattr__, so each needs a method.
_BINARY = "add sub mul matmul truediv floordiv mod pow and or xor".split()  # noqa: SIM905
_OTHER = "lt le gt ge eq ne neg pos abs invert getitem setitem len iter contains bool float int index array"
for _operator in [*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER.split()]:
    setattr(PartialSum, f"__{_operator}__", _refusing(f"__{_operator}__"))
