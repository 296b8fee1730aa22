"""What a check of the doctor comes to."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Level(str, Enum):
    """How a finding is meant; one FAIL makes the doctor's exit code 1."""

    OK = "ok"
    INFO = "info"
    """Worth knowing; nothing depends on it."""
    WARN = "warn"
    """Works, and probably not as its owner thinks."""
    FAIL = "fail"


class Finding(NamedTuple):
    """One line of the doctor's report."""

    area: str
    name: str
    level: Level
    text: str
