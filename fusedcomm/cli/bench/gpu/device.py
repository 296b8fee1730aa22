"""Streams, events and graphs of one GPU, as the harness uses them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator

import torch

HOLD_CYCLES = 2_000_000
"""About a millisecond at 2 GHz: longer than the host takes to queue the first replays of a round."""


class CudaDevice:
    """One GPU; everything runs on one stream of its own, because the default stream cannot be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, work goes to this device's stream, without autograd."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), torch.inference_mode():
            yield

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        # Not torch.cuda.graph: it empties the allocator's cache each time. Thread-local, because NCCL's watchdog makes
        # calls that a capture forbids.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            queue()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what queue raised says more
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay

    def hold(self) -> None:
        torch.cuda._sleep(HOLD_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def describe_gpus() -> dict[str, object]:
    """Model, number and memory of the GPUs, and the driver's version if it tells."""
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, object] = {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return found


def describe_gpu_versions() -> dict[str, str]:
    """Versions of CUDA (or HIP) and NCCL as torch was built with them."""
    found = {}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.version.hip:
        found["hip"] = torch.version.hip
    with contextlib.suppress(RuntimeError, AttributeError):
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found
