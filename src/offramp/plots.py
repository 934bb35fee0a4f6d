"""Figures as PNG, by matplotlib (extra `plot`). Each says in its title what its numbers are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.energy.modelled import ModelledEnergy
from offramp.errors import InputError
from offramp.files import replacing

if TYPE_CHECKING:
    from offramp.bench.energy import Row
    from offramp.bench.speech_llm_report import Figures
    from offramp.compress.plan import CompressionPlan

_MARKS = "oxs^v<>D*P"


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


def plot_front(
    front: Sequence[CompressionPlan], others: Mapping[str, CompressionPlan], path: Path
) -> None:
    """Predicted WER against modelled energy: a line of the best plans for each hardware profile,
    and a mark for each of `others` by name."""
    figure = _figure()
    axes = figure.subplots()
    for profile in front[0].modelled_mj_per_audio_s:
        points = [(100 * p.wer_increase, p.modelled_mj_per_audio_s[profile]) for p in front]
        (line,) = axes.plot(*zip(*points, strict=True), marker=".", label=profile)
        for mark, plan in zip("sxD^v", others.values(), strict=False):
            mj = plan.modelled_mj_per_audio_s[profile]
            axes.plot(100 * plan.wer_increase, mj, mark, color=line.get_color(), fillstyle="none")
    for mark, name in zip("sxD^v", others, strict=False):
        axes.plot([], [], mark, color="grey", fillstyle="none", label=name.replace("_", " "))
    axes.set_xlabel("WER increase, predicted, points")
    axes.set_ylabel("mJ per second of audio")
    axes.set_yscale("log")
    axes.set_title("WER against modelled energy; not measured")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def plot_arms(rows: Mapping[str, Row], path: Path) -> None:
    """Measured WER against modelled energy: a field for each hardware profile, a mark for each of
    `rows`, and a line through those that no other one betters in both."""
    profiles = list(next(iter(rows.values())).mj_per_audio_s)
    figure = _figure()
    figure.set_size_inches(9, 7 if len(profiles) > 2 else 4.5)
    columns = min(2, len(profiles))
    fields = list(figure.subplots(-(-len(profiles) // columns), columns, squeeze=False).flat)
    for profile, axes in zip(profiles, fields, strict=False):
        points = {name: (100 * r.wer, r.mj_per_audio_s[profile]) for name, r in rows.items()}
        for mark, (name, (wer, mj)) in zip(_MARKS, points.items(), strict=False):
            axes.plot(wer, mj, mark, label=name.replace("_", " "))
        front = pareto(list(points.values()))
        axes.plot(*zip(*front, strict=True), color="grey", linewidth=0.8, zorder=0)
        axes.set_yscale("log")
        axes.set_title(profile)
    for axes in fields[len(profiles) :]:
        axes.remove()
    figure.supxlabel("WER, %, measured")
    figure.supylabel("mJ per second of audio, modelled; not measured")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def plot_thresholds(sets: Mapping[str, Figures], path: Path) -> None:
    """Measured WER against decoder calls: a line of thresholds for each set, and a mark for what
    needs none of them, plain decoding and lossless drafts."""
    figure = _figure()
    axes = figure.subplots()
    for name, made in sets.items():
        points = [(point.calls_per_utterance, 100 * (point.wer.rate or 0)) for point in made.curve]
        (line,) = axes.plot(*zip(*points, strict=True), marker=".", label=name)
        for mark, draft in zip(_MARKS, made.drafts, strict=False):
            rate = 100 * (made.wer[draft].rate or 0)
            axes.plot(made.calls(draft), rate, mark, color=line.get_color(), fillstyle="none")
    for mark, draft in zip(_MARKS, made.drafts, strict=False):
        axes.plot([], [], mark, color="grey", fillstyle="none", label=f"lossless: {draft}")
    axes.set_xlabel("decoder calls per utterance")
    axes.set_ylabel("WER, %")
    axes.set_title("Heads believed unverified, by threshold: WER against calls; measured")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other one matches in both figures, where less is better; rising in the first,
    falling in the second."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


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
