"""Which package called ``aiter`` is installed: AMD's (distribution amd-aiter), or the unrelated one of PyPI."""

from __future__ import annotations

from fusedcomm.aiter_package import DISTRIBUTION, find_aiter, why_unusable
from fusedcomm.cli.doctor.check import Finding, Level


def check_aiter() -> list[Finding]:
    """Looks without importing it."""
    package = find_aiter()
    if package is None:
        return [Finding("aiter", "aiter", Level.INFO, "not installed (used on AMD GPUs only)")]
    if not package.is_amd:
        text = f"{package.folder} is not AMD's aiter but another package of that name; it is never used"
        return [Finding("aiter", "aiter", Level.WARN, text)]
    found = package.version or f"of unknown version (no metadata of {DISTRIBUTION})"
    why = why_unusable(package)
    text = f"AMD's, {found}, in {package.folder}; " + (f"not used: {why}" if why else "used on AMD GPUs only")
    return [Finding("aiter", "aiter", Level.INFO, text)]
