"""Layers whose weights are whole numbers, one scale per output channel, with kernels that pay.

A layer holds its codes as int8 in memory, also those of 4 bits; files hold two of these in a
byte (`packing.py`). The linear layer multiplies codes on a CPU; convolutions and embeddings
multiply codes by scales where they are read, which saves memory but no time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import check_choice
from offramp.errors import InputError

BITS = (4, 8)
ACTIVATIONS = ("int8", "bfloat16")
_ALIGNED = 64  # PyTorch's bf16 kernel reads past the end of rows that fill no vector


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight [rows, ...] -> (codes int8 of that shape, scales float32 [rows]), symmetric.

    Codes lie in [-127, 127] or [-7, 7]; the largest weight of a row is exact, the others are off
    by half a scale at most, and zero stays zero.
    """
    flat = weight.detach().float().flatten(1)
    largest = flat.abs().amax(1)
    scales = torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0)
    codes = (flat / scales[:, None]).round().to(torch.int8)
    return codes.view(weight.shape), scales


class QuantizedWeight(nn.Module):
    """Codes [rows, ...] and scales [rows]; `weight` is their product, made anew each time.

    A model that reads a weight itself, such as a decoder its un-embedding, gets no kernel.
    """

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


class QuantizedLinear(QuantizedWeight):
    """y = x W^T + b for inference, fast on a CPU.

    activations bfloat16: x is rounded to bf16 and meets the codes as they are; the quicker one up
    to about ten rows, so for streams and decode steps, and slower than float for hundreds. int8:
    each row of x becomes whole numbers by its own largest value; the quicker one for large
    matrices from ten rows up, so for whole utterances. Either way a row depends on no other row.
    Elsewhere than on a CPU `reference` computes the same, slowly.
    """

    _ones: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, activations: str
    ) -> None:
        super().__init__((out_features, in_features), bits)
        check_choice(activations=(activations, ACTIVATIONS))
        self.in_features, self.out_features = in_features, out_features
        self.activations = activations
        self.bias = nn.Parameter(torch.zeros(out_features), False) if bias else None
        self.register_buffer("_ones", None, persistent=False)
        self.lay_out()

    def lay_out(self) -> None:
        """Bring codes that were just made or loaded into the order that the kernel reads."""
        if self.activations == "int8":
            self.codes = self.codes.t().contiguous().t()
        else:
            # In the kernel's place for scales, which are bf16 there and would lose digits.
            self._ones = torch.ones_like(self.scales, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("a quantised layer does not train; fine-tune first, quantise last")
        if x.device.type != "cpu":
            return self.reference(x)
        rows = x.reshape(-1, self.in_features)
        y = self._int8(rows) if self.activations == "int8" else self._bfloat16(rows)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """What `forward` computes, but for the order of sums and the last rounding."""
        if self.activations == "int8":
            codes, scales = _by_row(x)
            x = codes.float() * scales
        else:
            x = x.bfloat16().float()
        return F.linear(x, self.weight, self.bias)

    def _int8(self, x: Tensor) -> Tensor:
        codes, scales = _by_row(x)
        y = torch._int_mm(codes, self.codes.t()) * self.scales
        return y * scales if self.bias is None else torch.addcmul(self.bias, y, scales)

    def _bfloat16(self, x: Tensor) -> Tensor:
        x, codes = x.bfloat16(), self.codes
        if extra := -self.in_features % _ALIGNED:
            x, codes = F.pad(x, (0, extra)), F.pad(codes, (0, extra))
        assert self._ones is not None, "lay_out makes it"
        y = torch._weight_int8pack_mm(x.contiguous(), codes, self._ones).float()
        return y * self.scales if self.bias is None else torch.addcmul(self.bias, y, self.scales)


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (int8 codes [..., D], float32 scales [..., 1]); NaN in a row gives NaN."""
    scales = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scales = scales.clamp_(min=torch.finfo(torch.float32).tiny * 128).div_(127)
    return (x / scales).round_().to(torch.int8), scales


class QuantizedEmbedding(QuantizedWeight):
    """Rows of codes, each with its scale; the rows that are asked for become float32."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int) -> None:
        super().__init__((num_embeddings, embedding_dim), bits)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codes) * self.scales[tokens][..., None]


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
