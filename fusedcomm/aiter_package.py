"""Whether AMD's aiter is here, told without importing it, and whether its functions are still those we know."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

# The distribution called aiter on PyPI is another package (async iterators).
DISTRIBUTION = "amd-aiter"
MIN_VERSION = "0.1.19.post1"  # before it, the single-kernel collectives lack their last barrier
ARCHS = ("gfx94", "gfx95")
"""How the architectures begin that it serves."""
_FILES_OF_AMD = ("jit/core.py", "dist/parallel_state.py")


class AiterPackage(NamedTuple):
    """A package called aiter."""

    folder: str
    is_amd: bool
    version: str | None
    """Of amd-aiter's metadata; None where it has none, or the package is another."""


class Call(NamedTuple):
    """How a function of aiter is called here: by position, with parameters of these names."""

    module: str
    function: str
    parameters: tuple[str, ...]


def find_aiter() -> AiterPackage | None:
    """The package that ``import aiter`` would give. Does not import it: AMD's edits sys.path and logging when imported,
    and raises RuntimeError off its own GPUs."""
    try:
        spec = importlib.util.find_spec("aiter")
    except ValueError:  # a module without a spec stands in sys.modules
        return None
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    where = str(folders[0] if folders else spec.origin)
    if not any(all((folder / name).is_file() for name in _FILES_OF_AMD) for folder in folders):
        return AiterPackage(where, False, None)
    try:
        return AiterPackage(where, True, version(DISTRIBUTION))
    except PackageNotFoundError:
        return AiterPackage(where, True, None)


def why_unusable(package: AiterPackage | None) -> str:
    """Why a package, as found, is not one to import; empty if it is."""
    if package is None:
        return "AMD's aiter is not installed"
    if not package.is_amd:
        return f"the package aiter in {package.folder} is not AMD's"
    if package.version is None:
        return f"aiter has no version (no metadata of {DISTRIBUTION})"
    found = _version_key(package.version)
    if found is None or found < (_version_key(MIN_VERSION) or ()):
        return f"aiter is {package.version}, {MIN_VERSION} or later is needed"
    return ""


def resolve(call: Call) -> Callable[..., Any]:
    """The function of a call, if it still takes it.

    Raises:
        LookupError: there is no such function.
        TypeError: its parameters have changed.
    """
    module = importlib.import_module(call.module)
    function: Callable[..., Any] | None = getattr(module, call.function, None)
    if function is None:
        raise LookupError(f"{call.module} has no {call.function}")
    if why := _signature_changed(function, call.parameters):
        raise TypeError(f"{call.module}.{call.function} has changed: {why}")
    return function


def _signature_changed(function: Callable[..., Any], expected: tuple[str, ...]) -> str:
    """Binding alone would not notice two parameters that changed places, so names are compared too."""
    parameters = list(inspect.signature(function).parameters.values())
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if tuple(by_position[: len(expected)]) != expected:
        return f"expected parameters ({', '.join(expected)}, …), got ({', '.join(by_position)})"
    new = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in expected
    ]
    return f"it wants {', '.join(new)} as well" if new else ""


def _version_key(text: str) -> tuple[int, ...] | None:
    """(major, minor, micro, post); None if it is no such version. A development version counts as its release."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:\.post(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else None
