"""Which device to compute on, and getting small lists of numbers onto it without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device called `name`; InputError: there is none of that name here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}; give cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}; give cpu, cuda or cuda:0")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"device is {name!r}, and torch sees no CUDA device; use cpu")
        if device.index is not None and device.index >= count:
            raise InputError(
                f"device is {name!r}, and torch sees {count} CUDA devices; "
                f"use cuda:0 to cuda:{count - 1}"
            )
    return device


def upload(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 tensor of `values` on `device`.

    On a GPU the copy is queued from pinned memory; an ordinary copy would first wait for all
    the work that is already queued.
    """
    tensor = torch.tensor(values, dtype=torch.long)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
