"""The state of a training run in one safetensors file, so that a killed run goes on where it was.

It holds the weights, the optimizers' tensors and the step. Batches, curriculum and layer
dropout are functions of (seed, step), so nothing else is needed; the settings are stored too,
and a run with others refuses to resume. A digest over all of it tells a damaged file.
"""

from __future__ import annotations

import hashlib
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

# What each kind of optimizer remembers of a parameter; "step" is a number, the others its shape.
_REMEMBERED: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


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
    tensors = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    meta = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {**meta, "sha256": _digest(tensors, meta)})


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: Mapping[str, Any],
) -> int:
    """Restore what `save_state` wrote; returns the number of steps done.

    CheckpointError, before anything is changed, for a file that is damaged, of other settings,
    or does not hold exactly the tensors of `model` and `optimizers`.
    """
    step, stored, tensors = _read(path)
    _refuse_other_settings(path, stored, settings)
    expected = _shapes(model, optimizers, step)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        both = found.keys() & expected.keys()
        first = min(found.keys() ^ expected.keys() | {n for n in both if found[n] != expected[n]})
        raise CheckpointError(
            f"cannot resume from {path}: it is of another model or optimizer (they differ in "
            f"{first}); delete it to start anew"
        )
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for n, optimizer in enumerate(optimizers):
        prefix = f"optimizer{n}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, name = key.removeprefix(prefix).split(".", 1)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def _read(path: Path) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """(step, settings, tensors) of a whole state file, as `save_state` wrote them."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot resume from {path}: it is truncated or corrupt ({error}); delete it to start "
            "anew"
        ) from error
    if not {"step", "settings", "sha256"} <= meta.keys():
        raise CheckpointError(
            f"cannot resume from {path}: it is no training state; choose another output folder"
        )
    try:
        step, settings = int(meta["step"]), json.loads(meta["settings"])
    except ValueError:
        step, settings = -1, None
    if meta["sha256"] != _digest(tensors, meta) or step < 0 or not isinstance(settings, dict):
        raise CheckpointError(f"cannot resume from {path}: it is damaged; delete it to start anew")
    return step, settings, tensors


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    """sha256 over step, settings, and the name, kind, shape and bytes of every tensor."""
    digest = hashlib.sha256(repr((meta["step"], meta["settings"])).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shapes(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> dict[str, torch.Size]:
    """The tensors that a state after `step` steps holds."""
    shapes = {f"model.{name}": p.shape for name, p in model.state_dict().items()}
    for n, optimizer in enumerate(optimizers if step else ()):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(parameters):
            for name in _REMEMBERED[type(optimizer)]:
                shape = torch.Size() if name == "step" else p.shape
                shapes[f"optimizer{n}.{index}.{name}"] = shape
    return shapes


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _refuse_other_settings(
    path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    was, now = _flat(stored), _flat(json.loads(json.dumps(settings)))
    different = sorted(k for k in {*was, *now} if was.get(k) != now.get(k))
    if different:
        changes = "; ".join(f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in different)
        raise CheckpointError(
            f"cannot resume from {path}: {changes}; restore these settings, "
            "choose another output folder, or delete the file to start anew"
        )
