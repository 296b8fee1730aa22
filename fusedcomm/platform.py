"""Facts of a device, as torch knows them; nothing is asked of a GPU before somebody asks for its facts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

FNUZ_ARCHS = ("gfx940", "gfx941", "gfx942")
"""GPUs whose FP8 has no negative zero (e4m3fnuz, up to 240); all others have e4m3fn (up to 448)."""


class DeviceFacts(NamedTuple):
    """What kernels and their callers need to know of a device."""

    arch: str
    """``"cpu"``, ``"sm_90"``, ``"gfx942"``."""
    name: str
    uuid: bytes
    """16 bytes that name the GPU, the same in every process; empty on CPU."""
    num_sms: int
    """Multiprocessors (compute units); 0 on CPU."""

    @property
    def fp8_dtype(self) -> torch.dtype:
        """The FP8 format of the device's instructions."""
        return torch.float8_e4m3fnuz if self.arch in FNUZ_ARCHS else torch.float8_e4m3fn


_CPU = DeviceFacts("cpu", "CPU", b"", 0)
_facts: dict[int, DeviceFacts] = {}


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device; one without an index is the current one. Anything but a GPU counts as the CPU."""
    if device.type != "cuda":
        return _CPU
    return _gpu_facts(torch.cuda.current_device() if device.index is None else device.index)


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The FP8 format of a device: float8_e4m3fn, or float8_e4m3fnuz on gfx942."""
    return device_facts(device).fp8_dtype


def _gpu_facts(index: int) -> DeviceFacts:
    facts = _facts.get(index)
    if facts is None:
        facts = _facts[index] = _ask_gpu(index)
    return facts


def _ask_gpu(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    identity: Any = properties.uuid  # an object that torch's stubs take for text
    return DeviceFacts(arch, properties.name, bytes(identity.bytes), properties.multi_processor_count)


# torch.compile takes the answer as a constant: see fusedcomm.ops.dispatch. (It would look past functools.cache.)
setattr(_gpu_facts, "_dynamo_marked_constant", True)  # noqa: B010
