"""Symmetric buffers with threads as ranks: both kinds, failures on one rank, and what is left behind."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedcomm.comm import symmetric_buffer
from fusedcomm.comm.symmetric_buffer import Export, SetupError, SymmetricBuffer, remove_stale

SIZE = 3 * 4096
Tamper = Callable[[int, int, bytes], bytes]  # (rank, number of the exchange, data) -> what is sent in its place


class Fabric:
    """An all-gather of bytes among threads; `tamper` sees, and may change, what each rank sends."""

    def __init__(self, world_size: int, tamper: Tamper | None = None) -> None:
        self.world_size = world_size
        self._slots = [b""] * world_size
        self._barrier = threading.Barrier(world_size, timeout=20)
        self._tamper = tamper

    def exchange(self, rank: int) -> Callable[[bytes], list[bytes]]:
        number = 0

        def exchange(data: bytes) -> list[bytes]:
            nonlocal number
            self._slots[rank] = self._tamper(rank, number, data) if self._tamper else data
            number += 1
            self._barrier.wait()
            received = list(self._slots)
            self._barrier.wait()
            assert {len(part) for part in received} == {len(data)}, "ranks exchanged different lengths"
            return received

        return exchange

    def run(self, body: Callable[[int, Callable[[bytes], list[bytes]]], Any]) -> list[Any]:
        """body(rank, exchange) on a thread a rank; results or exceptions in rank order."""

        def one(rank: int) -> Any:
            threading.current_thread().name = f"rank{rank}"
            try:
                return body(rank, self.exchange(rank))
            except SetupError as error:
                return error
            except BaseException as error:
                self._barrier.abort()  # as a process group fails for the others when one leaves
                return error

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(one, range(self.world_size)))


def this_rank() -> int:
    return int(threading.current_thread().name.removeprefix("rank"))


def stamp(address: int) -> None:
    """initialize: writes the rank into the first word."""
    ctypes.c_int64.from_address(address).value = 1000 + this_rank()


def create(world_size: int, kinds: tuple[str, ...], tamper: Tamper | None = None) -> list[Any]:
    return Fabric(world_size, tamper).run(
        lambda rank, exchange: SymmetricBuffer.create(exchange, rank, SIZE, stamp, kinds)
    )


def left_behind() -> tuple[set[str], list[str], list[str]]:
    """Descriptors, mappings and names that a buffer makes."""
    fds = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    marks = ("/memfd:fusedcomm", "/dev/shm/fusedcomm")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if any(mark in line for mark in marks)]
    return {fd for fd in fds if fd.startswith(marks)}, maps, names()


def names(pid: int | None = None) -> list[str]:
    """What this process (or another) has in /dev/shm; other tests may run at the same time."""
    return [path.name for path in Path("/dev/shm").glob(f"fusedcomm-*-{pid or os.getpid()}-*")]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = left_behind()
    yield
    assert left_behind() == before


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: OSError, on_ranks: set[int]) -> None:
    """os.<name> fails on some ranks."""
    real = getattr(os, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name.startswith("rank") and this_rank() in on_ranks:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(symmetric_buffer.os, name, fails)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["memfd", "shm"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_sees_the_memory_of_all(kind: str, world_size: int) -> None:
    buffers = create(world_size, (kind,))
    assert [b.kind for b in buffers] == [kind] * world_size
    try:
        for buffer in buffers:
            assert len(buffer.addresses) == world_size
            for owner, address in enumerate(buffer.addresses):
                # initialised by its owner before anybody mapped it
                assert ctypes.c_int64.from_address(address).value == 1000 + owner
                assert ctypes.c_int64.from_address(address + SIZE - 8).value == 0
        # a write in any mapping is seen in all: first by the owner, then by another rank
        for writer, buffer in enumerate(buffers):
            for owner, address in enumerate(buffer.addresses):
                ctypes.c_int64.from_address(address + SIZE - 8).value = 100 * writer + owner + 1
                for reader in buffers:
                    seen = ctypes.c_int64.from_address(reader.addresses[owner] + SIZE - 8).value
                    assert seen == 100 * writer + owner + 1
        assert names() == []  # nothing has a name once all have mapped
    finally:
        for buffer in buffers:
            buffer.close()


def test_memfd_is_the_first_choice() -> None:
    buffers = create(2, symmetric_buffer.KINDS)
    assert [b.kind for b in buffers] == ["memfd", "memfd"]
    for buffer in buffers:
        buffer.close()


def test_closing_twice_is_fine() -> None:
    for buffer in create(2, ("memfd",)):
        buffer.close()
        buffer.close()


def test_a_named_segment_is_for_its_owner_alone() -> None:
    modes = []

    def look(rank: int, number: int, data: bytes) -> bytes:
        name = Export.unpack(data).name if number == 1 else ""  # after the names, before the mapping
        if name:
            modes.append(stat.S_IMODE(os.stat(f"/dev/shm/{name}").st_mode))
        return data

    for buffer in create(3, ("shm",), look):
        buffer.close()
    assert modes == [0o600] * 3


@pytest.mark.parametrize("call", ["memfd_create", "posix_fallocate"])
@pytest.mark.parametrize("bad_rank", [0, 2])
def test_where_one_rank_has_no_memfd_all_take_shm(monkeypatch: pytest.MonkeyPatch, call: str, bad_rank: int) -> None:
    calls = {"left": 1}
    real = getattr(os, call)

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        if this_rank() == bad_rank and calls["left"]:
            calls["left"] = 0
            raise NO_SPACE
        return real(*args, **kwargs)

    monkeypatch.setattr(symmetric_buffer.os, call, fails_once)
    buffers = create(3, ("memfd", "shm"))
    assert [b.kind for b in buffers] == ["shm"] * 3
    for buffer in buffers:
        buffer.close()


def test_where_one_rank_may_not_open_its_peers_memfd_all_take_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/<pid>/fd is refused to a process that may not trace its peer (a sandbox, another user)."""
    real = os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith("/proc/") and threading.current_thread().name == "rank1":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(symmetric_buffer.os, "open", refused)
    buffers = create(3, ("memfd", "shm"))
    assert [b.kind for b in buffers] == ["shm"] * 3
    for buffer in buffers:
        buffer.close()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_failure_of_every_kind_on_one_rank_is_the_same_error_on_all(
    monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    bad = world_size - 1
    failing(monkeypatch, "posix_fallocate", NO_SPACE, {bad})
    results = create(world_size, ("memfd", "shm"))
    assert all(type(error) is SetupError for error in results)
    assert len({str(error) for error in results}) == 1
    text = str(results[0])
    assert text.count(f"rank {bad}") == 2
    assert "memfd:" in text
    assert "shm:" in text
    assert "No space left on device" in text
    assert str(SIZE) in text


def test_the_first_of_several_failing_ranks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "posix_fallocate", NO_SPACE, {1, 2})
    assert {str(error).split(":")[1].strip() for error in create(4, ("shm",))} == {"rank 1"}


