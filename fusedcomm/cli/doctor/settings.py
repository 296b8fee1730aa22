"""The FUSEDCOMM_* variables: values, sources, and those that are malformed or not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedcomm.cli.doctor.check import Finding, Level
from fusedcomm.env import PREFIX, SettingInfo, Settings
from fusedcomm.errors import SettingError

LAUNCHER_VARIABLES = ("FUSEDCOMM_PYTHON", "FUSEDCOMM_TORCH")
"""Read by launch/setup of a checkout, and not by the library."""


def check_settings(environ: Mapping[str, str]) -> tuple[list[SettingInfo], list[Finding]]:
    """All settings as the library takes them (a malformed one at its default), and what is wrong with the variables."""
    known = {info.variable for info in Settings().describe({})}
    findings, values, usable = [], {}, {}
    for variable in sorted(v for v in environ if v.startswith(PREFIX) and v not in LAUNCHER_VARIABLES):
        if variable not in known:
            text = f"no such setting; {_nearest(variable, known)}"
            findings.append(Finding("settings", variable, Level.WARN, text))
            continue
        try:
            one = Settings.from_environ({variable: environ[variable]})
        except SettingError as error:
            findings.append(Finding("settings", variable, Level.FAIL, str(error).removeprefix(f"{variable}: ")))
            continue
        usable[variable] = environ[variable]
        values[variable.removeprefix(PREFIX).lower()] = one
    merged: dict[str, Any] = {name: getattr(one, name) for name, one in values.items()}
    return Settings(**merged).describe(usable), findings


def _nearest(variable: str, known: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(variable, known, n=1)
    return f"did you mean {near[0]}?" if near else "it has no effect"
