"""What a figure was measured on, and with which versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fusedcomm import native

PACKAGES = ("fusedcomm", "torch", "mpi4py", "mpich", "numpy", "triton", "flashinfer-python", "apache-tvm-ffi")


def describe_machine() -> dict[str, object]:
    """CPU model, cores of this process, memory, kernel, and how busy it is at the moment."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python, of the packages that matter and are there, and the native library's build and ISA."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    library = native.load()
    if library is not None:
        found["native_build"] = library.build_id().decode()
        found["native_isa"] = library.isa().decode()
    return found


def describe_date() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_command() -> str:
    """The command line, as a user would repeat it."""
    program = Path(sys.argv[0]).name
    return shlex.join(["fusedcomm" if program == "main.py" else program, *sys.argv[1:]])


def cpu_model() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.machine()
