"""Weights as they are stored, bit for bit: this is what sizes count and files hold.

A matrix is stored `dense`; or as a `bitmap`, one bit per weight, and the weights that are not
zero; or as `blocks`, one bit per block of 8 rows by 1 column, and the blocks that are not all
zero. Whichever takes the fewest bytes is taken, so zeros count only where they save. A vector is
stored `dense`, or as `half` where float16 holds all its numbers as well as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.compress.blocks import BLOCK
from offramp.compress.method import is_inside
from offramp.compress.quantized import QuantizedWeight

LAYOUTS = ("dense", "half", "bitmap", "blocks")


@dataclass(frozen=True)
class Packed:
    """values: those stored, in their shape where dense and whole; two of 4 bits share a byte, the
    first in the lower half. index: uint8, the bits of bitmap or blocks, first bit highest.
    """

    layout: str
    bits: int
    shape: tuple[int, ...]
    values: Tensor
    index: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)

    @property
    def is_plain(self) -> bool:
        """Whether `values` is the tensor itself."""
        return self.layout == "dense" and self.bits != 4


def pack(x: Tensor, bits: int | None = None) -> Packed:
    """x on the CPU; bits: 4 for int8 tensors of codes in [-8, 7], else as wide as its kind."""
    bits = bits or 8 * x.element_size()
    best = Packed("dense", bits, tuple(x.shape), _narrow(x, bits))
    if x.ndim < 2:
        exact = x.dtype == torch.float32 and torch.equal(x.half().float(), x)
        return Packed("half", 16, best.shape, x.half()) if exact else best
    kept = x.flatten(1) != 0
    blocks = _blocks(kept).any(2)
    counts = {
        "bitmap": (kept.numel(), kept.sum()),
        "blocks": (blocks.numel(), blocks.sum() * BLOCK),
    }
    sizes = {name: -(-n // 8) + -(-int(k) * bits // 8) for name, (n, k) in counts.items()}
    layout = min(sizes, key=sizes.__getitem__)
    if sizes[layout] >= best.nbytes:
        return best
    flat = x.flatten(1)
    values = flat[kept] if layout == "bitmap" else _blocks(flat)[blocks].flatten()
    index = _to_bits(kept if layout == "bitmap" else blocks)
    return Packed(layout, bits, best.shape, _narrow(values, bits), index)


def unpack(packed: Packed) -> Tensor:
    """The tensor that was packed. ValueError: the parts do not fit each other."""
    shape, bits = packed.shape, packed.bits
    if packed.layout in ("dense", "half"):
        if packed.index is not None:
            raise ValueError(f"it is {packed.layout}, and has an index")
        if packed.layout == "half" and packed.values.dtype != torch.float16:
            raise ValueError(f"it is half, and of {packed.values.dtype}")
        whole = _widen(packed.values, bits, prod(shape)).view(shape)
        return whole.float() if packed.layout == "half" else whole
    rows, columns = shape[0], prod(shape[1:])
    index_shape = (rows, columns)
    if packed.layout == "blocks":
        index_shape = (-(-rows // BLOCK), columns)
    if packed.index is None or packed.index.shape != (-(-prod(index_shape) // 8),):
        raise ValueError(f"its index does not fit the shape {list(shape)}")
    kept = _from_bits(packed.index, prod(index_shape)).view(index_shape)
    each = BLOCK if packed.layout == "blocks" else 1
    values = _widen(packed.values, bits, int(kept.sum()) * each)
    if packed.layout == "bitmap":
        flat = values.new_zeros(index_shape)
        flat[kept] = values
        return flat.view(shape)
    blocks = values.new_zeros((*index_shape, BLOCK))
    blocks[kept] = values.view(-1, BLOCK)
    return blocks.transpose(1, 2).flatten(0, 1)[:rows].reshape(shape).contiguous()


def pack_model(model: nn.Module) -> dict[str, Packed]:
    """Every tensor of the model's state by name, codes with their bits."""
    quantized = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedWeight)]
    bits = {f"{name}.codes": module.bits for name, module in quantized}
    return {
        name: pack(tensor.detach().to("cpu"), bits.get(name))
        for name, tensor in model.state_dict().items()
    }


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor is stored. nbytes: values and index together."""

    name: str
    shape: tuple[int, ...]
    bits: int
    layout: str
    nbytes: int


@dataclass(frozen=True)
class StoredSize:
    """All that a model, or some of its components, stores: weights, scales, indices, the rest."""

    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def of(self, components: Sequence[str]) -> StoredSize:
        """That of `components` alone, by dotted name; each tensor once."""
        return StoredSize(tuple(t for t in self.tensors if is_inside(t.name, components)))


def stored_size(model: nn.Module) -> StoredSize:
    """What `save_compressed` would write, to the byte, without the file's table of contents."""
    return StoredSize(
        tuple(
            StoredTensor(name, p.shape, p.bits, p.layout, p.nbytes)
            for name, p in pack_model(model).items()
        )
    )


def _blocks(x: Tensor) -> Tensor:
    """[rows, columns] -> [ceil(rows / 8), columns, 8]; missing rows are zero."""
    padded = F.pad(x, (0, 0, 0, -len(x) % BLOCK))
    return padded.view(-1, BLOCK, x.shape[1]).transpose(1, 2)


def _narrow(x: Tensor, bits: int) -> Tensor:
    if bits != 4:
        return x.contiguous()
    nibbles = F.pad(x.flatten(), (0, x.numel() % 2)).view(torch.uint8).view(-1, 2)
    return (nibbles[:, 0] & 15) | (nibbles[:, 1] << 4)


def _widen(values: Tensor, bits: int, count: int) -> Tensor:
    if values.numel() != (count if bits != 4 else -(-count // 2)):
        raise ValueError(f"it holds {values.numel()} values for {count} of {bits} bits")
    if bits != 4:
        return values
    both = torch.stack((values & 15, values >> 4), dim=1).flatten()[:count].view(torch.int8)
    return (both ^ 8) - 8  # the sign of 4 bits


def _to_bits(kept: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(kept.flatten().numpy()))


def _from_bits(index: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(index.numpy(), count=count)).bool()
