"""The collectives that any part of an engine needs: gather, scatter, broadcast, barrier.

Through shared memory where the group has it (on CPU), else through the process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fusedcomm.comm import process_group
from fusedcomm.comm.custom import CustomAllReduce
from fusedcomm.comm.guard import CallGuard
from fusedcomm.comm.native_collectives import NativeCollectives
from fusedcomm.env import Settings
from fusedcomm.ops.checks import check_device, check_x

_Result = TypeVar("_Result")


class DataMovement:
    """Base of StagedCollectives; GroupCoordinator, which derives from both, owns what they use."""

    device: torch.device
    """Where the group's tensors live."""
    _rank: int
    _world_size: int
    _guard: CallGuard
    _custom: NativeCollectives | None
    _group: dist.ProcessGroup | None
    _control: dist.ProcessGroup | None
    _settings: Settings

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The x of all ranks, joined along ``dim`` in rank order; x ``[...]`` has the same shape on every rank.

        Any dtype. Raises as all_reduce does.
        """
        dim = _check_dim(x, dim, self.device)
        x = x.detach().contiguous()
        out = x.new_empty(self._world_size, *x.shape)
        moves = self._moving()
        if self._group is None:
            self._run("all_gather", x, None, lambda: out[0].copy_(x))
        elif moves is not None:
            self._run("all_gather", x, None, moves.all_gather, x, out)
        else:
            self._run("all_gather", x, None, process_group.all_gather, x, out, self._group)
        # [W, a, n, b] -> [a, W * n, b]; along dim 0 this is a view
        return out.movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's share, along ``dim``, of the sum of x over the ranks; ``x.shape[dim]`` divides by world_size.

        The same arithmetic as all_reduce. Raises as it does.
        """
        check_x(x)
        dim = _check_dim(x, dim, self.device)
        if x.shape[dim] % self._world_size:
            raise ValueError(f"x: expected a size along dim {dim} divisible by {self._world_size}, got {x.shape[dim]}")
        parts = x.detach().unflatten(dim, (self._world_size, -1)).movedim(dim, 0).contiguous()
        out = torch.empty_like(parts[0])
        if self._group is None:
            self._run("reduce_scatter", x, dim, lambda: torch.add(parts[0], 0.0, out=out))
        elif self._custom is not None and not self._settings.disable_custom_ar:
            self._run("reduce_scatter", x, dim, self._custom.reduce_scatter, parts, out)
        else:
            group, deterministic = self._group, self._settings.deterministic
            self._run(
                "reduce_scatter",
                x,
                dim,
                lambda: process_group.reduce_scatter(parts, out, self._rank, group, deterministic=deterministic),
            )
        return out

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """x of group rank ``src``, written into x on the other ranks and returned; x is contiguous, of any dtype.

        Raises as all_reduce does.
        """
        _check_dim(x, 0, self.device)
        if not 0 <= src < self._world_size:
            raise ValueError(f"src: expected a rank between 0 and {self._world_size - 1}, got {src}")
        if not x.is_contiguous():
            raise ValueError(f"x: expected a contiguous tensor, got strides {x.stride()}")
        moves = self._moving()
        if self._group is None:
            self._run("broadcast", x, src, lambda: None)
        elif moves is not None:
            self._run("broadcast", x, src, moves.broadcast, x, src)
        else:
            self._run("broadcast", x, src, process_group.broadcast, x, src, self._group)
        return x

    def barrier(self) -> None:
        """Returns when all ranks have called it; it waits for no device. Raises as all_reduce does."""
        moves = self._moving()
        if self._control is None:
            self._run("barrier", None, None, lambda: None)
        elif moves is not None:
            self._run("barrier", None, None, moves.barrier)
        else:
            self._run("barrier", None, None, process_group.barrier, self._control)

    def _moving(self) -> CustomAllReduce | None:
        """What moves data that is not summed through shared memory, or None."""
        usable = isinstance(self._custom, CustomAllReduce) and not self._settings.disable_custom_ar
        return self._custom if usable else None  # type: ignore[return-value]

    def _run(
        self,
        op: str,
        x: torch.Tensor | None,
        option: int | None,
        function: Callable[..., _Result],
        *arguments: Any,
    ) -> _Result:
        self._guard.begin(op, x, option)
        try:
            return function(*arguments)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._guard.end()

    def _fail(self, error: BaseException) -> None:
        self._guard.failed(error)
        if not self._guard.usable and self._custom is not None:
            self._custom.give_up(error)


def _check_dim(x: torch.Tensor, dim: int, device: torch.device) -> int:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    check_device(x, device)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected between {-x.dim()} and {x.dim() - 1}, got {dim}")
    return dim % x.dim()
