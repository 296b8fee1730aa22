"""What ranks tell each other when a group is made, and what they conclude from it together."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import torch

from fusedcomm.env import BACKENDS, Settings
from fusedcomm.errors import FusedCommError, SettingError, VersionMismatchError

_MAGIC = 0x46434832  # "FCH2": format 2 of the record below
_FORMAT = struct.Struct("<IIqIB16s32s32sHBdI256sB16s32sIBB")
_OTHER_FORMAT = "a rank speaks another format: all ranks need the same build of fusedcomm"
_FLAGS = tuple(f.name for f in fields(Settings) if f.type == "bool")
_SAFER_OFF = ("dual_stream",)
"""The switches that turn something on; every other one turns a fast path off or a check on."""


MAX_CUSTOM_WORLD_SIZE = {"cpu": 16, "cuda": 8}
"""Ranks that the library's own kernels serve, by type of device."""


def host_identity(override: str | None = None) -> bytes:
    """32 bytes that are the same exactly for processes that can share memory: boot id and host name, hashed."""
    if override is not None:
        return hashlib.sha256(override.encode()).digest()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""  # the host name alone has to do
    return hashlib.sha256(f"{boot}/{socket.gethostname()}".encode()).digest()


@dataclass(frozen=True)
class GpuFacts:
    """What a rank says of its GPU."""

    uuid: bytes
    """16 bytes, the same in every process that sees the GPU, whatever *_VISIBLE_DEVICES says."""
    arch: str
    num_sms: int
    library: bool
    """Whether the rank has the native GPU library."""
    nccl: bool
    """Whether its torch has NCCL (RCCL)."""


