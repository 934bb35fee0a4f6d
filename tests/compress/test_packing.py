"""Bytes are those of hand computation; what was packed comes back bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offramp.compress.packing import Packed, pack, stored_size, unpack
from offramp.compress.quantize import WeightQuantization
from toy_compress import METHODS, MODELS


def sparse(shape: tuple[int, ...], zeros: float, block: int = 1, seed: int = 0) -> Tensor:
    """Floats of which, in groups of `block` rows, about a share `zeros` is zero."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape, generator=generator).flatten(1)
    groups = torch.rand(-(-len(flat) // block), flat.shape[1], generator=generator) >= zeros
    return (flat * groups.repeat_interleave(block, 0)[: len(flat)]).view(shape)


def codes(x: Tensor, top: int) -> Tensor:
    return (x * 3).round().clamp(-top, top).to(torch.int8)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (13, 7), (9, 4, 3), (64, 33), (3, 1)])
@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [1, 8])
def test_what_was_packed_comes_back(shape: tuple[int, ...], zeros: float, block: int) -> None:
    x = sparse(shape, zeros, block)
    for tensor, bits in ((x, 32), (x.half(), 16), (codes(x, 127), 8), (codes(x, 7), 4)):
        packed = pack(tensor, bits)
        assert torch.equal(unpack(packed), tensor)
        assert unpack(packed).dtype == tensor.dtype and unpack(packed).is_contiguous()
        assert packed.nbytes <= -(-tensor.numel() * bits // 8)


def test_bytes_by_hand() -> None:
    x = torch.ones(16, 10)
    assert (pack(x).layout, pack(x).nbytes) == ("dense", 16 * 10 * 4)
    x[::2, ::2] = x[1::2, 1::2] = 0.0  # every other weight: 80 are left
    assert (pack(x).layout, pack(x).nbytes) == ("bitmap", 16 * 10 // 8 + 80 * 4)
    ones = x.to(torch.int8)
    assert (pack(ones, 8).layout, pack(ones, 8).nbytes) == ("bitmap", 20 + 80)
    assert (pack(ones, 4).layout, pack(ones, 4).nbytes) == ("bitmap", 20 + 40)
    x = torch.ones(16, 10)
    x[8:, 3:] = 0.0  # 7 of 20 blocks
    assert (pack(x).layout, pack(x).nbytes) == ("blocks", 3 + 13 * 8 * 4)
    assert pack(x.to(torch.int8), 4).nbytes == 3 + 13 * 4
    few = torch.ones(16, 10, dtype=torch.int8)
    few[0, :10] = 0  # one bit for each would be more than these 10 bytes
    assert (pack(few, 8).layout, pack(few, 8).nbytes) == ("dense", 160)
    assert pack(torch.ones(3, 3, dtype=torch.int8), 4).nbytes == 5
    assert (pack(torch.zeros(5)).layout, pack(torch.zeros(5)).nbytes) == ("half", 10)
    third = torch.full((5,), 1 / 3)  # which 16 bits do not hold
    assert (pack(third).layout, pack(third).nbytes) == ("dense", 20)
    assert (pack(third.half()).layout, pack(third.half()).nbytes) == ("dense", 10)


def test_two_codes_share_a_byte_the_first_below() -> None:
    packed = pack(torch.tensor([[-7, 7], [1, -1]], dtype=torch.int8), 4)
    assert packed.values.tolist() == [0x79, 0xF1]
    packed = pack(torch.tensor([[3, 0, 0, 0, 0, 0, 0, 0, -2]] * 2, dtype=torch.int8), 4)
    assert packed.layout == "bitmap" and packed.index is not None
    assert packed.index.tolist() == [0x80, 0xC0, 0x40]
    assert packed.values.tolist() == [0xE3, 0xE3]


def test_parts_that_do_not_fit_are_refused() -> None:
    good = pack(sparse((16, 10), 0.7))
    assert good.layout == "bitmap" and good.index is not None
    wrong: list[Packed] = [
        replace(good, index=None),
        replace(good, index=good.index[:-1]),
        replace(good, values=good.values[:-1]),
        replace(good, shape=(16, 11)),
        replace(good, layout="dense"),
        replace(pack(torch.ones(4, 4)), index=good.index),
        replace(pack(torch.ones(3, 3, dtype=torch.int8), 4), shape=(3, 4)),
    ]
    for packed in wrong:
        with pytest.raises(ValueError, match=r"it holds|does not fit|has an index"):
            unpack(packed)


def test_a_model_counts_weights_scales_and_the_rest() -> None:
    model = MODELS["ctc, early-exit baseline"]()
    dense = stored_size(model)
    assert dense.nbytes == sum(t.nbytes for t in model.state_dict().values())
    up = "layers.0.first_feed_forward.up"
    assert dense.of([up]).nbytes == 4 * (24 * 16 + 24)
    for bits in (8, 4):
        size = stored_size(WeightQuantization(bits).apply(model)).of([up])
        assert size.nbytes == 24 * 16 * bits // 8 + 2 * 24 + 2 * 24  # codes, scales, biases
        assert {t.bits for t in size.tensors if t.name.endswith("codes")} == {bits}
    half = METHODS["magnitude"](model).apply(model)
    assert stored_size(half).of([up]).nbytes == 24 * 16 // 8 + 24 * 16 // 2 * 4 + 4 * 24
    assert stored_size(half).of([up, f"{up}.weight"]) == stored_size(half).of([up])
