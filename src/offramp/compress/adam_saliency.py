"""Adam-moment pruning: what weighs little and moves the loss little becomes zero.

Adam's second moment v, a running mean of squared gradients, stands for the curvature in the
saliency of a weight w (as in optimal brain damage, LeCun et al. 1989): w^2 v, or w^2 sqrt(v),
which counts gradients once instead of twice. The project's reference on energy names both as
readings of "Adam-pruning" that could not be checked against the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from offramp.compress.method import Component, M
from offramp.compress.prune import prune_lowest
from offramp.compress.scores import check_level
from offramp.config import check_choice
from offramp.errors import InputError

SALIENCIES = ("w2_sqrt_v", "w2_v")


@dataclass(frozen=True)
class AdamPruning:
    """As `MagnitudePruning`, by another score.

    moments: parameter's name -> second moment, as `finetune.second_moments` gathers them.
    """

    level: float
    moments: Mapping[str, Tensor] = field(compare=False, repr=False)
    saliency: str = "w2_sqrt_v"
    scope: str = "matrix"

    def __post_init__(self) -> None:
        check_level(self.level, self.scope)
        check_choice(saliency=(self.saliency, SALIENCIES))

    def apply(self, model: M, components: Component = None) -> M:
        return prune_lowest(model, components, self.level, self.scope, self._score)

    def _score(self, name: str, weight: Tensor) -> Tensor:
        moment = self.moments.get(name)
        if moment is None or moment.shape != weight.shape:
            found = "missing" if moment is None else f"of shape {list(moment.shape)}"
            raise InputError(
                f"the second moment of {name} {list(weight.shape)} is {found}; gather moments "
                "while training this very model with AdamW"
            )
        v = moment.to(weight)
        return weight.square() * (v if self.saliency == "w2_v" else v.sqrt())
