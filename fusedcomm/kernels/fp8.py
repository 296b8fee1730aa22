"""Which FP8 formats a device has instructions for."""

from __future__ import annotations

import functools

import torch

from fusedcomm.platform import device_facts


@functools.cache
def converts_to(fp8: torch.dtype, device: torch.device) -> bool:
    """Whether Triton converts fp32 to this format by an instruction of the device; on gfx950 it does not use it."""
    arch = device_facts(device).arch
    if fp8 is torch.float8_e4m3fnuz:
        return arch == "gfx942"
    return arch.startswith("sm_") and int(arch[3:]) >= 89


@functools.cache
def computes_with(fp8: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions that multiply matrices of this format, and that convert it to fp32."""
    arch = device_facts(device).arch
    if fp8 is torch.float8_e4m3fnuz:
        return arch == "gfx942"
    return arch == "gfx950" or (arch.startswith("sm_") and int(arch[3:]) >= 89)
