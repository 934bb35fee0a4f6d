"""Linear layers that are really smaller: fewer rows or columns, or two thin factors.

Each takes and gives what the layer it stands for did, so no model needs to know. `weight` is the
full matrix again, for models that read it and for the slow, obvious check.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.compress.quantized import QuantizedLinear


class SubsetLinear(nn.Module):
    """A linear layer of which only some inputs or outputs are left in `linear`.

    inputs, outputs: int32, those that are kept, rising; None: all. Of an output that is gone the
    bias remains.
    """

    in_features: int
    out_features: int
    linear: AnyLinear
    inputs: Tensor | None
    outputs: Tensor | None

    def __init__(self, linear: AnyLinear, in_features: int, out_features: int, bias: bool) -> None:
        """All of `linear`'s rows and columns; which ones they are is to be filled in.

        bias: whether there is one beside `linear`'s own.
        """
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        for name, kept, full in (
            ("inputs", linear.in_features, in_features),
            ("outputs", linear.out_features, out_features),
        ):
            empty = torch.zeros(kept, dtype=torch.int32)
            self.register_buffer(name, empty if kept != full else None)

    @classmethod
    def of(cls, linear: nn.Linear, inputs: Tensor | None, outputs: Tensor | None) -> SubsetLinear:
        """What is left of `linear`; inputs, outputs: bool, True for those kept, or None: all."""
        full_out, full_in = linear.weight.shape
        weight, bias = linear.weight.detach(), linear.bias
        if inputs is not None:
            weight = weight[:, inputs]
        if outputs is not None:
            weight = weight[outputs]
        all_out = len(weight) == full_out
        small = nn.Linear(weight.shape[1], len(weight), bias=bias is not None and all_out)
        subset = cls(small, full_in, full_out, bias is not None and not all_out)
        small.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
        if bias is not None:
            copied = nn.Parameter(bias.detach().clone(), bias.requires_grad)
            (small if all_out else subset).bias = copied
        for name, kept in (("inputs", inputs), ("outputs", outputs)):
            if kept is not None and getattr(subset, name) is not None:
                setattr(subset, name, kept.nonzero().flatten().to(torch.int32))
        return subset

    @property
    def weight(self) -> Tensor:
        """[out, in], zero where pruned."""
        weight = self.linear.weight
        for dim, kept, size in (
            (0, self.outputs, self.out_features),
            (1, self.inputs, self.in_features),
        ):
            if kept is not None:
                shape = [*weight.shape]
                shape[dim] = size
                weight = weight.new_zeros(shape).index_copy(dim, kept.long(), weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x.index_select(-1, self.inputs)
        y: Tensor = self.linear(x)
        if self.outputs is None:
            return y
        shape = (*y.shape[:-1], self.out_features)
        rest = y.new_zeros(shape) if self.bias is None else self.bias.to(y.dtype).expand(shape)
        return rest.index_add(-1, self.outputs, y)


class LowRankLinear(nn.Module):
    """up(down(x)): two thin matrices in the place of one."""

    in_features: int
    out_features: int
    down: AnyLinear
    up: AnyLinear

    def __init__(self, down: AnyLinear, up: AnyLinear) -> None:
        """down: [in] to [rank], without bias; up: [rank] to [out]."""
        super().__init__()
        self.down, self.up = down, up
        self.in_features, self.out_features = down.in_features, up.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        return self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


AnyLinear = nn.Linear | QuantizedLinear | SubsetLinear | LowRankLinear
