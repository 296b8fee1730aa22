"""The small checkpoints of the demonstration, made once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import astuple
from pathlib import Path

KINDS = ("bf16", "fp8")
_FORMAT = 1  # raise it when the checkpoints of one shape change


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fusedcomm``, by default ``~/.cache/fusedcomm``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of base directories has relative ones ignored
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "fusedcomm"


def ensure_checkpoints(cache: Path) -> dict[str, Path]:
    """The folder of each kind of checkpoint (bf16, block-FP8); makes those that are missing."""
    from fusedcomm.models.tiny import TinyShape

    shape = TinyShape()
    key = hashlib.sha256(repr((_FORMAT, astuple(shape))).encode()).hexdigest()[:12]
    return {kind: _ensure(cache / "demo" / f"{key}-{kind}", kind) for kind in KINDS}


def _ensure(folder: Path, kind: str) -> Path:
    from fusedcomm.models.tiny import make_tiny_qwen3

    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place and moved there whole: a run that is interrupted leaves no half of one
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        make_tiny_qwen3(made, "fp8" if kind == "fp8" else None)
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
