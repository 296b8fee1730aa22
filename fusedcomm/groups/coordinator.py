"""The GroupCoordinator: one tensor-parallel group, its resources, and its collectives."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
import torch.distributed as dist

from fusedcomm import native
from fusedcomm.comm import process_group
from fusedcomm.comm.custom import CustomAllReduce
from fusedcomm.comm.guard import CallGuard
from fusedcomm.comm.local import local_ops
from fusedcomm.comm.plan import OPS, Facts, Plan
from fusedcomm.comm.stages import StagedCollectives
from fusedcomm.comm.symmetric_buffer import SetupError
from fusedcomm.comm.tuning import choose_tuning, slot_bytes
from fusedcomm.env import Settings
from fusedcomm.errors import FusedCommError, SettingError
from fusedcomm.groups.topology import Hello, agree
from fusedcomm.ops.dispatch import choose_local_backend

MAX_CUSTOM_WORLD_SIZE = 16

_groups: weakref.WeakSet[GroupCoordinator] = weakref.WeakSet()
_fork_hook_installed = False


class GroupCoordinator(StagedCollectives):
    """A group of ranks that compute one model together; every method is called by all of them, in the same order.

    Owns its process groups, its symmetric buffer and its custom all-reduce; ``close()`` or ``with`` frees them. A group
    is used by one thread at a time.

    Args:
        ranks: global ranks of the group, this one among them; None is the whole world. Only these ranks take part in
            making the group.
        device: where its tensors live; only ``"cpu"`` as yet.
        timeout: deadline of every wait in seconds; None takes ``FUSEDCOMM_TIMEOUT_S``.
        settings: in place of those of the environment.

    Raises:
        ValueError: a bad argument.
        SettingError: a malformed setting on any rank (on all ranks).
        VersionMismatchError: ranks run different builds of the library (on all ranks).
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
        timeout: float | None = None,
        settings: Settings | None = None,
        local_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.device = check_device(device)
        check_timeout(timeout)
        self._closed = False
        self._forked = False
        self._custom = None
        self._group = None
        self._global_rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._ranks = _check_ranks(ranks, self._global_rank, world)
        self._rank, self._world_size = self._ranks.index(self._global_rank), len(self._ranks)
        self._local_rank = self._global_rank if local_rank is None else local_rank
        self._guard = CallGuard(self._exchange, self._rank)
        try:
            self._set_up(settings, timeout)
        except BaseException:
            self.close()
            raise
        _groups.add(self)
        _install_fork_hook()

    # ---- who ----

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks of the group."""
        return self._world_size

    @property
    def global_rank(self) -> int:
        """This rank within the job."""
        return self._global_rank

    @property
    def local_rank(self) -> int:
        """This rank among those of its host."""
        return self._local_rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks of the group."""
        return self._ranks

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the last rank of the group."""
        return self.rank == self.world_size - 1

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The process group that moves tensors; None at world size 1. On CPU the same one as control_group."""
        return self._group

    @property
    def control_group(self) -> dist.ProcessGroup | None:
        """The process group that carries votes; None at world size 1."""
        return self._group

    @property
    def settings(self) -> Settings:
        """The settings that the ranks agreed on."""
        return self._settings

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._closed

    # ---- the collectives are those of StagedCollectives ----

    @contextlib.contextmanager
    def graph_capture(self) -> Iterator[None]:
        """Wraps the capture of a device graph that holds collectives; on CPU there is nothing to capture."""
        yield

    # ---- what is going on ----

    def explain(
        self, op: str, shape: Sequence[int], dtype: torch.dtype, *, group_size: int = 128, **options: object
    ) -> Plan:
        """The plan of a call: its stage, and why not each faster one. ``print`` it.

        Args:
            op: ``"all_reduce"``, ``"allreduce_rmsnorm"`` or ``"allreduce_rmsnorm_quant"``.
            shape: of x, ``[..., H]``.
            dtype: of x.
            group_size: of the quantisation.
            options: none as yet; an unknown one is an error.
        """
        if options:
            raise ValueError(f"options: expected group_size alone, got {sorted(options)}")
        if not shape:
            raise ValueError("shape: expected at least one dimension, got ()")
        if op not in OPS:
            raise ValueError(f"op: expected one of {OPS}, got {op!r}")
        return self._plan_shape(op, torch.Size(shape), dtype, group_size)

    def stats(self) -> dict[str, int]:
        """How often each ``<op>.<stage>`` ran, and how many calls of the kernels were one-shot and two-shot."""
        counts = dict(self._stats)
        if self._custom is not None and not self._closed:
            counts.update({f"algorithm.{name}": n for name, n in self._custom.counts().items()})
        return counts

    def reset_stats(self) -> None:
        """Forgets the ``<op>.<stage>`` counts."""
        self._stats.clear()

    # ---- life ----

    def close(self) -> None:
        """Frees everything the group owns. Not collective; closing twice is fine; peers in a call get an error.

        Raises:
            RuntimeError: another thread is in a call of this group.
        """
        if self._closed:
            return
        if not self._forked:
            self._guard.close()
        self._stop_direct()
        self._closed = True
        if self._custom is not None:
            self._custom.close()
        self._group = None

    def __enter__(self) -> GroupCoordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._guard.usable else "broken"
        return f"GroupCoordinator(rank={self.rank}, world_size={self.world_size}, device={self.device}, {state})"

    # ---- inside ----

    def _set_up(self, settings: Settings | None, timeout: float | None) -> None:
        problem, settings = "", settings
        if settings is None:
            try:
                settings = Settings.from_environ()
            except FusedCommError as error:
                problem, settings = str(error), Settings()
        library = None
        try:
            library = native.load()
        except OSError as error:
            problem = problem or f"the native library cannot be loaded: {error}"
        if not problem:
            try:
                choose_local_backend(settings, self.device.type, native_available=library is not None)
            except FusedCommError as error:
                problem = str(error)
        hello = Hello.of_this_rank(settings, None if library is None else library.build_id(), problem)
        if timeout is not None:
            hello = hello.with_timeout(timeout)
        if self.world_size > 1:
            self._group = process_group.create(self._ranks, self._rank, hello.settings.timeout_s)
        agreement = agree([Hello.unpack(data) for data in self._exchange(hello.pack())])
        self._settings = agreement.settings
        if self.rank == 0:
            for line in agreement.disagreements:
                warnings.warn(line, RuntimeWarning, stacklevel=4)

        slot = slot_bytes(self._settings.buffer_mb)
        tuning = choose_tuning(self.world_size, agreement.cores, slot)
        unavailable = agreement.custom_unavailable
        if self.world_size > MAX_CUSTOM_WORLD_SIZE:
            unavailable = f"the kernels serve up to {MAX_CUSTOM_WORLD_SIZE} ranks, got {self.world_size}"
        wanted = not self._settings.disable and self._settings.backend != "torch"
        if self.world_size > 1 and wanted and not unavailable and library is not None:
            try:
                self._custom = CustomAllReduce(
                    library,
                    self._exchange,
                    self.rank,
                    self.world_size,
                    slot_bytes=slot,
                    tuning=tuning,
                    timeout_s=self._settings.timeout_s,
                    pids=agreement.pids,
                )
            except SetupError as error:
                unavailable = f"set-up failed: {error}"
        if unavailable and wanted and self.world_size > 1 and self.rank == 0:
            warnings.warn(
                f"no custom all-reduce, all ranks use the process group: {unavailable}",
                RuntimeWarning,
                stacklevel=4,
            )

        self._guard.compare_calls = self._settings.debug
        backend = choose_local_backend(self._settings, self.device.type, native_available=library is not None)
        self._local = local_ops(backend)
        self._facts = functools.partial(
            Facts,
            world_size=self.world_size,
            settings=self._settings,
            custom_unavailable=unavailable,
            slot_bytes=slot,
            one_shot_max_bytes=tuning.one_shot_max_bytes,
        )
        self._go_direct()

    def _exchange(self, data: bytes) -> list[bytes]:
        return [data] if self._group is None else process_group.exchange_bytes(data, self._group)


