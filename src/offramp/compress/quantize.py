"""Weights as whole numbers of 8 or 4 bits with one scale per output channel, symmetric.

Per channel is a must: one scale per matrix cost Moonshine tiny 2.7 points of WER (the project's
reference on energy). Symmetric codes need no zero points, and a pruned weight stays zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

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
from offramp.config import check_choice
from offramp.errors import InputError
from offramp.models.stored import quantize


@dataclass(frozen=True)
class WeightQuantization:
    """bits 8 or 4, of matrices, embeddings (a scale per row) and convolutions.

    Left as they are: biases, norms, and kernels too small for codes and scales to save a byte.
    activations: how linear layers compute; see `QuantizedLinear`. A second time changes nothing.
    """

    bits: int = 8
    activations: str = "bfloat16"

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
                replace_module(model, name, self._quantized(module))
        return model

    def _pays(self, weight: torch.Tensor) -> bool:
        codes = -(-weight.numel() * self.bits // 8)
        return codes + 4 * len(weight) < weight.nbytes

    def _quantized(self, module: Weighted) -> QuantizedWeight:
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
        codes, scales = quantize(module.weight, self.bits)
        new.codes.copy_(codes)
        new.scales.copy_(scales)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().float(), False)
        return new


def _convolution(conv: nn.Conv1d, bits: int) -> QuantizedConv1d:
    plain = conv.dilation == (1,) and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        raise InputError(
            f"cannot quantise {conv}; convolutions must be without dilation, padded with zeros"
        )
    how = (conv.stride[0], conv.padding[0], conv.groups)
    return QuantizedConv1d(conv.weight.shape, conv.bias is not None, bits, *how)
