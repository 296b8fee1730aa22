"""Which backend serves the ops of sampling and of speculative verification; decided once for a device type."""

from __future__ import annotations

from fusedcomm import native
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError

_chosen: dict[str, str] = {}
_debug: list[bool] = []


def sampling_backend(device_type: str) -> str:
    """``"native"`` or ``"torch"``: what runs these ops on tensors of this device type.

    Reads the settings and loads the compiled library at its first call for a device type.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND`` asks for what has no kernels of these ops here.
    """
    backend = _chosen.get(device_type)
    if backend is None:
        library = native.load() if device_type == "cpu" else native.load_gpu()
        settings = Settings.from_environ()
        backend = choose_sampling_backend(settings, device_type, native_available=library is not None)
        _chosen[device_type] = backend
    return backend


# torch.compile takes the answer as a constant: see fusedcomm.ops.dispatch.
setattr(sampling_backend, "_dynamo_marked_constant", True)  # noqa: B010


def choose_sampling_backend(settings: Settings, device_type: str, *, native_available: bool) -> str:
    """The pure rule behind sampling_backend: native where it is, else torch.

    ``native_available``: there is a compiled library with these ops for this device type. A setting that asks for
    aiter is about collectives, and on a GPU leaves these ops to the rule.
    """
    usable = ("torch", "native") if native_available else ("torch",)
    wanted = None if settings.backend == "aiter" and device_type != "cpu" else settings.backend
    if wanted is None:
        return "torch" if settings.disable else usable[-1]
    if wanted not in usable:
        raise SettingError(
            f"FUSEDCOMM_BACKEND: expected {' or '.join(usable)} for sampling on {device_type} here, got {wanted!r}"
        )
    return wanted


def values_are_checked() -> bool:
    """Whether ``FUSEDCOMM_DEBUG=1``: the ops look at the values of their arguments, which waits for the device."""
    if not _debug:
        _debug.append(Settings.from_environ().debug)
    return _debug[0]


# No functools.cache: torch.compile would look past it, and past this.
setattr(values_are_checked, "_dynamo_marked_constant", True)  # noqa: B010
