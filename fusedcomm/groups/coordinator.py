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

from fusedcomm import native, platform
from fusedcomm.comm import process_group
from fusedcomm.comm.aiter import AiterCollectives
from fusedcomm.comm.custom_gpu import GpuCustomAllReduce, TraceRecord
from fusedcomm.comm.guard import CallGuard
from fusedcomm.comm.local import local_ops
from fusedcomm.comm.plan import OPS, Facts, Plan
from fusedcomm.comm.stages import StagedCollectives
from fusedcomm.comm.streams import GraphCapture, side_stream
from fusedcomm.env import Settings
from fusedcomm.errors import FusedCommError, SettingError
from fusedcomm.groups.custom_setup import choose_sizes, gpu_facts, make_custom
from fusedcomm.groups.device import choose_device
from fusedcomm.groups.topology import Hello, agree
from fusedcomm.ops.dispatch import find_local_backend

_STATUS_BYTES = 256

_groups: weakref.WeakSet[GroupCoordinator] = weakref.WeakSet()
_fork_hook_installed = False


class GroupCoordinator(StagedCollectives):
    """A group of ranks that compute one model together; every method is called by all of them, in the same order.

    Owns its process groups, its symmetric buffer and its custom all-reduce; ``close()`` or ``with`` frees them. A group
    is used by one thread at a time.

    Args:
        ranks: global ranks of the group, this one among them; None is the whole world. Only these ranks take part in
            making the group.
        device: where its tensors live: ``"cpu"``, ``"cuda"`` (GPU ``local_rank % device_count`` of its host; ROCm's
            name is "cuda" too), or one with an index. None: "cuda" where torch sees a GPU, else "cpu". Ranks may share
            a GPU.
        timeout: deadline of every wait in seconds; None takes ``FUSEDCOMM_TIMEOUT_S``.
        settings: in place of those of the environment.
        local_rank: this rank's number on its host; None: what torchrun says, else the global rank.

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
        self._global_rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if local_rank is None:
            local_rank = dist.get_node_local_rank(self._global_rank) if dist.is_initialized() else 0
        self._local_rank = local_rank
        self.device = choose_device(device, local_rank)
        check_timeout(timeout)
        self._closed = False
        self._forked = False
        self._custom = None
        self._group = self._control = None
        self._ranks = _check_ranks(ranks, self._global_rank, world)
        self._rank, self._world_size = self._ranks.index(self._global_rank), len(self._ranks)
        on_gpu = self.device.type == "cuda"
        is_capturing = (torch.cuda.is_current_stream_capturing,) if on_gpu else ()
        self._guard = CallGuard(self._exchange, self._rank, *is_capturing)
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
        """The process group that moves tensors; None at world size 1.

        On CPU the same one as control_group. On GPUs NCCL's (RCCL's), or where ranks share a GPU one of Gloo, which
        takes CPU tensors.
        """
        return self._group

    @property
    def control_group(self) -> dist.ProcessGroup | None:
        """The process group (Gloo) that carries votes; None at world size 1."""
        return self._control

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
    def graph_capture(self) -> Iterator[GraphCapture]:
        """Wraps the capture of device graphs that hold collectives; all ranks enter and leave it together.

        Nothing needs it for correct results: the kernels register no buffers, and graphs and eager calls mix in any
        order. Use it because kernels of ranks that are done would otherwise wait for those that still capture (warm-up
        and compilation take long), up to the deadline; and because an error on one rank is raised by all, not hidden
        behind the hang that follows. Inside, a side stream is current; it is ``stream`` of what this gives::

            with group.graph_capture() as capture, torch.cuda.graph(graph, stream=capture.stream):
                ...

        Every rank captures the same collectives and replays them in the same order as its peers. A replay counts as a
        call of the group on the stream that it runs on (comm/streams.py): on another stream than the eager calls it has
        to be ordered with them. On CPU there is nothing to capture, and this does nothing.

        Raises:
            FusedCommError: another rank raised an error inside.
        """
        if self.device.type == "cpu":
            yield GraphCapture(None)
            return
        self._meet_around_capture("")
        try:
            with side_stream(self.device) as capture:
                yield capture
        except Exception as error:
            with contextlib.suppress(Exception):  # what went wrong first is what counts
                self._meet_around_capture(f"{type(error).__name__}: {error}")
            raise
        self._meet_around_capture("")

    def _meet_around_capture(self, problem: str) -> None:
        status = problem.encode()[:_STATUS_BYTES].ljust(_STATUS_BYTES, b"\0")
        for rank, data in enumerate(self._run("graph_capture", None, None, self._exchange, status)):
            if rank != self.rank and (text := data.rstrip(b"\0").decode(errors="replace")):
                raise FusedCommError(f"rank {rank} failed around the capture of a graph: {text}")

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

    def check(self) -> None:
        """Raises what went wrong so far, what only the device has noticed as yet included; waits for nothing.

        Raises:
            GroupBrokenError: an earlier collective passed its deadline, or a peer died.
            GroupClosedError: the group is closed.
        """
        self._guard.check()
        if isinstance(self._custom, GpuCustomAllReduce):
            try:
                self._custom.check()
            except BaseException as error:
                self._fail(error)
                raise

    def trace(self) -> list[TraceRecord]:
        """The last collectives that the group's own kernels ran on this rank's GPU, oldest first, replayed ones too.

        Waits for the device. Empty on CPU, and where the process group serves.
        """
        if self._closed or self._forked or not isinstance(self._custom, GpuCustomAllReduce):
            return []
        return self._custom.trace()

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
        # a GPU may have found what no call has raised yet
        is_healthy = self._guard.usable and not (self._custom is not None and self._custom.has_failed())
        if not self._forked:
            self._guard.close()
        self._stop_direct()
        self._closed = True
        if self._group is not None and not self._forked:
            # first: NCCL may be waiting on the device for a peer that is gone, and the rest waits for the device
            process_group.close(self._group, self.device, is_healthy=is_healthy)
        if self._custom is not None:
            self._custom.close()
        if self._aiter is not None:
            self._aiter.close()
        self._group = self._control = None

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
        library = gpu_library = gpu = None
        try:
            library = native.load()
            if self.device.type == "cuda":
                gpu_library = native.load_gpu()
                gpu = gpu_facts(self.device, gpu_library)
            find_local_backend(settings, self.device.type)
        except OSError as error:
            problem = problem or f"the native library cannot be loaded: {error}"
        except RuntimeError as error:  # SettingError among them; or a GPU that is out of order
            problem = problem or str(error)
        hello = Hello.of_this_rank(settings, None if library is None else library.build_id(), problem, gpu)
        if timeout is not None:
            hello = hello.with_timeout(timeout)
        store = None
        if self.world_size > 1:
            store = process_group.rendezvous(self._ranks)
            self._control = process_group.create_gloo(
                store, "control", self._rank, self.world_size, hello.settings.timeout_s
            )
        agreement = agree([Hello.unpack(data) for data in self._exchange(hello.pack())])
        self._settings = agreement.settings
        if self.rank == 0:
            for line in agreement.disagreements:
                warnings.warn(line, RuntimeWarning, stacklevel=4)
        self._group = self._control
        if store is not None and self.device.type == "cuda":
            timeout_s = self._settings.timeout_s
            self._group = (
                process_group.create_nccl(store, "device", self._ranks, self._rank, self.device, timeout_s)
                if agreement.nccl
                else process_group.create_gloo(store, "device", self._rank, self.world_size, timeout_s)
            )

        self._custom, unavailable = make_custom(agreement, self.device, self._exchange, self.rank, library, gpu_library)
        wanted = not self._settings.disable and self._settings.backend in (None, "native")
        if unavailable and wanted and self.world_size > 1 and self.rank == 0:
            warnings.warn(
                f"no custom all-reduce, all ranks use the process group: {unavailable}",
                RuntimeWarning,
                stacklevel=4,
            )

        self._guard.compare_calls = self._settings.debug
        backend = find_local_backend(self._settings, self.device.type)
        self._local = local_ops(backend, platform.fp8_dtype(self.device))
        archs = tuple(gpu.arch for gpu in agreement.gpus)
        self._aiter, aiter_unavailable = AiterCollectives.set_up(
            self._exchange, self._settings, archs, self._ranks, self.device, self._local
        )
        sizes = choose_sizes(agreement, self.device.type)
        self._facts = functools.partial(
            Facts,
            world_size=self.world_size,
            settings=self._settings,
            custom_unavailable=unavailable,
            slot_bytes=sizes.slot_bytes,
            one_shot_max_bytes=sizes.one_shot_max_bytes,
            device_type=self.device.type,
            archs=archs,
            aiter_unavailable=aiter_unavailable,
        )
        self._go_direct()

    def _exchange(self, data: bytes) -> list[bytes]:
        return [data] if self._control is None else process_group.exchange_bytes(data, self._control)


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
        for inherited in (group._group, group._control):
            if inherited is not None:
                process_group.abandon(inherited)
