"""Compiles the kernels of csrc/gpu/sampling for an emulated GPU (csrc/tests/emulator): as host code, on any machine."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "csrc/tests/emulator"
KERNELS = ROOT / "csrc/gpu/sampling"
BUILD = ROOT / "build/emulated"
LIBRARY = "emulated.so"

OPTIONS = (
    *("-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    "-fvisibility=hidden",  # variables of templates are of one library then, not of all in the process
    "-U_FORTIFY_SOURCE",  # whose checks of jumps know nothing of a fiber's stack
)


class Gpu(NamedTuple):
    """What a kernel is compiled for."""

    warp_size: int
    has_clusters: bool


GPUS = {"sm_90": Gpu(32, True), "sm_80": Gpu(32, False), "gfx942": Gpu(64, False)}


class Fault(NamedTuple):
    """A change of a file of csrc/gpu/sampling that the emulator has to notice."""

    file: str
    line: str
    instead: str


def reason_to_skip() -> str | None:
    """Why the emulator cannot be built here."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the emulator needs Linux on x86-64 or aarch64, not {sys.platform} on {platform.machine()}"
    return None if compiler() else "the emulator needs g++ or clang++"


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@cache
def built(name: str, fault: Fault | None = None) -> Path:
    """The library of a GPU of ``GPUS``, below build/, compiled where a source has changed; other processes wait for it.

    Raises:
        ValueError: the line that ``fault`` changes is not in its file exactly once.
        RuntimeError: the compiler failed; with what it said.
    """
    machine = _made("machine", _make_machine)
    folder = name if fault is None else f"{name}-{_digest(str(fault))}"
    return _made(folder, lambda folder: _make_library(folder, machine, GPUS[name], fault)) / LIBRARY


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """A folder into which ``make`` has written since the sources changed."""
    folder = BUILD / name
    stamp = folder / "stamp"
    sources = [Path(__file__), *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    state = _digest(str(compiler()), *(path.read_text() for path in sources))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != state:
            make(folder)
            stamp.write_text(state)
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _make_machine(folder: Path) -> None:
    """What is the same for all GPUs."""
    _compile(folder, {source: ["-O2"] for source in EMULATOR.glob("*.cpp")}, [ROOT / "csrc"])


def _make_library(folder: Path, machine: Path, gpu: Gpu, fault: Fault | None) -> None:
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        kernels = KERNELS if fault is None else _with_fault(scratch, fault)
        gpu_is = [f"-DEMULATED_WARP_SIZE={gpu.warp_size}", f"-DEMULATED_CLUSTERS={int(gpu.has_clusters)}"]
        # the host's part is as it is; the runtime of the sanitizer is the machine's, and not linked
        options = {path: ["-O1", "-fsanitize=thread", *gpu_is] for path in kernels.glob("*.cu")}
        options |= {path: ["-O2", *gpu_is] for path in (kernels / "launch.cu", EMULATOR / "gpu/layout.cpp")}
        _compile(scratch, options, [scratch, ROOT / "csrc"])
        objects = [str(path) for where in (scratch, machine) for path in sorted(where.glob("*.o"))]
        _run([str(compiler()), "-shared", "-Wl,--no-undefined", "-o", str(folder / LIBRARY), *objects])


def _compile(folder: Path, options: dict[Path, list[str]], includes: list[Path]) -> None:
    """Sources with options of their own into ``folder``, two at a time."""
    # the emulator's headers come before those that they stand for
    command = [str(compiler()), *OPTIONS, *(f"-I{path}" for path in (EMULATOR, *includes, ROOT / "csrc/include"))]

    def run(source: Path) -> None:
        _run([*command, *options[source], "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.stem}.o")])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, sorted(options, key=lambda path: path.stat().st_size, reverse=True)))


def _with_fault(folder: Path, fault: Fault) -> Path:
    """A copy of the kernels, below ``folder`` as they are below csrc."""
    kernels = folder / KERNELS.relative_to(ROOT / "csrc")
    shutil.copytree(KERNELS, kernels)
    file = kernels / fault.file
    found = file.read_text().count(fault.line)
    if found != 1:
        raise ValueError(f"fault: expected {fault.line!r} once in {fault.file}, got it {found} times")
    file.write_text(file.read_text().replace(fault.line, fault.instead))
    return kernels


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
