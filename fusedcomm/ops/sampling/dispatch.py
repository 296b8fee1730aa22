"""Which backend serves the ops of sampling and of speculative verification; decided once for a device type."""

from __future__ import annotations

from fusedcomm.env import Settings
from fusedcomm.errors import SettingError

_chosen: dict[str, str] = {}
_debug: list[bool] = []


def sampling_backend(device_type: str) -> str:
    """``"torch"``: what runs these ops on tensors of this device type.

    Reads the settings at its first call for a device type.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND`` asks for what has no kernels of these ops.
    """
    backend = _chosen.get(device_type)
    if backend is None:
        backend = _chosen[device_type] = choose_sampling_backend(Settings.from_environ(), device_type)
    return backend


# torch.compile takes the answer as a constant: see fusedcomm.ops.dispatch.
setattr(sampling_backend, "_dynamo_marked_constant", True)  # noqa: B010


def choose_sampling_backend(settings: Settings, device_type: str) -> str:
    """The pure rule behind sampling_backend.

    A setting that asks for aiter is about collectives, and on a GPU leaves these ops to the rule.
    """
    by_itself = settings.backend is None or (settings.backend == "aiter" and device_type != "cpu")
    if not by_itself and settings.backend != "torch":
        raise SettingError(
            f"FUSEDCOMM_BACKEND: expected torch for sampling on {device_type} here, got {settings.backend!r}"
        )
    return "torch"


def values_are_checked() -> bool:
    """Whether ``FUSEDCOMM_DEBUG=1``: the ops look at the values of their arguments, which waits for the device."""
    if not _debug:
        _debug.append(Settings.from_environ().debug)
    return _debug[0]


# No functools.cache: torch.compile would look past it, and past this.
setattr(values_are_checked, "_dynamo_marked_constant", True)  # noqa: B010
