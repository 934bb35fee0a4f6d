"""Ways to damage a checkpoint's folder, which its loader is to name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Damage = Callable[[Path], Any]


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    """`change` is given the tensors of model.safetensors, to take out, add and replace some."""

    def rewrite(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return rewrite
