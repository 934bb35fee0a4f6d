"""Figures as PNG, by matplotlib (extra `plot`). Each says in its title what its numbers are."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.energy.modelled import ModelledEnergy
from offramp.errors import InputError
from offramp.files import replacing


def check_plots(path: Path | None) -> None:
    """Before the work: InputError if a figure cannot be made, or not under this name."""
    if path is None:
        return
    if path.suffix != ".png":
        raise InputError(f"cannot plot to {path}; give a name that ends in .png")
    _figure()


def plot_energy(energies: Sequence[ModelledEnergy], path: Path) -> None:
    """Modelled energy by component, a bar for each hardware profile."""
    figure = _figure()
    axes = figure.subplots()
    names = [energy.profile.name for energy in energies]
    bottom = [0.0] * len(energies)
    for component in (c.name for c in energies[0].components):
        heights = [_of(energy, component) for energy in energies]
        axes.bar(names, heights, bottom=bottom, label=component)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("mJ per second of audio")
    axes.set_title("Modelled energy by component; not measured")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _of(energy: ModelledEnergy, component: str) -> float:
    return next(c.mj_per_audio_s for c in energy.components if c.name == component)


def _figure() -> Any:
    """Without pyplot, which would look for a screen and keep every figure."""
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InputError(
            "plots need matplotlib; install it with pip install 'offramp[plot]'"
        ) from error
    return figure.Figure(figsize=(7, 4.5), layout="constrained")
