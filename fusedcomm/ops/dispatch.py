"""Which backend serves the local ops.

The choice is made once for a device type and cached; a forced backend that cannot serve is an error.
"""

from __future__ import annotations

from fusedcomm import kernels, native
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops.operators import Operators, operators_of

_chosen: dict[str, str] = {}
_operators: dict[str, Operators] = {}


def local_backend(device_type: str) -> str:
    """``"native"``, ``"triton"`` or ``"torch"``: what runs norm and quantisation on tensors of this device type.

    Reads the settings at its first call for a device type.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND`` (or ``FUSEDCOMM_DISABLE``) asks for what this machine cannot do.
    """
    backend = _chosen.get(device_type)
    if backend is None:
        backend = find_local_backend(Settings.from_environ(), device_type)
        _operators[backend] = operators_of(backend)
        _chosen[device_type] = backend
    return backend


# torch.compile takes the answer as a constant in place of tracing how it is found. This is what
# torch.compiler.assume_constant_result does, which would import the compiler first (two seconds).
setattr(local_backend, "_dynamo_marked_constant", True)  # noqa: B010


def local_operators(device_type: str) -> Operators:
    """The operators of local_backend."""
    return _operators[local_backend(device_type)]


def find_local_backend(settings: Settings, device_type: str) -> str:
    """choose_local_backend with what is available on this machine; SettingError as there."""
    on_gpu = device_type != "cpu"
    return choose_local_backend(
        settings,
        device_type,
        native_available=native.load() is not None,
        gpu_native_available=on_gpu and native.load_gpu() is not None,
        # on the CPU it takes an import of Triton to know
        triton_available=(on_gpu or settings.backend == "triton") and kernels.available(device_type),
    )


def choose_local_backend(
    settings: Settings,
    device_type: str,
    *,
    native_available: bool,
    gpu_native_available: bool = False,
    triton_available: bool = False,
) -> str:
    """The pure rule behind local_backend: native where it is, else Triton on a GPU, else torch.

    ``native_available``: the compiled library is there; ``gpu_native_available``: that for GPUs too;
    ``triton_available``: Triton serves this device type (the CPU by its interpreter alone, and only if it is forced).
    """
    on_cpu = device_type == "cpu"
    can = {
        "torch": True,
        "native": native_available if on_cpu else gpu_native_available,
        "triton": triton_available,
        "aiter": False,
    }
    # aiter makes collectives; what is local beside them goes by itself, and their group says whether aiter can serve
    wanted = None if settings.backend == "aiter" and not on_cpu else settings.backend
    if wanted is not None and not can[wanted]:
        usable = " or ".join(name for name, ok in can.items() if ok)
        raise SettingError(f"FUSEDCOMM_BACKEND: expected {usable} on {device_type} here, got {wanted!r}")
    if wanted is not None:
        return wanted
    by_itself = () if settings.disable else ("native",) if on_cpu else ("native", "triton")
    return next((name for name in by_itself if can[name]), "torch")
