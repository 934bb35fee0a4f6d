"""Layer dropout: whole layers are skipped, per sample, more often the deeper they lie.

LayerSkip (arXiv 2404.16710), section 4.1: x_{l+1} = x_l + M(p_{l,t}) f_l(x_l) with
p_{l,t} = S(t) D(l) p_max. The dropped samples are taken out of the batch, so that skipping
saves time, and there is no rescaling, neither in training nor after. The functions are pure:
the draw for a step depends on the seed and the step alone, so a resumed run and every rank
draw alike without any state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offramp.errors import ConfigError

TIME_SCHEDULES = ("constant", "exp")


def depth_factor(layer: int, num_layers: int) -> float:
    """D(l) = 2^(l/(L-1)) - 1: 0 at the first layer, 1 at the last."""
    return 0.0 if num_layers == 1 else float(2.0 ** (layer / (num_layers - 1)) - 1.0)


def time_factor(step: int, total_steps: int, schedule: str) -> float:
    """S(t): 1 throughout for `constant` (fine-tuning), 2^(t/(T-1)) - 1 for `exp` (from scratch)."""
    if schedule not in TIME_SCHEDULES:
        raise ConfigError(
            f"layer dropout schedule is {schedule!r}; allowed: {', '.join(TIME_SCHEDULES)}"
        )
    if schedule == "constant" or total_steps <= 1:
        return 1.0
    return float(2.0 ** (min(step, total_steps - 1) / (total_steps - 1)) - 1.0)


def draw_survivors(
    num_layers: int, batch_size: int, p_max: float, time: float, seed: int, step: int
) -> Tensor:
    """Which samples pass through which layer: bool [num_layers, batch_size], True = runs.

    Drawn on the CPU from (seed, step) alone: every rank that asks with the same seed drops the
    same number of samples in each layer, and so stays in step with the others.
    """
    if not 0.0 <= p_max < 1.0:
        raise ConfigError(f"layer dropout p_max is {p_max}; it must be at least 0 and less than 1")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    p = torch.tensor([time * depth_factor(i, num_layers) * p_max for i in range(num_layers)])
    return torch.rand(num_layers, batch_size, generator=generator) >= p[:, None]


def run_survivors(
    layer: Callable[[Tensor, Tensor | None], Tensor], h: Tensor, survivors: Tensor
) -> Tensor:
    """Run `layer` on the rows of h [B, T, D] where `survivors` [B] is True; others pass unchanged.

    `layer(h, rows)` gets the surviving rows of h and their indices [K] (None: all of them), with
    which it subsets whatever else belongs to a sample: masks, positions, packing.
    """
    rows = survivors.nonzero().flatten()
    if len(rows) == len(survivors):
        return layer(h, None)
    if len(rows) == 0:
        return h
    rows = rows.to(h.device)
    return h.index_copy(0, rows, layer(h.index_select(0, rows), rows).to(h.dtype))
