"""How many kernels something launches, by torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def count_kernels(run: Callable[[], object], finish: Callable[[], None]) -> Counter[str]:
    """Launches of each kernel by its name while ``run`` runs, copies and fills among them."""
    finish()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        finish()
    with tempfile.TemporaryDirectory(prefix="fusedcomm-trace-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return kernels_of(json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"])


def kernels_of(events: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """What ran on the device according to the events of a Chrome trace."""
    on_device = ("kernel", "gpu_memcpy", "gpu_memset")
    return Counter(str(e["name"]) for e in events if e.get("cat") in on_device and e.get("ph") == "X")
