"""The state of a training run in one safetensors file, so that a killed run goes on where it was.

It holds the weights, the optimizers' tensors and the step. Batches, curriculum and layer
dropout are functions of (seed, step), so nothing else is needed; the settings are stored too,
and a run with others refuses to resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offramp.errors import CheckpointError
from offramp.files import replacing


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    settings: Mapping[str, Any],
) -> None:
    """Write the state after `step` steps to `path`, atomically."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for n, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer{n}.{index}.{name}"] = torch.as_tensor(value)
    meta = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    with replacing(path) as temporary:
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, temporary, meta)


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: Mapping[str, Any],
) -> int:
    """Restore what `save_state` wrote; returns the number of steps done."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot resume from {path}: {error}; delete it to start anew"
        ) from error
    if "step" not in meta or "settings" not in meta:
        raise CheckpointError(
            f"cannot resume from {path}: it is no training state; choose another output folder"
        )
    _refuse_other_settings(path, json.loads(meta["settings"]), settings)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"cannot resume from {path}: it is of another model; delete it to start anew"
        ) from error
    for n, optimizer in enumerate(optimizers):
        prefix = f"optimizer{n}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, name = key.removeprefix(prefix).split(".", 1)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(meta["step"])


def _refuse_other_settings(
    path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    given = json.loads(json.dumps(settings))
    different = sorted(k for k in {*stored, *given} if stored.get(k) != given.get(k))
    if different:
        changes = "; ".join(f"{k} was {stored.get(k)!r}, is {given.get(k)!r}" for k in different)
        raise CheckpointError(
            f"cannot resume from {path}: {changes}; restore these settings, "
            "choose another output folder, or delete the file to start anew"
        )
