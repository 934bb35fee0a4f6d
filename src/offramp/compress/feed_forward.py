"""Pruning of hidden units: each layer's feed-forward gets as narrow as its units allow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.compress.method import Component, M, modules_of, replace_module, trainable_copy
from offramp.compress.scores import check_level, keep_best
from offramp.errors import InputError
from offramp.nn import conformer, layers

KINDS = (conformer.FeedForward, layers.FeedForward)


@dataclass(frozen=True)
class FeedForwardPruning:
    """Hidden units go whose weights, in and out, multiply to least; a gate goes with its unit.

    level: the share of units, rounded; one at least remains. What is left is an ordinary layer.
    """

    level: float

    def __post_init__(self) -> None:
        check_level(self.level)

    @torch.no_grad()
    def apply(self, model: M, components: Component = None) -> M:
        model = trainable_copy(model, components)
        for name, block in modules_of(model, KINDS, components).items():
            into = "gate_up" if isinstance(block, layers.FeedForward) else "up"
            up, down = getattr(block, into), block.down
            if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
                raise InputError(f"{name} is pruned or factorised already; prune its units first")
            kept = keep_best(unit_scores(up.weight, down.weight), self.level)
            parts = len(up.weight) // len(kept)  # 2: gates, then what they gate
            replace_module(model, f"{name}.{into}", _rows(up, kept.repeat(parts)))
            replace_module(model, f"{name}.down", _columns(down, kept))
        return model


def unit_scores(up: Tensor, down: Tensor) -> Tensor:
    """up [units or 2 units, D], down [D, units] -> [units]: norm in times norm out."""
    into = up.square().sum(1).view(-1, down.shape[1]).sum(0)
    return into * down.square().sum(0)


def _rows(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    new = nn.Linear(linear.in_features, int(kept.sum()), bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight[kept], linear.weight.requires_grad)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias[kept], linear.bias.requires_grad)
    return new


def _columns(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    new = nn.Linear(int(kept.sum()), linear.out_features, bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight[:, kept], linear.weight.requires_grad)
    if linear.bias is not None:
        new.bias = linear.bias
    return new