def check_device(device: torch.device | str | None) -> torch.device:
    """The device of a group; ValueError if there is no such group."""
    try:
        checked = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a torch.device or its name, got {device!r}") from None
    if checked.type != "cpu":
        raise ValueError(f"device: expected cpu (GPU groups are not built yet), got {checked}")
    return checked


def check_timeout(timeout: float | None) -> None:
    """ValueError unless it is None or what ``FUSEDCOMM_TIMEOUT_S`` may be."""
    if timeout is None:
        return
    try:
        Settings(timeout_s=timeout)
    except SettingError as error:
        raise ValueError(f"timeout: {str(error).partition(': ')[2]}") from None


def _check_ranks(ranks: Sequence[int] | None, global_rank: int, world: int) -> tuple[int, ...]:
    if ranks is None:
        return tuple(range(world))
    checked = tuple(int(r) for r in ranks)
    if len(set(checked)) != len(checked) or not all(0 <= r < world for r in checked):
        raise ValueError(f"ranks: expected different ranks between 0 and {world - 1}, got {checked}")
    if global_rank not in checked:
        raise ValueError(f"ranks: expected this rank ({global_rank}) among them, got {checked}")
    return tuple(sorted(checked))


def _install_fork_hook() -> None:
    global _fork_hook_installed
    if not _fork_hook_installed:
        _fork_hook_installed = True
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for group in _groups:
        group._forked = True
        group._guard.forked()
        group._stop_direct()
        if group._custom is not None:
            group._custom.abandon()
        if group._group is not None:
            process_group.abandon(group._group)
