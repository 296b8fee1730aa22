"""Which device a group's tensors live on."""

from __future__ import annotations

import torch


def check_device(device: torch.device | str | None) -> torch.device | None:
    """The device as torch's type, None as it is; ValueError if no group can be made on it here."""
    if device is None:
        return None
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a torch.device or its name, got {device!r}") from None
    if checked.type == "cpu":
        return torch.device("cpu")
    if checked.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {checked}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device: expected cpu (torch sees no GPU here), got {checked}")
    if checked.index is not None and checked.index >= count:
        raise ValueError(f"device: expected cuda:0 to cuda:{count - 1}, got {checked}")
    return checked


def choose_device(device: torch.device | str | None, local_rank: int) -> torch.device:
    """The device of the rank that is ``local_rank`` on its host: round the GPUs if there are any, as long as nobody
    says otherwise; ``"cuda"`` goes round them too; an index is kept.

    Raises:
        ValueError: no group can be made on it here.
    """
    checked = check_device(device)
    if checked is None:
        checked = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if checked == torch.device("cuda"):  # without an index
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return checked
