"""What tests of fusedcomm.cli.launch run on its ranks, which import it by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def _rank() -> int:
    return int(os.environ["RANK"])


def write_rank(folder: str) -> None:
    (Path(folder) / str(_rank())).write_text(f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")


def fail(on: int, kind: str) -> None:
    """Ends rank ``on`` in the way called ``kind``; the others wait for what never comes."""
    if _rank() == on:
        if kind == "value":
            raise ValueError("model: expected a folder, got a file")
        if kind == "pipe":
            raise BrokenPipeError
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no such luck")
    time.sleep(120)