def test_no_dev_shm_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(symmetric_buffer, "SHM_DIR", tmp_path / "not there")
    results = create(2, ("shm",))
    assert all(type(error) is SetupError for error in results)
    assert "No such file" in str(results[0])


def test_too_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "memfd_create", OSError(errno.EMFILE, os.strerror(errno.EMFILE)), {0})
    results = create(2, ("memfd",))
    assert all("rank 0" in str(error) and "Too many open files" in str(error) for error in results)


@pytest.mark.parametrize("kind", ["memfd", "shm"])
def test_a_segment_that_cannot_be_mapped_by_one_rank(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real = symmetric_buffer._attach

    def attach(export: Export) -> Any:
        if this_rank() == 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(export)

    monkeypatch.setattr(symmetric_buffer, "_attach", attach)
    results = create(3, (kind,))
    assert all(type(error) is SetupError for error in results)
    assert {str(error) for error in results} == {str(results[0])}
    assert "rank 1: cannot map the segment of rank 0" in str(results[0])


@pytest.mark.parametrize("field", ["device", "inode", "size"])
def test_another_file_under_the_same_path_is_not_mapped(field: str) -> None:
    """In another PID namespace /proc/<pid>/fd/<fd> may exist and be something else."""

    def tamper(rank: int, number: int, data: bytes) -> bytes:
        if rank == 0 and number == 0:
            export = Export.unpack(data)
            return export._replace(**{field: getattr(export, field) + 1}).pack()
        return data

    results = create(2, ("memfd",), tamper)
    assert all(type(error) is SetupError for error in results)
    assert "is not the file that the rank exported" in str(results[0])
    assert "rank 1" in str(results[0])


@pytest.mark.parametrize(("kind", "number"), [("memfd", 0), ("memfd", 1), ("shm", 0), ("shm", 1), ("shm", 2)])
def test_a_rank_that_is_lost_in_the_middle_leaves_nothing(kind: str, number: int) -> None:
    """The fixture looks for descriptors, mappings and names."""

    def lost(rank: int, this_number: int, data: bytes) -> bytes:
        if rank == 1 and this_number == number:
            raise RuntimeError("lost")
        return data

    results = create(3, (kind,), lost)
    assert str(results[1]) == "lost"
    assert all(isinstance(error, threading.BrokenBarrierError) for error in (results[0], results[2]))


@pytest.mark.parametrize("kind", ["memfd", "shm"])
def test_an_exception_while_initialising_leaves_nothing(kind: str) -> None:
    def initialize(address: int) -> None:
        if this_rank() == 0:
            raise MemoryError("cannot initialise")

    results = Fabric(2).run(lambda rank, exchange: SymmetricBuffer.create(exchange, rank, SIZE, initialize, (kind,)))
    assert not any(isinstance(result, SymmetricBuffer) for result in results)


# ---- space that is really missing ----

LIMITED = """
import resource, sys
from fusedcomm.comm.symmetric_buffer import SetupError, SymmetricBuffer
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for kind in ("memfd", "shm"):
    try:
        SymmetricBuffer.create(lambda data: [data], 0, 2 << 20, lambda address: None, (kind,))
    except SetupError as error:
        print(error)
    else:
        sys.exit(f"{kind}: expected an error")
    SymmetricBuffer.create(lambda data: [data], 0, 1 << 20, lambda address: None, (kind,)).close()
"""


def test_a_limit_on_file_size_is_an_error_and_no_signal() -> None:
    result = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["memfd", "shm"]
    assert all("rank 0: cannot allocate 2097152 bytes" in line for line in lines)


def test_a_full_tmpfs_is_an_error_and_no_bus_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        monkeypatch.setattr(symmetric_buffer, "SHM_DIR", tmp_path)
        results = Fabric(2).run(lambda rank, exchange: SymmetricBuffer.create(exchange, rank, 1 << 20, stamp, ("shm",)))
        assert all(isinstance(error, SetupError) and "No space left" in str(error) for error in results)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_pages_are_reserved_when_the_buffer_is_made() -> None:
    """Without that a machine out of memory shows itself as SIGBUS at the first write."""
    (buffer,) = create(1, ("memfd",))
    try:
        blocks = os.fstat(buffer._segments[0].fd).st_blocks
        assert blocks * 512 >= SIZE
    finally:
        buffer.close()


# ---- names of processes that were killed ----


def shm_name(pid: int, start: str, namespace: str) -> Path:
    return Path(f"/dev/shm/fusedcomm-{namespace}-{pid}-{start}-{'0' * 16}")


def facts_of(pid: int) -> tuple[str, str]:
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return start, str(os.stat("/proc/self/ns/pid").st_ino)


def test_only_names_of_dead_processes_are_removed() -> None:
    start, namespace = facts_of(os.getpid())
    child = subprocess.Popen(["true"])
    child.wait()
    dead = shm_name(child.pid, "1", namespace)
    reused = shm_name(os.getpid(), str(int(start) + 1), namespace)  # the pid lives on in another process
    alive = shm_name(os.getpid(), start, namespace)
    elsewhere = shm_name(child.pid, "1", str(int(namespace) + 1))  # a container whose processes are not seen here
    foreign = Path("/dev/shm/fusedcomm-not-ours")
    files = [dead, reused, alive, elsewhere, foreign]
    try:
        for path in files:
            path.touch()
        assert set(remove_stale()) == {dead.name, reused.name}
        assert [path.exists() for path in files] == [False, False, True, True, True]
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def test_the_next_group_removes_what_a_killed_process_left() -> None:
    program = (
        "import os, signal\n"
        "from fusedcomm.comm.symmetric_buffer import SymmetricBuffer\n"
        "kill = lambda data: os.kill(os.getpid(), signal.SIGKILL)\n"
        "SymmetricBuffer.create(kill, 0, 4096, lambda address: None, ('shm',))\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program])
    assert killed.wait() == -9
    for buffer in create(2, ("shm",)):
        buffer.close()
    assert names(killed.pid) == []


# ---- the record ----

text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))


@given(
    pid=st.integers(1, 2**31 - 1),
    fd=st.integers(-1, 2**20),
    numbers=st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    name=st.from_regex(r"\Afusedcomm-[0-9]{1,20}-[0-9]{1,10}-[0-9]{1,20}-[0-9a-f]{16}\Z") | st.just(""),
    error=text.filter(lambda error: len(error.encode()) <= 200),
)
def test_an_export_comes_back_as_it_was(
    pid: int, fd: int, numbers: tuple[int, int, int], name: str, error: str
) -> None:
    export = Export(pid, fd, *numbers, name, error)
    assert Export.unpack(export.pack()) == export


@given(text)
def test_every_export_has_the_same_size(error: str) -> None:
    plain = Export(1, 3, 5, 7, 4096, "", "")
    data = plain._replace(error=error * 20).pack()
    assert len(data) == len(plain.pack())
    assert (error * 20).startswith(Export.unpack(data).error[:10])


def test_limits_are_as_the_tests_found_them() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
