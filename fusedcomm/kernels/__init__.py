"""Triton kernels of the local ops: for GPUs where the compiled GPU library is missing.

Importing this package imports no Triton; its modules with kernels do.
"""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def available(device_type: str) -> bool:
    """Whether Triton can serve tensors of this device type: GPUs, and the CPU under Triton's interpreter alone."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device_type != "cpu":
        return True
    import triton

    return bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1
