"""Which backend serves the local ops.

The choice is made once for a device type and cached; a forced backend that cannot serve is an error.
"""

from __future__ import annotations

from fusedcomm import native
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError

_chosen: dict[str, str] = {}


def local_backend(device_type: str) -> str:
    """``"native"`` or ``"torch"``: what runs norm and quantisation on tensors of this device type.

    Reads the settings at its first call for a device type.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND`` (or ``FUSEDCOMM_DISABLE``) asks for what this machine cannot do.
    """
    backend = _chosen.get(device_type)
    if backend is None:
        available = native.load() is not None
        backend = _chosen[device_type] = choose_local_backend(
            Settings.from_environ(), device_type, native_available=available
        )
    return backend


# torch.compile takes the answer as a constant in place of tracing how it is found. This is what
# torch.compiler.assume_constant_result does, which would import the compiler first (two seconds).
setattr(local_backend, "_dynamo_marked_constant", True)  # noqa: B010


def choose_local_backend(settings: Settings, device_type: str, *, native_available: bool) -> str:
    """The pure rule behind local_backend."""
    can = {
        "torch": True,
        "native": device_type == "cpu" and native_available,
        "triton": False,
        "aiter": False,
    }
    wanted = settings.backend
    if wanted is not None and not can[wanted]:
        usable = " or ".join(name for name, ok in can.items() if ok)
        raise SettingError(f"FUSEDCOMM_BACKEND: expected {usable} on {device_type} here, got {wanted!r}")
    if wanted is not None:
        return wanted
    return "native" if can["native"] and not settings.disable else "torch"
