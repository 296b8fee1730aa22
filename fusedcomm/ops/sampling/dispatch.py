"""Which backend serves the ops of sampling and of speculative verification; decided once for a device type and an op.

fusedcomm.ops.sampling.plan has the rule; here is what it asks of the machine.
"""

from __future__ import annotations

import functools
import importlib

import torch

from fusedcomm import kernels, native
from fusedcomm.env import Settings
from fusedcomm.ops.sampling.plan import OPERATORS, SamplingPlan, choose_sampling_backend, explain_choice
from fusedcomm.platform import device_facts

_chosen: dict[tuple[str, str], str] = {}
_debug: list[bool] = []


def sampling_backend(device_type: str, op: str = "top_p_renorm_probs") -> str:
    """``"native"``, ``"triton"``, ``"torch"`` or ``"aiter"``: what runs this op on tensors of this device type.

    At its first call for the two it reads the settings, and loads what they and the machine bring into question. After
    that the operators of the backend are registered with torch.

    Raises:
        SettingError: ``FUSEDCOMM_BACKEND`` asks for what cannot serve the op here.
    """
    backend = _chosen.get((device_type, op))
    if backend is None:
        settings = Settings.from_environ()
        why_not = functools.partial(_why_not, settings, op, device_type)
        backend = choose_sampling_backend(settings, op, device_type, why_not)
        _chosen[device_type, op] = backend
    return backend


# torch.compile takes the answer as a constant: see fusedcomm.ops.dispatch.
setattr(sampling_backend, "_dynamo_marked_constant", True)  # noqa: B010


def explain(op: str, device_type: str) -> SamplingPlan:
    """What serves an op of fusedcomm.ops.sampling or fusedcomm.ops.speculative on tensors of a device type, and why.

    Reads the settings as they are now; an op that has been called keeps to those of its first call.

    Args:
        op: the name of its function.
        device_type: ``"cpu"`` or ``"cuda"``, which is HIP's name as well.

    Raises:
        ValueError: an argument that is not one of these.
        SettingError: as a call of the op would.
    """
    if op not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(OPERATORS)}, got {op!r}")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type: expected 'cpu' or 'cuda', got {device_type!r}")
    settings = Settings.from_environ()
    return explain_choice(settings, op, device_type, functools.partial(_why_not, settings, op, device_type))


def _why_not(settings: Settings, op: str, device_type: str, backend: str) -> str:
    """Why a backend cannot serve an op on this machine; empty if it can. Loads and imports what it takes to know."""
    if backend == "native":
        return _why_not_native(device_type)
    if backend == "triton":
        return _why_not_triton(op, device_type)
    if backend == "aiter":
        from fusedcomm.ops.sampling import aiter

        return aiter.why_not(op, settings, _arch(device_type)) or aiter.why_absent(op)
    return ""


def _why_not_native(device_type: str) -> str:
    if device_type == "cpu":
        return "" if native.load() is not None else "the compiled library is not installed"
    if native.load_gpu() is not None:
        return ""
    missing = native.library_path(native.GPU_LIBRARY_NAME) is None
    return "the compiled GPU library is not installed" if missing else "torch sees no GPU"


def _why_not_triton(op: str, device_type: str) -> str:
    if not kernels.available(device_type):
        by_interpreter = ", or does not run by its interpreter (TRITON_INTERPRET=1)" if device_type == "cpu" else ""
        return f"Triton is not installed{by_interpreter}"
    importlib.import_module("fusedcomm.kernels.sampling.operators")  # registers them
    return "" if hasattr(torch.ops.fusedcomm_triton, OPERATORS[op]) else "it has no Triton kernel"


def _arch(device_type: str) -> str:
    """That of the current device of this type; empty where torch sees none."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return ""
    return device_facts(torch.device(device_type)).arch


def values_are_checked() -> bool:
    """Whether ``FUSEDCOMM_DEBUG=1``: the ops look at the values of their arguments, which waits for the device."""
    if not _debug:
        _debug.append(Settings.from_environ().debug)
    return _debug[0]


# No functools.cache: torch.compile would look past it, and past this.
setattr(values_are_checked, "_dynamo_marked_constant", True)  # noqa: B010
