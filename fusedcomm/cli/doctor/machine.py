"""Versions, the machine, the native library, shared memory, MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fusedcomm import native
from fusedcomm.cli.bench.machine import describe_machine
from fusedcomm.cli.doctor.check import Finding, Level
from fusedcomm.cli.launch import find_mpiexec, has_mpi4py
from fusedcomm.comm.tuning import slot_bytes
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops.dispatch import find_local_backend

MIN_TORCH = (2, 11)
EXTRAS = {
    "models": ("safetensors", "tokenizers"),
    "mpi": ("mpi4py", "mpich"),
    "bench": ("matplotlib", "numpy"),
}
SHM = Path("/dev/shm")


def check_versions() -> list[Finding]:
    """Python, torch, this package and its extras."""
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    is_old = found < MIN_TORCH
    torch_text = torch.__version__ + (f", and at least {MIN_TORCH[0]}.{MIN_TORCH[1]} is needed" if is_old else "")
    findings = [
        Finding("versions", "fusedcomm", Level.OK, f"{_version('fusedcomm')}, in {Path(native.__file__).parent}"),
        Finding("versions", "python", Level.OK, f"{sys.version.split()[0]}, {sys.executable}"),
        Finding("versions", "torch", Level.FAIL if is_old else Level.OK, torch_text),
    ]
    for extra, packages in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        text = ", ".join(f"{package} {found or 'missing'}" for package, found in versions.items())
        if not all(versions.values()):
            text += f" (pip install 'fusedcomm[{extra}]')"
        findings.append(Finding("versions", f"[{extra}]", Level.OK if all(versions.values()) else Level.INFO, text))
    return findings


def check_machine() -> list[Finding]:
    """The processor."""
    facts = describe_machine()
    text = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['kernel']}"
    return [Finding("device", "cpu", Level.OK, text)]


def check_native() -> list[Finding]:
    """The compiled library."""
    path = native.library_path()
    if path is None:
        text = "not built: the process group and plain torch serve, slowly; install again with a C++17 compiler"
        return [Finding("native library", "library", Level.FAIL, text)]
    try:
        library = native.load()
    except OSError as error:
        return [Finding("native library", "library", Level.FAIL, f"{path} cannot be loaded: {error}")]
    if library is None:  # it went away just now
        return [Finding("native library", "library", Level.FAIL, f"{path} is gone")]
    text = f"{path}, build {library.build_id().decode()}, {library.isa().decode()} kernels"
    return [Finding("native library", "library", Level.OK, text)]


def check_backend(settings: Settings) -> list[Finding]:
    """Whether the backend that a setting asks for can serve here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    findings = []
    for device in devices:
        try:
            find_local_backend(settings, device)
        except SettingError as error:
            text = str(error).removeprefix("FUSEDCOMM_BACKEND: ")
            # what one device cannot do may be meant for the other
            level = Level.WARN if len(devices) > 1 else Level.FAIL
            findings.append(Finding("settings", "FUSEDCOMM_BACKEND", level, text))
        except OSError:
            pass  # a library that cannot be loaded has a finding of its own
    return findings


def check_shared_memory(settings: Settings) -> list[Finding]:
    """Whether ranks can share memory, and how; the buffer of one group of eight must fit."""
    slab = _slab_bytes(settings)
    memfd_problem = _try_memfd(slab)
    shm_problem = _try_dev_shm(slab)
    findings = [
        Finding("shared memory", "slab", Level.INFO, f"{slab / 2**20:.1f} MiB a rank (FUSEDCOMM_BUFFER_MB)"),
        Finding(
            "shared memory",
            "memfd through /proc/<pid>/fd",
            Level.WARN if memfd_problem else Level.OK,
            memfd_problem or "usable (first choice)",
        ),
        Finding(
            "shared memory",
            str(SHM),
            Level.WARN if shm_problem else Level.OK,
            shm_problem or f"usable, {shutil.disk_usage(SHM).free / 2**20:,.0f} MiB free (second choice)",
        ),
    ]
    if memfd_problem and shm_problem:
        text = "ranks cannot share memory: every collective takes the process group"
        findings.append(Finding("shared memory", "summary", Level.FAIL, text))
    return findings


def check_mpi() -> list[Finding]:
    """mpi4py and mpiexec: both or neither."""
    path, module = find_mpiexec(), has_mpi4py()
    if not module:
        text = "not installed: mpirun cannot start ranks (pip install 'fusedcomm[mpi]')"
        return [Finding("MPI", "mpi4py", Level.INFO, text)]
    findings = [Finding("MPI", "mpi4py", Level.OK, _version("mpi4py") or "of unknown version")]
    if path is None:
        findings.append(Finding("MPI", "mpiexec", Level.WARN, "not beside this Python and not on PATH"))
    else:
        findings.append(Finding("MPI", "mpiexec", Level.OK, path))
    return findings


def _version(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _slab_bytes(settings: Settings) -> int:
    slot = slot_bytes(settings.buffer_mb_on("cpu"))
    library = native.load() if native.library_path() is not None else None
    return 2 * slot if library is None else int(library.segment_bytes(slot))


def _try_memfd(size: int) -> str:
    """What is wrong with a memfd of ``size`` bytes that another process opens; empty if nothing."""
    try:
        fd = os.memfd_create("fusedcomm-doctor", os.MFD_CLOEXEC)
    except OSError as error:
        return f"memfd_create: {error}"
    try:
        os.posix_fallocate(fd, 0, size)
        # a sibling of this process, as ranks are to each other
        script = f"import os; os.close(os.open('/proc/{os.getpid()}/fd/{fd}', os.O_RDWR))"
        done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    finally:
        os.close(fd)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _try_dev_shm(size: int) -> str:
    """What is wrong with a file of ``size`` bytes in /dev/shm; empty if nothing."""
    try:
        fd = os.open(SHM, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)  # it has no name to leave behind
    except OSError as error:
        return str(error)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        return f"{size} bytes: {error}"
    finally:
        os.close(fd)
    return ""
