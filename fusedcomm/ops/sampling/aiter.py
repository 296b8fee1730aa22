"""AMD's aiter for the ops of sampling and of verification: what of it can be called, and how that is done safely.

Bound against the signatures of amd-aiter 0.1.20, and for what no release has yet against those proposed, and never run:
there was no AMD hardware (docs/amd.md). What its kernels do with data is said here as the sources of 0.1.20 have it.

Called are ``top_k_renorm_probs``, and where they are there ``top_p_renorm_probs`` and ``top_k_top_p_renorm_probs``; and
only where ``FUSEDCOMM_BACKEND=aiter`` asks for it. They sum in fp32 and in an order of their own, so results are not
to the bit those of the other backends, and a top-p threshold may fall on another value: what the library promises of
its ops cannot be promised of them. Around a call stand a gather where there are indices, one or two launches that turn
what is no probability to 0, and a copy to the result.

What 0.1.20 does with its memory, and what is done about it here:

- Its kernel of top-k writes as many indices as a row's own k into a workspace that is laid out by the k on the host,
  50 where that is 0: past its end, where rows have a k each (ROCm/aiter issue 5192). So V is passed for that k, which
  makes the workspace as large as the probabilities; it is kept. A k that is no limit is passed as V as well: 0 would be
  taken for none at all.
- The workspace is freed when a call needs a larger one. A graph would go on using it: a call that is being captured is
  an error. Freeing it waits for the device.
- There is one workspace for the process, on the GPU of the first call: a call on another one is an error. Calls on two
  streams of that GPU must not run at the same time.
- It launches on the current stream of the current device, which is therefore made that of the tensors.

Not called:

- ``top_p_sampling_from_probs``, ``top_k_top_p_sampling_from_probs``: they take no uniforms, so ranks would not agree on
  a token; and the state of their generator is read on the host and becomes an argument of the kernel, so that a graph
  draws the same at each replay.
- ``chain_speculative_sampling``, which is in no release: as proposed it is dflash_chain_verify of this library, without
  the committed tokens. An id outside of the vocabulary has to be refused here without a look at its probability, and
  there is no id that could be passed in its place and would be refused for certain.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from fusedcomm.aiter_package import ARCHS, Call, find_aiter, resolve, why_unusable
from fusedcomm.env import Settings
from fusedcomm.errors import SettingError
from fusedcomm.ops.sampling.fixed_point import take

_MODULE = "aiter.ops.sampling"
TOP_K_RENORM_PROBS = Call(_MODULE, "top_k_renorm_probs", ("probs", "maybe_top_k_arr", "top_k_val"))
TOP_P_RENORM_PROBS = Call(_MODULE, "top_p_renorm_probs", ("probs", "maybe_top_p_arr", "top_p_val"))
TOP_K_TOP_P_RENORM_PROBS = Call(
    _MODULE,
    "top_k_top_p_renorm_probs",
    ("probs", "maybe_top_k_arr", "top_k_val", "maybe_top_p_arr", "top_p_val"),
)
CONTRACT = {call.function: call for call in (TOP_K_RENORM_PROBS, TOP_P_RENORM_PROBS, TOP_K_TOP_P_RENORM_PROBS)}
"""By the name of the op, which is that of the function."""

_NOT_CALLED = {
    "sampling_from_probs": "its samplers take no uniforms",
    "top_k_top_p_sampling_from_probs": "its samplers take no uniforms",
    "dflash_chain_verify": "its form of it, in no release yet, does not say that it refuses ids out of range",
}
_LARGEST = torch.finfo(torch.float32).max
_TINY = torch.finfo(torch.float32).tiny
_device: list[torch.device] = []
"""Where the workspace lies, once there is one."""


def why_not(op: str, settings: Settings, arch: str) -> str:
    """Why aiter does not serve an op on a device of this arch, whatever is installed; empty if it may. Pure.

    ``arch``: empty where torch sees no GPU.
    """
    for switch in ("disable", "disable_aiter", "disable_aiter_sampling"):
        if getattr(settings, switch):
            return f"FUSEDCOMM_{switch.upper()}=1"
    if not arch.startswith(ARCHS):
        where = {"cpu": "not the CPU", "": "and torch sees no GPU"}.get(arch, f"not {arch}")
        return f"aiter serves gfx94x and gfx95x, {where}"
    if op not in CONTRACT:
        return _NOT_CALLED.get(op, "aiter has no such op")
    if settings.backend != "aiter":
        return "FUSEDCOMM_BACKEND=aiter has to ask for it: it sums in an order of its own"
    return ""


def why_absent(op: str) -> str:
    """Why the aiter that is installed does not have an op of CONTRACT; empty if it has. Imports aiter.

    Raises:
        SettingError: no aiter is installed that could be used, with the reason.
    """
    try:
        _function(op)
    except (LookupError, TypeError) as error:
        return str(error)
    return ""


@functools.cache
def _function(op: str) -> Callable[..., torch.Tensor]:
    """That of a call, looked for once.

    Raises:
        SettingError: as why_absent.
        LookupError, TypeError: this aiter has no such function, or another one.
    """
    why = why_unusable(find_aiter())
    if not why:
        try:
            importlib.import_module(_MODULE)
        except Exception as error:  # RuntimeError, and more, where something does not suit it
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
    if why:
        raise _cannot_serve(op, why)
    return resolve(CONTRACT[op])


def _cannot_serve(op: str, why: str) -> SettingError:
    return SettingError(f"FUSEDCOMM_BACKEND: aiter cannot serve {op}: {why}")


# ---- operators, of the signatures in fusedcomm.ops.sampling.reference ----


def _top_k_renorm_probs_out(
    probs: torch.Tensor, indices: torch.Tensor | None, top_k: torch.Tensor | None, top_k_value: int, out: torch.Tensor
) -> None:
    _call("top_k_renorm_probs", probs, indices, *_limit(top_k, top_k_value, probs.shape[1]), out=out)


def _top_p_renorm_probs_out(
    probs: torch.Tensor, indices: torch.Tensor | None, top_p: torch.Tensor | None, top_p_value: float, out: torch.Tensor
) -> None:
    _call("top_p_renorm_probs", probs, indices, *_share(top_p, top_p_value), out=out)


def _top_k_top_p_renorm_probs_out(
    probs: torch.Tensor,
    indices: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_k_value: int,
    top_p: torch.Tensor | None,
    top_p_value: float,
    out: torch.Tensor,
) -> None:
    parameters = *_limit(top_k, top_k_value, probs.shape[1]), *_share(top_p, top_p_value)
    _call("top_k_top_p_renorm_probs", probs, indices, *parameters, out=out)


def _call(op: str, probs: torch.Tensor, indices: torch.Tensor | None, *parameters: Any, out: torch.Tensor) -> None:
    """Writes what the function of the op makes of the rows; SettingError where that would not be safe."""
    function = _function(op)
    device = probs.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise _cannot_serve(op, "a graph is being captured, whose workspace a later call may free")
    if _device and _device[0] != device:
        raise _cannot_serve(op, f"its workspace lies on {_device[0]}, where the first call was, not on {device}")
    if out.numel() == 0:  # HIP refuses an empty grid
        return
    rows = take(probs, indices).float()
    rows = torch.where(rows > 0, rows, 0.0).clamp_(max=_LARGEST).contiguous()
    _device[:] = [device]
    with torch.cuda.device_of(rows):
        out.copy_(function(rows, *parameters))


def _limit(top_k: torch.Tensor | None, value: int, vocab: int) -> tuple[torch.Tensor | None, int]:
    """``maybe_top_k_arr`` and ``top_k_val``: from 1 to V, the latter no smaller than any of the former."""
    if top_k is None:
        return None, value or vocab
    return torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).to(torch.int32), vocab


def _share(top_p: torch.Tensor | None, value: float) -> tuple[torch.Tensor | None, float]:
    """``maybe_top_p_arr`` and ``top_p_val``: above 0, so that the largest value stays, and NaN is 1."""
    if top_p is None:
        return None, max(value, _TINY)
    return torch.where(top_p < 1, top_p, 1.0).clamp_(min=_TINY), 0.0


def _nothing(*args: object) -> None:
    """What an operator that only writes to tensors of its caller makes of fake ones."""


_library = torch.library.Library("fusedcomm_aiter", "FRAGMENT")


def _register(function: Callable[..., None], parameters: str) -> None:
    name = function.__name__.removeprefix("_")
    _library.define(f"{name}(Tensor probs, Tensor? indices, {parameters}, Tensor(a!) out) -> ()")
    for key in ("CUDA", "CPU"):  # CUDA is HIP's key too; no rule leads to the CPU's, which is for tests
        _library.impl(name, function, key)
    torch.library.register_fake(f"fusedcomm_aiter::{name}", _nothing, lib=_library)


_register(_top_k_renorm_probs_out, "Tensor? top_k, int top_k_value")
_register(_top_p_renorm_probs_out, "Tensor? top_p, float top_p_value")
_register(_top_k_top_p_renorm_probs_out, "Tensor? top_k, int top_k_value, Tensor? top_p, float top_p_value")
