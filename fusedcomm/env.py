"""The ``FUSEDCOMM_*`` settings: the only place that reads the environment for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple

from fusedcomm.errors import SettingError

PREFIX = "FUSEDCOMM_"
BACKENDS = ("native", "aiter", "triton", "torch")
DEFAULT_BUFFER_MB = {"cpu": 2, "cuda": 160}
"""MiB of a rank's slab by type of device (HIP's is "cuda" too), where FUSEDCOMM_BUFFER_MB is not set."""


class SettingInfo(NamedTuple):
    """One setting as ``fusedcomm doctor`` shows it."""

    variable: str
    value: object
    default: object
    source: str  # "environment" or "default"
    help: str


class _Kind(NamedTuple):
    """How the text of a variable becomes a value, and which values are allowed."""

    allowed: str
    parse: Callable[[str], object]  # raises ValueError or KeyError
    is_valid: Callable[[Any], bool]


_SWITCH = _Kind("0 or 1", {"0": False, "1": True}.__getitem__, lambda value: isinstance(value, bool))
_BACKEND = _Kind(" or ".join(BACKENDS), str, lambda value: value is None or value in BACKENDS)
_SECONDS = _Kind(
    "a number of seconds between 0.001 and 86400",
    float,
    lambda value: isinstance(value, (int, float)) and 0.001 <= value <= 86400,
)
_MEBIBYTES = _Kind(
    "a whole number of MiB between 1 and 16384",
    int,
    lambda value: value is None or (isinstance(value, int) and 1 <= value <= 16384),
)
_TEXT = _Kind("text", str, lambda value: value is None or isinstance(value, str))


def _setting(default: Any, kind: _Kind, help: str) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True)
class Settings:
    """Every setting, typed and validated; a group keeps the one its ranks agreed on.

    Raises:
        SettingError: a value that is not allowed; names the variable and what is allowed.
    """

    disable: bool = _setting(False, _SWITCH, "1: everything through the process group and torch")
    disable_custom_ar: bool = _setting(False, _SWITCH, "1: no custom all-reduce")
    disable_fused_ar_norm: bool = _setting(False, _SWITCH, "1: all-reduce and RMSNorm in separate launches")
    disable_fused_ar_quant: bool = _setting(False, _SWITCH, "1: quantise in a launch of its own")
    disable_aiter: bool = _setting(False, _SWITCH, "1: never call AMD's aiter")
    disable_aiter_sampling: bool = _setting(False, _SWITCH, "1: never call AMD's aiter for sampling")
    backend: str | None = _setting(None, _BACKEND, "force native, aiter, triton or torch; an error if unsupported")
    deterministic: bool = _setting(False, _SWITCH, "1: only paths whose sums are in rank order")
    timeout_s: float = _setting(60.0, _SECONDS, "deadline of every wait, in seconds")
    debug: bool = _setting(
        False, _SWITCH, "1: ranks compare every call before making it; ops that choose tokens check values"
    )
    dual_stream: bool = _setting(False, _SWITCH, "1: forked chains (an indexer) run on a second stream of the GPU")
    buffer_mb: int | None = _setting(None, _MEBIBYTES, "MiB of memory that a rank shares; unset: 2 on CPU, 160 on GPU")
    host_id: str | None = _setting(None, _TEXT, "take this for the identity of the host (tests of several hosts)")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.metadata["kind"].is_valid(value):
                raise _not_allowed(f, value)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads and validates the settings; unset and empty variables give the default.

        Raises:
            SettingError: a value that is not allowed; names the variable and what is allowed.
        """
        environ = os.environ if environ is None else environ
        values = {}
        for f in fields(cls):
            text = environ.get(PREFIX + f.name.upper(), "").strip()
            if not text:
                continue
            kind = f.metadata["kind"]
            try:
                values[f.name] = kind.parse(text)
            except (KeyError, ValueError):
                raise _not_allowed(f, text) from None
            if not kind.is_valid(values[f.name]):
                raise _not_allowed(f, text)
        return cls(**values)

    def buffer_mb_on(self, device_type: str) -> int:
        """The size of a slab in MiB: the setting, else the default of the type of device."""
        return DEFAULT_BUFFER_MB[device_type] if self.buffer_mb is None else self.buffer_mb

    def describe(self, environ: Mapping[str, str] | None = None) -> list[SettingInfo]:
        """Every setting with its value, default, where the value came from, and what it means."""
        environ = os.environ if environ is None else environ
        rows = []
        for f in fields(self):
            variable = PREFIX + f.name.upper()
            source = "environment" if environ.get(variable, "").strip() else "default"
            rows.append(SettingInfo(variable, getattr(self, f.name), f.default, source, f.metadata["help"]))
        return rows


def _not_allowed(setting: Field[Any], got: object) -> SettingError:
    return SettingError(f"{PREFIX}{setting.name.upper()}: expected {setting.metadata['kind'].allowed}, got {got!r}")


def launcher_environ() -> Mapping[str, str]:
    """The environment, for the variables of torchrun, mpirun and srun (fusedcomm.groups.bootstrap)."""
    return os.environ
