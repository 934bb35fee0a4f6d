"""Layers whose weights are whole numbers, one scale per output channel, with kernels that pay.

A layer holds its codes as int8 in memory, also those of 4 bits; files hold two of these in a
byte (`packing.py`). Matrices multiply codes on a CPU; convolutions and the rows of embeddings are
multiplied by their scales where they are read, which saves memory but no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import check_choice
from offramp.errors import InputError

BITS = (4, 8)
ACTIVATIONS = ("int8", "bfloat16")
_ALIGNED = 64  # PyTorch's bf16 kernel reads past the end of rows that fill no vector


class QuantizedWeight(nn.Module):
    """Codes [rows, ...] and scales [rows]; `weight` is their product, made anew each time."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int) -> None:
        super().__init__()
        check_choice(bits=(bits, BITS))
        self.bits = bits
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(shape[0]))

    @property
    def weight(self) -> Tensor:
        return self.codes * self.scales.view(-1, *[1] * (self.codes.ndim - 1))


class QuantizedMatrix(QuantizedWeight):
    """Codes [out, in] with a fast product on a CPU; elsewhere `reference` serves, slowly.

    activations bfloat16: x is rounded to bf16 and meets the codes as they are; the quicker one up
    to about ten rows, so for streams and decode steps, and slower than float for hundreds. int8:
    each row of x becomes whole numbers by its own largest value; the quicker one for large
    matrices from ten rows up, so for whole utterances. Either way a row depends on no other row.
    """

    bias: Tensor | None

    def __init__(self, shape: tuple[int, int], bits: int, activations: str) -> None:
        super().__init__(shape, bits)
        check_choice(activations=(activations, ACTIVATIONS))
        self._whole = activations == "int8"
        self._padding = 0 if self._whole else -shape[1] % _ALIGNED
        self.register_buffer("_laid_out", None, persistent=False)
        self.register_buffer("_ones", None, persistent=False)
        self.lay_out()

    def lay_out(self) -> None:
        """Bring codes that were just made or loaded into the order that the kernel reads."""
        if self._whole:
            self.codes = self._laid_out = self.codes.t().contiguous().t()
            return
        self._laid_out = F.pad(self.codes, (0, self._padding))
        self.codes = self._laid_out[:, : self.codes.shape[1]]  # one memory for both
        # In the kernel's place for scales, which are bf16 there and would lose digits.
        self._ones = torch.ones_like(self.scales, dtype=torch.bfloat16)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device or dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.lay_out()
        return self

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out]. InputError: gradients were asked for."""
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("a quantised layer does not train; fine-tune first, quantise last")
        if not x.is_cpu:
            return self.reference(x)
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        # Looked up past nn.Module, whose way takes a tenth of a small product's time.
        held: dict[str, Any] = self._buffers
        bias = self.bias
        if self._whole:
            rows, own = _by_row(rows)
            y, factor = torch._int_mm(rows, held["_laid_out"].t()) * held["scales"], own
        else:
            rows = F.pad(rows.bfloat16(), (0, self._padding)) if self._padding else rows.bfloat16()
            y = torch._weight_int8pack_mm(rows.contiguous(), held["_laid_out"], held["_ones"])
            factor = held["scales"]
        y = (y * factor if bias is None else torch.addcmul(bias, y, factor)).to(x.dtype)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])

    def reference(self, x: Tensor) -> Tensor:
        """What `product` computes, but for the order of sums and the last rounding."""
        if self._whole:
            codes, scales = _by_row(x)
            rounded = codes.float() * scales
        else:
            rounded = x.bfloat16().float()
        return F.linear(rounded, self.weight, self.bias).to(x.dtype)


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (int8 codes [..., D], float32 scales [..., 1]); NaN in a row gives NaN."""
    scales = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scales = scales.clamp_(min=torch.finfo(torch.float32).tiny * 128).div_(127)
    return (x / scales).round_().to(torch.int8), scales


class QuantizedLinear(QuantizedMatrix):
    """y = x W^T + b for inference; activations: as in `QuantizedMatrix`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, activations: str
    ) -> None:
        super().__init__((out_features, in_features), bits, activations)
        self.in_features, self.out_features = in_features, out_features
        self.activations = activations
        self.bias = nn.Parameter(torch.zeros(out_features), False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class QuantizedEmbedding(QuantizedMatrix):
    """Rows of codes, each with its scale; the rows that are asked for become float32."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int) -> None:
        super().__init__((num_embeddings, embedding_dim), bits, "bfloat16")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bias = None

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes) * self.scales[tokens][..., None]

    def scores(self, h: Tensor) -> Tensor:
        """h [..., D] -> [..., V], where the un-embedding is tied to this."""
        return self.product(h)


class QuantizedConv1d(QuantizedWeight):
    """A convolution over time whose `weight` [out, in / groups, kernel] is made when it is read."""

    def __init__(
        self, shape: Sequence[int], bias: bool, bits: int, stride: int, padding: int, groups: int
    ) -> None:
        """shape: of the weight."""
        super().__init__(tuple(shape), bits)
        self.bias = nn.Parameter(torch.zeros(shape[0]), False) if bias else None
        self.kernel_size = (shape[2],)
        self.stride, self.padding, self.groups = (stride,), (padding,), groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
