"""Weights as whole numbers of 8 or 4 bits with one scale per output channel, symmetric.

Per channel is a must: one scale per matrix cost Moonshine tiny 2.7 points of WER (the project's
reference on energy). Symmetric codes need no zero points, and a pruned weight stays zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from offramp.compress.method import Component, M, modules_of, replace_module
from offramp.compress.prune import WITH_WEIGHT, Weighted
from offramp.compress.quantized import (
    ACTIVATIONS,
    BITS,
    QuantizedConv1d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from offramp.compress.rounding import Moments, rounded
from offramp.config import check_choice
from offramp.errors import InputError
from offramp.models.stored import nearest, row_scales


@dataclass(frozen=True)
class WeightQuantization:
    """bits 8 or 4, of matrices, embeddings (a scale per row) and convolutions.

    Vectors (biases, norms, scales) become numbers that 16 bits hold as well. Left as they are:
    kernels too small for codes and scales to save a byte. activations: how linear layers compute;
    see `QuantizedLinear`. moments: what linear layers hear, as `rounding.input_moments` gathers it
    of this very model. Codes are chosen by it; those of layers that are not in it, and of all that
    is not linear, are the nearest ones. A second time changes nothing.
    """

    bits: int = 8
    activations: str = "bfloat16"
    moments: Moments = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice(bits=(self.bits, BITS), activations=(self.activations, ACTIVATIONS))

    @torch.no_grad()
    def apply(self, model: M, components: Component = None) -> M:
        for name, done in modules_of(model, QuantizedWeight, components).items():
            if done.bits != self.bits or getattr(done, "activations", self.activations) != (
                self.activations
            ):
                raise InputError(
                    f"{name} is quantised already, otherwise; start from the model before that"
                )
        model = copy.deepcopy(model)
        found: dict[str, Weighted] = modules_of(model, WITH_WEIGHT, components)
        for name, module in found.items():
            if self._pays(module.weight):
                replace_module(model, name, self._quantized(name, module))
        for part in components or ("",):
            for p in model.get_submodule(part).parameters():
                if p.ndim < 2:
                    p.copy_(halved(p))
        return model

    def _pays(self, weight: torch.Tensor) -> bool:
        codes = -(-weight.numel() * self.bits // 8)
        return codes + 4 * len(weight) < weight.nbytes

    def _quantized(self, name: str, module: Weighted) -> QuantizedWeight:
        new: QuantizedWeight
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            new = QuantizedLinear(*shape, bias is not None, self.bits, self.activations)
        elif isinstance(module, nn.Embedding):
            new = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, self.bits)
        else:
            new = _convolution(module, self.bits)
        new.to(module.weight.device)
        scales = halved(row_scales(module.weight, self.bits))
        new.scales.copy_(scales)
        new.codes.copy_(self._codes(name, module.weight, scales))
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().float(), False)
        return new

    def _codes(self, name: str, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        moments = self.moments.get(name)
        if moments is None:
            return nearest(weight, scales)
        if len(moments) != weight.shape[1]:
            raise InputError(
                f"{name} {list(weight.shape)} has moments of {len(moments)} inputs; gather them "
                "from this very model"
            )
        return rounded(weight, scales, self.bits, moments)


def halved(x: torch.Tensor) -> torch.Tensor:
    """x in numbers that 16 bits hold as well; as it is where that would move one by more than a
    thousandth of the largest."""
    near = x.half().to(x.dtype)
    limit = torch.finfo(torch.float16).eps * x.abs().max() if x.numel() else 0.0
    return near if bool(((near - x).abs() <= limit).all()) else x


def _convolution(conv: nn.Conv1d, bits: int) -> QuantizedConv1d:
    plain = conv.dilation == (1,) and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        raise InputError(
            f"cannot quantise {conv}; convolutions must be without dilation, padded with zeros"
        )
    how = (conv.stride[0], conv.padding[0], conv.groups)
    return QuantizedConv1d(conv.weight.shape, conv.bias is not None, bits, *how)
