"""What changes over a training run: which exits have a loss, their weights, the learning rate.

LayerSkip (arXiv 2404.16710), section 4.2 and the early-exit curricula C(t, l). All functions are
pure in (step, total steps), so a resumed run continues its curriculum without any saved state.
Layers count from 0; the exit of layer l reads the state after l + 1 layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from offramp.config import check_counts
from offramp.errors import ConfigError

CURRICULA = ("rotational", "gradual", "all", "last")
WEIGHTINGS = ("quadratic", "uniform")


@dataclass(frozen=True)
class ExitCurriculum:
    """Which exits have a loss at a step, and what they weigh. The last layer always has one.

    `rotational`: every `period`-th exit, shifted by one each step. `gradual`: from the last
    layer down, one more every T/(2L) steps, all of them from T/2 on. `all` and `last` do not
    change over time.

    exits: the early exits that take part, counted from 1 (the paper's: all, the default).
    weighting: `quadratic`, the paper's e(l), made for deep towers; or `uniform`, early_exit_scale
    for each early exit and 1 for the last, which favours the lowest exits.
    """

    kind: str = "rotational"
    period: int = 4
    exits: tuple[int, ...] = ()
    weighting: str = "quadratic"

    def __post_init__(self) -> None:
        if self.kind not in CURRICULA:
            raise ConfigError(f"exit curriculum is {self.kind!r}; allowed: {', '.join(CURRICULA)}")
        if self.weighting not in WEIGHTINGS:
            raise ConfigError(
                f"exit weighting is {self.weighting!r}; allowed: {', '.join(WEIGHTINGS)}"
            )
        check_counts(1, period=self.period)
        for exit_layer in self.exits:
            check_counts(1, exits=exit_layer)

    def enabled(self, step: int, total_steps: int, num_layers: int) -> list[int]:
        """Layers whose exit has a loss at `step`, in rising order."""
        last = num_layers - 1
        layers = self._candidates(num_layers)
        if self.kind == "last":
            return [last]
        if self.kind == "all":
            return layers
        if self.kind == "rotational":
            phase = step % self.period
            return [i for j, i in enumerate(layers) if i == last or j % self.period == phase]
        count = min(len(layers), 1 + int(step * 2 * len(layers) / total_steps))
        return layers[-count:]

    def _candidates(self, num_layers: int) -> list[int]:
        """The layers whose exits take part, the last one included."""
        if not self.exits:
            return list(range(num_layers))
        if max(self.exits) > num_layers:
            raise ConfigError(
                f"exits are {self.exits}; each must be at most {num_layers}, the number of layers"
            )
        return sorted({exit_layer - 1 for exit_layer in self.exits} | {num_layers - 1})


def exit_scale(layer: int, num_layers: int, early_exit_scale: float) -> float:
    """e(l): 0 at the first layer, rising quadratically, plus (L-1) at the last (section 4.2)."""
    if layer < num_layers - 1:
        return early_exit_scale * layer * (layer + 1) / 2
    return (num_layers - 1) + early_exit_scale * (num_layers - 2) * (num_layers - 1) / 2


def exit_weights(
    step: int,
    total_steps: int,
    num_layers: int,
    curriculum: ExitCurriculum,
    early_exit_scale: float,
) -> dict[int, float]:
    """Layer -> weight of its exit's loss at `step`: e(l) over the enabled exits, summing to 1."""
    enabled = curriculum.enabled(step, total_steps, num_layers)
    if curriculum.weighting == "uniform":
        raw = {i: early_exit_scale if i < num_layers - 1 else 1.0 for i in enabled}
    else:
        raw = {i: exit_scale(i, num_layers, early_exit_scale) for i in enabled}
    total = sum(raw.values())
    if total == 0.0:  # a tower of one layer: e is 0 throughout, and that layer is the last
        return {num_layers - 1: 1.0}
    return {i: e / total for i, e in raw.items() if e > 0.0}


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a twentieth of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
