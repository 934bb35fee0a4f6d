"""Weights rounded by what their layer hears, so that what it says changes least.

Columns are rounded one after the other, and what a rounded weight is off is made good, as far as
it can be, by the weights of its row that are still to come (GPTQ, arXiv 2210.17323, section 3). A
weight that pruning has made zero stays zero.

    with input_moments(model) as moments:
        ... let the model hear some minutes of speech ...
    small = WeightQuantization(4, moments=moments).apply(model)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Moments = Mapping[str, Tensor]

_DAMPING = 0.01  # of the mean moment, added to each input's own: few recordings must not decide all


@contextmanager
def input_moments(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, by name of a linear layer, the sum of x x^T [in, in] in float64 over all
    inputs x that it heard so far in this scope. Layers that heard nothing are not in it."""
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def gather(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        now = (x.T @ x).double()
        found[name] = found[name] + now if name in found else now

    handles = [
        layer.register_forward_hook(partial(gather, name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rounded(weight: Tensor, scales: Tensor, bits: int, moments: Tensor) -> Tensor:
    """weight [out, in], scales [out], moments [in, in] of its inputs -> int8 codes [out, in]."""
    most, unit = 2 ** (bits - 1) - 1, scales.double()
    # The inputs that are heard most come first: what is off there has the most to be made good by.
    order = moments.diagonal().argsort(descending=True, stable=True)
    left = weight.detach().double()[:, order]
    zero, spread = left == 0, _spread(moments[order][:, order])
    codes = torch.empty_like(left)
    for i in range(left.shape[1]):
        codes[:, i] = (left[:, i] / unit).round().clamp(-most, most)
        codes[:, i].masked_fill_(zero[:, i], 0.0)
        off = left[:, i] - codes[:, i] * unit
        left[:, i:] -= torch.outer(off / spread[i, i], spread[i, i:])
    whole = torch.empty_like(codes)
    whole[:, order] = codes
    return whole.to(torch.int8)


def _spread(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse: its row i tells how a change of input i's weight is
    best made good by those after it."""
    own = moments.diagonal()
    silent = torch.where(own > 0, 0.0, 1.0)  # an input that is never heard has nothing to say
    damped = moments + torch.diag(_DAMPING * own.mean() + silent)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
