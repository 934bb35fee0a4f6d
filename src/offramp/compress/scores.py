"""Which weights go: those that score lowest, in each matrix or under one threshold for all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offramp.config import check_choice, check_range

SCOPES = ("matrix", "global")


def check_level(level: float, scope: str = "matrix") -> None:
    """ConfigError unless `level`, the share to take away, is in [0, 1), and `scope` is one."""
    check_range(0, 1, level=level)
    check_choice(scope=(scope, SCOPES))


def lowest(scores: Mapping[str, Tensor], level: float, scope: str) -> dict[str, Tensor]:
    """True where a score is among the lowest `level` of its matrix, or of all together.

    As many as `level` says, rounded to a whole number; of equal scores the first ones.
    """
    if scope == "global" and scores:
        together = torch.cat([score.flatten() for score in scores.values()])
        sizes = [score.numel() for score in scores.values()]
        parts = torch.split(_lowest(together, level), sizes)
        return {
            name: part.view(score.shape)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    return {
        name: _lowest(score.flatten(), level).view(score.shape) for name, score in scores.items()
    }


def keep_best(scores: Tensor, level: float) -> Tensor:
    """bool like scores [N]: all but the lowest `level`, and at least one."""
    return ~_lowest(scores, min(level, 1 - 1 / len(scores)))


def _lowest(scores: Tensor, level: float) -> Tensor:
    count = round(level * len(scores))
    low = torch.zeros_like(scores, dtype=torch.bool)
    low[scores.argsort(stable=True)[:count]] = True
    return low
