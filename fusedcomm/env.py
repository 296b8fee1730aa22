"""The ``FUSEDCOMM_*`` settings: the only place that reads the environment for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from fusedcomm.errors import SettingError

PREFIX = "FUSEDCOMM_"
BACKENDS = ("native", "aiter", "triton", "torch")


class SettingInfo(NamedTuple):
    """One setting as ``fusedcomm doctor`` shows it."""

    variable: str
    value: object
    default: object
    source: str  # "environment" or "default"
    help: str


def _parse_bool(text: str) -> bool:
    if text in ("0", "1"):
        return text == "1"
    raise ValueError("0 or 1")


def _parse_backend(text: str) -> str | None:
    if text in BACKENDS:
        return text
    raise ValueError(" or ".join(BACKENDS))


def _parse_timeout(text: str) -> float:
    expected = "a number of seconds between 0.001 and 86400"
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(expected) from None
    if not 0.001 <= seconds <= 86400:
        raise ValueError(expected)
    return seconds


def _parse_buffer_mb(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 16384:
        return int(text)
    raise ValueError("a whole number of MiB between 1 and 16384")


def _setting(default: Any, parse: Callable[[str], Any], help: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help})


@dataclass(frozen=True)
class Settings:
    """Every setting, typed and validated; a group keeps the one its ranks agreed on."""

    disable: bool = _setting(False, _parse_bool, "1: everything through the process group and torch")
    disable_custom_ar: bool = _setting(False, _parse_bool, "1: no custom all-reduce")
    disable_fused_ar_norm: bool = _setting(False, _parse_bool, "1: all-reduce and RMSNorm in separate launches")
    disable_fused_ar_quant: bool = _setting(False, _parse_bool, "1: quantise in a launch of its own")
    disable_aiter: bool = _setting(False, _parse_bool, "1: never call AMD's aiter")
    disable_aiter_sampling: bool = _setting(False, _parse_bool, "1: never call AMD's aiter for sampling")
    backend: str | None = _setting(
        None, _parse_backend, "force native, aiter, triton or torch; an error if unsupported"
    )
    deterministic: bool = _setting(False, _parse_bool, "1: only paths whose sums are in rank order")
    timeout_s: float = _setting(60.0, _parse_timeout, "deadline of every wait, in seconds")
    debug: bool = _setting(False, _parse_bool, "1: ranks compare every call before making it")
    buffer_mb: int = _setting(16, _parse_buffer_mb, "size of the slab of a rank, in MiB")
    host_id: str | None = _setting(None, str, "take this for the identity of the host (tests of several hosts)")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads and validates the settings; unset and empty variables give the default.

        Raises:
            SettingError: a value that is not allowed; names the variable and what is allowed.
        """
        environ = os.environ if environ is None else environ
        values = {}
        for f in fields(cls):
            variable = PREFIX + f.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                values[f.name] = f.metadata["parse"](text)
            except ValueError as allowed:
                raise SettingError(f"{variable}: expected {allowed}, got {text!r}") from None
        return cls(**values)

    def describe(self, environ: Mapping[str, str] | None = None) -> list[SettingInfo]:
        """Every setting with its value, default, where the value came from, and what it means."""
        environ = os.environ if environ is None else environ
        rows = []
        for f in fields(self):
            variable = PREFIX + f.name.upper()
            source = "environment" if environ.get(variable, "").strip() else "default"
            rows.append(SettingInfo(variable, getattr(self, f.name), f.default, source, f.metadata["help"]))
        return rows


def launcher_environ() -> Mapping[str, str]:
    """The environment, for the variables of torchrun, mpirun and srun (fusedcomm.groups.bootstrap)."""
    return os.environ
