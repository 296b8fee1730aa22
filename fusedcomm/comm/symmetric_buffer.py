"""Shared memory that every rank of a group allocates, exports and maps.

First choice is an anonymous ``memfd`` that peers open through ``/proc/<pid>/fd``: it has no name, so nothing can be
left behind, and the size of /dev/shm does not matter. Where a rank may not do that, all take a file in /dev/shm, whose
name goes as soon as all have mapped it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SHM_DIR = Path("/dev/shm")
KINDS = ("memfd", "shm")

# Gives every rank the bytes of all, in rank order. All ranks pass the same length.
Exchange = Callable[[bytes], "list[bytes]"]


class SetupError(RuntimeError):
    """A step of set-up failed on some rank; every rank of the group raises it with the same text."""


# pid, fd, device, inode, size, name, error
_EXPORT = struct.Struct("<qqQQQ96s280s")
_NAME_BYTES = 96
_ERROR_BYTES = 280


class Export(NamedTuple):
    """What a peer needs to map a segment, or why there is none. Its wire form has a fixed size."""

    pid: int
    fd: int
    device: int
    inode: int
    size: int
    name: str
    error: str

    def pack(self) -> bytes:
        return _EXPORT.pack(
            self.pid, self.fd, self.device, self.inode, self.size, self.name.encode(), _clip(self.error, _ERROR_BYTES)
        )

    @classmethod
    def unpack(cls, data: bytes) -> Export:
        pid, fd, device, inode, size, name, error = _EXPORT.unpack(data)
        return cls(pid, fd, device, inode, size, _unclip(name), _unclip(error))


class Segment:
    """One mapped piece of shared memory; ``address`` is where it is mapped."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)

    def close(self) -> None:
        """Unmaps; the address must not be used any more. Closing twice is fine."""
        if self.fd < 0:
            return
        del self._anchor
        self._map.close()
        os.close(self.fd)
        self.fd = -1


class SymmetricBuffer:
    """The segments of all ranks, mapped here: ``addresses[r]`` is that of rank r. Owns them; ``close()`` unmaps."""

    def __init__(self, segments: Sequence[Segment], kind: str) -> None:
        self._segments = list(segments)
        self.kind = kind
        self.addresses = [s.address for s in segments]

    @classmethod
    def create(
        cls,
        exchange: Exchange,
        rank: int,
        size: int,
        initialize: Callable[[int], None],
        kinds: Sequence[str] = KINDS,
    ) -> SymmetricBuffer:
        """Allocates ``size`` bytes on every rank and maps them all on all; every rank calls it together.

        Args:
            exchange: all-gather of bytes over the group.
            rank: this rank.
            size: bytes of a segment, the same on all ranks.
            initialize: called with the address of the own segment before its peers map it.
            kinds: what to try, in this order.

        Raises:
            SetupError: no kind works on all ranks; names the first rank that failed and why.
        """
        failures = []
        for kind in kinds:
            try:
                return cls(_create_segments(exchange, rank, size, initialize, kind), kind)
            except SetupError as error:
                failures.append(f"{kind}: {error}")
        raise SetupError("; ".join(failures))

    def close(self) -> None:
        """Unmaps all segments; closing twice is fine."""
        for segment in self._segments:
            segment.close()


def _create_segments(
    exchange: Exchange, rank: int, size: int, initialize: Callable[[int], None], kind: str
) -> list[Segment]:
    with contextlib.ExitStack() as undo:
        name = ""
        if kind == "shm":
            remove_stale()
            name = f"fusedcomm-{_process_id(os.getpid())}-{secrets.token_hex(8)}"
            # All know all names before there is a file: whoever is killed from here on, the survivors remove them.
            for data in exchange(name.encode().ljust(_NAME_BYTES, b"\0")):
                undo.callback(_unlink, _unclip(data))
        own, export = _allocate(size, name, initialize)
        if own is not None:
            undo.callback(own.close)
        exports = [Export.unpack(data) for data in exchange(export.pack())]
        _raise_first_error([e.error for e in exports])

        segments: list[Segment] = []
        error = ""
        try:
            for r, e in enumerate(exports):
                if r == rank and own is not None:
                    segments.append(own)
                    continue
                segments.append(_attach(e))
                undo.callback(segments[-1].close)
        except OSError as failure:
            error = f"cannot map the segment of rank {len(segments)}: {failure}"
        _raise_first_error([_unclip(data) for data in exchange(_clip(error, _ERROR_BYTES).ljust(_ERROR_BYTES, b"\0"))])

        for e in exports:
            if e.name:
                _unlink(e.name)
        undo.pop_all()
        return segments


def _allocate(size: int, name: str, initialize: Callable[[int], None]) -> tuple[Segment | None, Export]:
    """A segment in /dev/shm under this name, or in a memfd if it is empty."""
    fd = -1
    try:
        if name:
            # what shm_open does on Linux
            fd = os.open(SHM_DIR / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        else:
            fd = os.memfd_create("fusedcomm", os.MFD_CLOEXEC)
        # Reserves the pages now: running out of memory is an error here, and not a SIGBUS at the first write.
        os.posix_fallocate(fd, 0, size)
        segment = Segment(fd, size)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        return None, Export(os.getpid(), -1, 0, 0, 0, "", f"cannot allocate {size} bytes of shared memory: {error}")
    try:
        initialize(segment.address)
    except BaseException:
        segment.close()
        raise
    stat = os.fstat(fd)
    return segment, Export(os.getpid(), fd, stat.st_dev, stat.st_ino, size, name, "")


def _attach(export: Export) -> Segment:
    path = SHM_DIR / export.name if export.name else Path(f"/proc/{export.pid}/fd/{export.fd}")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        stat = os.fstat(fd)
        if (stat.st_dev, stat.st_ino, stat.st_size) != (export.device, export.inode, export.size):
            raise OSError(f"{path} is not the file that the rank exported (another PID namespace?)")
        return Segment(fd, export.size)
    except BaseException:
        os.close(fd)
        raise


def remove_stale() -> list[str]:
    """Removes files in /dev/shm whose process was killed in the middle of set-up; returns their names."""
    removed = []
    own_namespace = _process_id(os.getpid()).split("-")[0]
    for path in SHM_DIR.glob("fusedcomm-*"):
        parts = path.name.split("-")
        if len(parts) != 5 or parts[1] != own_namespace or not parts[2].isdecimal():
            continue
        owner = "-".join(parts[1:4])
        if _process_id(int(parts[2])) != owner:
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    return removed


def _process_id(pid: int) -> str:
    """Names a process for good: PID namespace, pid and start time. Empty if there is no such process."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
        # the fields after the command, which is in brackets and may hold anything; the start time is field 22
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{namespace}-{pid}-{fields[19]}"


def _unlink(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(SHM_DIR / name)


def _raise_first_error(errors: Sequence[str]) -> None:
    for rank, error in enumerate(errors):
        if error:
            raise SetupError(f"rank {rank}: {error}")


def _clip(text: str, size: int) -> bytes:
    return text.encode()[:size]


def _unclip(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
