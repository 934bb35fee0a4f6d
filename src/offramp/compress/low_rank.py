"""Low rank: a matrix becomes the product of two thin ones, by truncated singular values.

The best such product in the sense of least squares over the weights (Eckart and Young, 1936); a
recipe of small-footprint recognisers since Sainath et al., ICASSP 2013.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from offramp.compress.layers import LowRankLinear
from offramp.compress.method import Component, M, free_linears, replace_module, trainable_copy
from offramp.compress.scores import check_level


@dataclass(frozen=True)
class LowRank:
    """level: the share of weights that each matrix saves at least; 0 leaves it as it is.

    So does a matrix that no rank makes smaller, or one that is factorised already.
    """

    level: float

    def __post_init__(self) -> None:
        check_level(self.level)

    @torch.no_grad()
    def apply(self, model: M, components: Component = None) -> M:
        model = trainable_copy(model, components)
        for name, linear in free_linears(model, components).items():
            size = linear.in_features + linear.out_features
            rank = max(1, int((1 - self.level) * linear.weight.numel() / size))
            if self.level > 0 and rank * size < linear.weight.numel():
                replace_module(model, name, factorised(linear, rank))
        return model


def factorised(linear: nn.Linear, rank: int) -> LowRankLinear:
    """`linear` at `rank`; both factors carry the root of each singular value."""
    left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    roots = values[:rank].sqrt()
    down = nn.Linear(linear.in_features, rank, bias=False)
    up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    trained = linear.weight.requires_grad
    weights = (roots[:, None] * right[:rank], left[:, :rank] * roots)
    for layer, weight in zip((down, up), weights, strict=True):
        layer.weight = nn.Parameter(weight.to(linear.weight).contiguous(), trained)
    if linear.bias is not None:
        up.bias = linear.bias
    return LowRankLinear(down, up)
