"""Block pruning: eight weights below each other stay or go together.

A block needs one bit where single weights need eight, and fills a vector register; the pattern
of on-device recognisers (8 x 1 in arXiv 2110.08352).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from offramp.compress.method import Component, M
from offramp.compress.prune import prune_lowest
from offramp.compress.scores import check_level

BLOCK = 8  # rows


@dataclass(frozen=True)
class BlockPruning:
    """Blocks of 8 rows by 1 column go, those of least mean square first.

    level: the share of blocks; scope as in `MagnitudePruning`. Where rows are no multiple of 8
    the last blocks are shorter.
    """

    level: float
    scope: str = "matrix"

    def __post_init__(self) -> None:
        check_level(self.level, self.scope)

    def apply(self, model: M, components: Component = None) -> M:
        return prune_lowest(model, components, self.level, self.scope, _mean_square, BLOCK)


def _mean_square(name: str, weight: Tensor) -> Tensor:
    """[rows, ...] -> [ceil(rows / 8), columns]"""
    squares = weight.flatten(1).square()
    counts = F.pad(squares.new_ones(len(squares)), (0, -len(squares) % BLOCK))
    padded = F.pad(squares, (0, 0, 0, -len(squares) % BLOCK))
    return padded.view(-1, BLOCK, squares.shape[1]).sum(1) / counts.view(-1, BLOCK).sum(1)[:, None]
