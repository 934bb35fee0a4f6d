"""Magnitude pruning: the smallest weights become zero (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.compress.method import Component, M
from offramp.compress.prune import prune_lowest
from offramp.compress.scores import check_level


@dataclass(frozen=True)
class MagnitudePruning:
    """Any weight may go. level: the share of weights that become zero.

    scope: `matrix`, the same share of each; `global`, one threshold for all. Zeros are smaller to
    store, not faster to compute.
    """

    level: float
    scope: str = "matrix"

    def __post_init__(self) -> None:
        check_level(self.level, self.scope)

    def apply(self, model: M, components: Component = None) -> M:
        return prune_lowest(
            model, components, self.level, self.scope, lambda _, weight: weight.abs()
        )
