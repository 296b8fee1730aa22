"""The compiled library must load into every torch from 2.11 on and into every Python: stable symbols only."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

# C symbols of the stable ABI: the AOTInductor shims and torch's own (torch/csrc/stable, torch/csrc/inductor).
STABLE = re.compile(r"^(aoti_torch_|torch_)\w+$")
SYSTEM = re.compile(
    r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_"  # versioned symbols of libc, libstdc++, libgcc, libgomp
    r"|^(_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize)$"  # weak, of the C runtime
)


def native_libraries() -> list[Path]:
    spec = find_spec("fusedcomm")
    assert spec is not None
    return [path for folder in spec.submodule_search_locations or [] for path in Path(folder).glob("*.so")]


def undefined_symbols(library: Path) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm (binutils)")
    lines = subprocess.run(
        [nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line.split()[-1] for line in lines]


def test_only_stable_symbols_are_used() -> None:
    libraries = native_libraries()
    assert libraries, "the native library is not built"
    for library in libraries:
        symbols = undefined_symbols(library)
        assert any(STABLE.match(symbol) for symbol in symbols), f"{library.name} does not use torch at all"
        unstable = [symbol for symbol in symbols if not STABLE.match(symbol) and not SYSTEM.search(symbol)]
        assert unstable == []


def test_neither_python_nor_the_build_machine_is_linked() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf (binutils)")
    for library in native_libraries():
        dynamic = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        assert not [name for name in needed if name.startswith("libpython")]
        assert not [name for name in needed if name.startswith(("libtorch", "libc10")) and "libtorch_cpu" not in name]
        assert not re.findall(r"\((?:RPATH|RUNPATH)\)", dynamic)