@dataclass(frozen=True)
class Hello:
    """One rank's facts. Crosses the wire in a fixed format; nothing is unpickled."""

    pid: int
    cores: int
    native: bool
    build_id: bytes
    torch_version: bytes
    host: bytes
    settings: Settings
    error: str = ""
    """What is wrong on this rank, so that all ranks can say so and none waits."""
    gpu: GpuFacts | None = None
    """The GPU that its tensors live on; None: on the CPU."""

    @property
    def device_type(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    @classmethod
    def of_this_rank(
        cls, settings: Settings, build_id: bytes | None, error: str = "", gpu: GpuFacts | None = None
    ) -> Hello:
        return cls(
            pid=os.getpid(),
            cores=len(os.sched_getaffinity(0)),
            native=build_id is not None,
            build_id=(build_id or b"").ljust(16, b"\0"),
            torch_version=torch.__version__.encode()[:32].ljust(32, b"\0"),
            host=host_identity(settings.host_id),
            settings=settings,
            error=error,
            gpu=gpu,
        )

    def with_timeout(self, timeout_s: float) -> Hello:
        return replace(self, settings=replace(self.settings, timeout_s=timeout_s))

    def pack(self) -> bytes:
        s = self.settings
        flags = sum(1 << i for i, name in enumerate(_FLAGS) if getattr(s, name))
        backend = 0 if s.backend is None else 1 + BACKENDS.index(s.backend)
        gpu = self.gpu or GpuFacts(b"", "", 0, False, False)
        return _FORMAT.pack(
            _MAGIC,
            _FORMAT.size,
            self.pid,
            self.cores,
            self.native,
            self.build_id,
            self.torch_version,
            self.host,
            flags,
            backend,
            s.timeout_s,
            s.buffer_mb or 0,
            self.error.encode()[:256],
            self.gpu is not None,
            gpu.uuid,
            gpu.arch.encode()[:32],
            gpu.num_sms,
            gpu.library,
            gpu.nccl,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        """The record that ``pack`` made; VersionMismatchError if it is none."""
        if len(data) != _FORMAT.size or struct.unpack_from("<II", data) != (_MAGIC, _FORMAT.size):
            raise VersionMismatchError(_OTHER_FORMAT)
        fields_ = _FORMAT.unpack(data)
        pid, cores, native, build_id, version, host, flags, backend, timeout, buffer_mb, error = fields_[2:13]
        on_gpu, uuid, arch, num_sms, library, nccl = fields_[13:]
        switches: dict[str, Any] = {name: bool(flags >> i & 1) for i, name in enumerate(_FLAGS)}
        try:
            settings = Settings(
                **switches,
                backend=(None, *BACKENDS)[backend],
                timeout_s=timeout,
                buffer_mb=buffer_mb or None,
            )
        except (IndexError, SettingError):  # no rank packs such a value
            raise VersionMismatchError(_OTHER_FORMAT) from None
        gpu = GpuFacts(uuid, _text(arch), num_sms, bool(library), bool(nccl)) if on_gpu else None
        return cls(pid, cores, bool(native), build_id, version, host, settings, _text(error), gpu)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


HELLO_BYTES = _FORMAT.size


@dataclass(frozen=True)
class Agreement:
    """What all ranks of a group go by."""

    settings: Settings
    disagreements: tuple[str, ...]
    """Settings that differed, with each rank's value and the one taken."""
    cores: int
    pids: tuple[int, ...]
    custom_unavailable: str
    """Why no rank uses the custom stages; empty if all can."""
    nccl: bool = False
    """Whether NCCL serves as the process group of tensors: every rank has it, and a GPU of its own."""
    gpus: tuple[GpuFacts, ...] = ()
    """Those of the ranks; empty on CPU."""


def agree(hellos: Sequence[Hello]) -> Agreement:
    """Pure: every rank comes to the same conclusion from the same records.

    Raises:
        SettingError, FusedCommError: a rank reported an error, or ranks are on devices of different types.
        VersionMismatchError: ranks run different builds of the library.
    """
    for rank, hello in enumerate(hellos):
        if hello.error:
            kind = SettingError if hello.error.startswith("FUSEDCOMM_") else FusedCommError
            raise kind(f"{hello.error} (rank {rank})")
    builds = {h.build_id for h in hellos if h.native}
    if len(builds) > 1:
        seen = ", ".join(f"rank {r} {h.build_id.rstrip(bytes(1)).decode()}" for r, h in enumerate(hellos))
        raise VersionMismatchError(f"ranks run different builds of fusedcomm: {seen}")
    types = [h.device_type for h in hellos]
    if len(set(types)) > 1:
        seen = ", ".join(f"rank {r} {kind}" for r, kind in enumerate(types))
        raise FusedCommError(f"ranks of one group are on devices of different types: {seen}")
    # what a rank leaves to the default follows from its device
    settings, disagreements = _merge(
        [replace(h.settings, buffer_mb=h.settings.buffer_mb_on(h.device_type)) for h in hellos]
    )
    gpus = tuple(h.gpu for h in hellos if h.gpu is not None)
    return Agreement(
        settings=settings,
        disagreements=disagreements,
        cores=min(h.cores for h in hellos),
        pids=tuple(h.pid for h in hellos),
        custom_unavailable=_custom_unavailable(hellos),
        # NCCL refuses two ranks on one GPU
        nccl=bool(gpus)
        and all(g.nccl for g in gpus)
        and len({(h.host, h.gpu.uuid) for h in hellos if h.gpu}) == len(hellos),
        gpus=gpus,
    )


def _custom_unavailable(hellos: Sequence[Hello]) -> str:
    most = MAX_CUSTOM_WORLD_SIZE[hellos[0].device_type]
    if len(hellos) > most:
        return f"the kernels serve up to {most} ranks, got {len(hellos)}"
    without = [r for r, h in enumerate(hellos) if not h.native]
    if without:
        return f"rank {without[0]} has no native library"
    other_torch = [r for r, h in enumerate(hellos) if h.torch_version != hellos[0].torch_version]
    if other_torch:
        names = [h.torch_version.rstrip(b"\0").decode() for h in (hellos[0], hellos[other_torch[0]])]
        return f"rank {other_torch[0]} runs torch {names[1]}, rank 0 {names[0]}"
    other_host = [r for r, h in enumerate(hellos) if h.host != hellos[0].host]
    if other_host:
        return f"rank {other_host[0]} is on another host than rank 0"
    return _gpus_unavailable([h.gpu for h in hellos if h.gpu is not None])


def _gpus_unavailable(gpus: Sequence[GpuFacts]) -> str:
    for rank, gpu in enumerate(gpus):
        if not gpu.library:
            return f"rank {rank} has no native GPU library"
    for rank, gpu in enumerate(gpus):
        # kernels of one call have the same grid on every rank, and it depends on both
        if (gpu.arch, gpu.num_sms) != (gpus[0].arch, gpus[0].num_sms):
            return (
                f"rank {rank} has a {gpu.arch} of {gpu.num_sms} multiprocessors, "
                f"rank 0 a {gpus[0].arch} of {gpus[0].num_sms}"
            )
    return ""


def no_peer_access(access: Sequence[Sequence[int]], gpus: Sequence[GpuFacts]) -> str:
    """Why ranks cannot write to each other's memory; empty if they can. Pure, like agree.

    ``access[a][b]`` is rank a's answer for the GPU of rank b: 1 yes, 0 no, -1 that GPU is not visible to rank a. Then
    only opening its memory can tell, so -1 counts as yes here.
    """
    names = [f"rank {rank} (GPU {gpu_name(gpu.uuid)})" for rank, gpu in enumerate(gpus)]
    for a, row in enumerate(access):
        for b, answer in enumerate(row):
            if answer == 0:
                return f"{names[a]} has no peer access to {names[b]}"
    return ""


def gpu_name(uuid: bytes) -> str:
    """A GPU's UUID as the vendors' tools write it."""
    return str(UUID(bytes=uuid))


def _merge(all_settings: Sequence[Settings]) -> tuple[Settings, tuple[str, ...]]:
    """The safer value of each setting where ranks differ, and a line about each of those."""
    merged = all_settings[0]
    lines = []
    for f in fields(Settings):
        values = [getattr(s, f.name) for s in all_settings]
        if f.name == "host_id" or len(set(values)) == 1:
            continue
        if f.name in _FLAGS:
            taken: Any = f.name not in _SAFER_OFF
        elif f.name == "backend":
            taken = "torch"  # serves everywhere
        elif f.name == "timeout_s":
            taken = max(values)  # no wait ends before the deadline that a rank asked for
        else:
            taken = min(values)
        merged = replace(merged, **{f.name: taken})
        listed = ", ".join(f"rank {r}: {v}" for r, v in enumerate(values))
        lines.append(f"FUSEDCOMM_{f.name.upper()} differs ({listed}); all take {taken}")
    return merged, tuple(lines)
