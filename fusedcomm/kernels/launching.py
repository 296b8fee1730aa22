"""How a Triton kernel is launched for tensors of any device."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Launches on the device's current stream; an empty grid launches nothing."""
    if 0 in grid:
        return
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):  # Triton launches on the current device
        kernel[grid](*arguments, **options)
