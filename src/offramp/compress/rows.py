"""Row pruning: whole outputs of a matrix go, so that the product is really smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offramp.compress.layers import SubsetLinear
from offramp.compress.method import Component, M, free_linears, replace_module, trainable_copy
from offramp.compress.scores import check_level, keep_best


@dataclass(frozen=True)
class RowPruning:
    """Of each matrix the rows of least norm go; their outputs are their biases from then on.

    level: the share of rows. Factors of a low-rank layer stay whole.
    """

    level: float

    def __post_init__(self) -> None:
        check_level(self.level)

    @torch.no_grad()
    def apply(self, model: M, components: Component = None) -> M:
        model = trainable_copy(model, components)
        for name, linear in free_linears(model, components).items():
            kept = keep_best(linear.weight.square().sum(1), self.level)
            if not bool(kept.all()):
                replace_module(model, name, SubsetLinear.of(linear, None, kept))
        return model
