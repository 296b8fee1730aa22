"""Which package called ``aiter`` is installed: AMD's (distribution amd-aiter), or the unrelated one of PyPI."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fusedcomm.cli.doctor.check import Finding, Level

_FILES_OF_AMD = ("jit/core.py", "dist/parallel_state.py")


def check_aiter() -> list[Finding]:
    """Looks without importing it: AMD's edits sys.path and logging when imported, and raises off its own GPUs."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        return [Finding("aiter", "aiter", Level.INFO, "not installed (used on AMD GPUs only)")]
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    where = str(folders[0] if folders else spec.origin)
    if not any(all((folder / name).is_file() for name in _FILES_OF_AMD) for folder in folders):
        text = f"{where} is not AMD's aiter but another package of that name; it is never used"
        return [Finding("aiter", "aiter", Level.WARN, text)]
    try:
        found = version("amd-aiter")
    except PackageNotFoundError:
        found = "of unknown version (no metadata of amd-aiter)"
    return [Finding("aiter", "aiter", Level.INFO, f"AMD's, {found}, in {where}; not used on CPU")]
