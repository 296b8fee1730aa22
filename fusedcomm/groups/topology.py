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

import torch

from fusedcomm.env import BACKENDS, Settings
from fusedcomm.errors import FusedCommError, SettingError, VersionMismatchError

_MAGIC = 0x46434831  # "FCH1": format 1 of the record below
_FORMAT = struct.Struct("<IIqIB16s32s32sHBdI256s")
_OTHER_FORMAT = "a rank speaks another format: all ranks need the same build of fusedcomm"
_FLAGS = tuple(f.name for f in fields(Settings) if f.type == "bool")


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

    @classmethod
    def of_this_rank(cls, settings: Settings, build_id: bytes | None, error: str = "") -> Hello:
        return cls(
            pid=os.getpid(),
            cores=len(os.sched_getaffinity(0)),
            native=build_id is not None,
            build_id=(build_id or b"").ljust(16, b"\0"),
            torch_version=torch.__version__.encode()[:32].ljust(32, b"\0"),
            host=host_identity(settings.host_id),
            settings=settings,
            error=error,
        )

    def with_timeout(self, timeout_s: float) -> Hello:
        return replace(self, settings=replace(self.settings, timeout_s=timeout_s))

    def pack(self) -> bytes:
        s = self.settings
        flags = sum(1 << i for i, name in enumerate(_FLAGS) if getattr(s, name))
        backend = 0 if s.backend is None else 1 + BACKENDS.index(s.backend)
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
            s.buffer_mb,
            self.error.encode()[:256],
        )

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        """The record that ``pack`` made; VersionMismatchError if it is none."""
        if len(data) != _FORMAT.size or struct.unpack_from("<II", data) != (_MAGIC, _FORMAT.size):
            raise VersionMismatchError(_OTHER_FORMAT)
        _, _, pid, cores, native, build_id, version, host, flags, backend, timeout, buffer_mb, error = _FORMAT.unpack(
            data
        )
        switches: dict[str, Any] = {name: bool(flags >> i & 1) for i, name in enumerate(_FLAGS)}
        try:
            settings = Settings(
                **switches,
                backend=(None, *BACKENDS)[backend],
                timeout_s=timeout,
                buffer_mb=buffer_mb,
            )
        except (IndexError, SettingError):  # no rank packs such a value
            raise VersionMismatchError(_OTHER_FORMAT) from None
        text = error.rstrip(b"\0").decode(errors="replace")
        return cls(pid, cores, bool(native), build_id, version, host, settings, text)


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


def agree(hellos: Sequence[Hello]) -> Agreement:
    """Pure: every rank comes to the same conclusion from the same records.

    Raises:
        SettingError, FusedCommError: a rank reported an error.
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
    settings, disagreements = _merge([h.settings for h in hellos])
    return Agreement(
        settings=settings,
        disagreements=disagreements,
        cores=min(h.cores for h in hellos),
        pids=tuple(h.pid for h in hellos),
        custom_unavailable=_custom_unavailable(hellos),
    )


def _custom_unavailable(hellos: Sequence[Hello]) -> str:
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
    return ""


def _merge(all_settings: Sequence[Settings]) -> tuple[Settings, tuple[str, ...]]:
    """The safer value of each setting where ranks differ, and a line about each of those."""
    merged = all_settings[0]
    lines = []
    for f in fields(Settings):
        values = [getattr(s, f.name) for s in all_settings]
        if f.name == "host_id" or len(set(values)) == 1:
            continue
        if f.name in _FLAGS:
            taken: Any = True  # a switch only ever turns a fast path off or a check on
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
