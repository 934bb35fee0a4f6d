"""What the pruning methods of single weights and blocks share: scores in, zeros out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offramp.compress.method import Component, M, modules_of, trainable_copy
from offramp.compress.scores import lowest

Weighted = nn.Linear | nn.Embedding | nn.Conv1d
WITH_WEIGHT = (nn.Linear, nn.Embedding, nn.Conv1d)
Score = Callable[[str, Tensor], Tensor]


@torch.no_grad()
def prune_lowest(
    model: M, components: Component, level: float, scope: str, score: Score, block: int = 1
) -> M:
    """A copy in which the lowest `level` of the weights of `components` are zero.

    score: (parameter's name, weight) -> one score per block of `block` rows by 1 column.
    Embeddings and kernels are pruned like matrices; biases and norms are not.
    """
    model = trainable_copy(model, components)
    found: dict[str, Weighted] = modules_of(model, WITH_WEIGHT, components)
    weights = {f"{name}.weight": module.weight for name, module in found.items()}
    low = lowest({name: score(name, w.detach()) for name, w in weights.items()}, level, scope)
    for name, weight in weights.items():
        drop = low[name].flatten(1).repeat_interleave(block, 0)[: len(weight)]
        weight.masked_fill_(drop.view(weight.shape), 0.0)
    return model
