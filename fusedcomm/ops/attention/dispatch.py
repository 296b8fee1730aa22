"""Which backend serves the attention ops: Triton on GPUs, torch elsewhere; decided once for a device type."""

from __future__ import annotations

from fusedcomm import kernels
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError

_chosen: dict[str, str] = {}
_aiter_forced: list[bool] = []


def attention_backend(device_type: str) -> str:
    """``"triton"`` or ``"torch"``: what runs the attention ops on tensors of this device type.

    Reads the settings at its first call for a device type.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND=triton`` on a machine without Triton for this device type.
    """
    backend = _chosen.get(device_type)
    if backend is None:
        settings = Settings.from_environ()
        # on the CPU it takes an import of Triton to know
        asked = device_type != "cpu" or settings.backend == "triton"
        available = asked and kernels.available(device_type)
        backend = choose_attention_backend(settings, device_type, triton_available=available)
        _chosen[device_type] = backend
    return backend


# torch.compile takes the answer as a constant: see fusedcomm.ops.dispatch.
setattr(attention_backend, "_dynamo_marked_constant", True)  # noqa: B010


def choose_attention_backend(settings: Settings, device_type: str, *, triton_available: bool) -> str:
    """The pure rule behind attention_backend: Triton on a GPU that has it, else torch; or the one that is asked for.

    A setting that asks for native or for aiter is about other ops and leaves these to the rule, but for the one op that
    each has: sparse MLA decode, which the compiled kernel takes unless the setting names another backend
    (kernels.attention.sparse_mla_hopper), and the indexer's write (aiter_is_forced). ``triton_available``: it serves
    this device type (the CPU by its interpreter alone).
    """
    if settings.backend == "triton" and not triton_available:
        raise SettingError(f"FUSEDCOMM_BACKEND: expected torch on {device_type} here, got 'triton'")
    if settings.backend in ("triton", "torch"):
        return settings.backend
    if settings.disable or device_type == "cpu":
        return "torch"
    return "triton" if triton_available else "torch"


def aiter_is_forced() -> bool:
    """Whether ``FUSEDCOMM_BACKEND=aiter``; read once. It never serves attention by itself: see its module here."""
    if not _aiter_forced:
        _aiter_forced.append(Settings.from_environ().backend == "aiter")
    return _aiter_forced[0]


# No functools.cache: torch.compile would look past it, and past this.
setattr(aiter_is_forced, "_dynamo_marked_constant", True)  # noqa: B010
