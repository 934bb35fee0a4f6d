"""Codes are as near as they can be; kernels compute what the plain formula says, row by row."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy
from offramp.compress.method import modules_of
from offramp.compress.quantize import WeightQuantization, halved
from offramp.compress.quantized import (
    ACTIVATIONS,
    QuantizedConv1d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from offramp.errors import InputError
from offramp.models.stored import quantize
from toy_compress import MODELS, outputs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(linear: nn.Module, bits: int = 8, activations: str = "int8") -> nn.Module:
    model = nn.Sequential(linear.requires_grad_(False))
    return WeightQuantization(bits, activations).apply(model)[0]


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_codes_are_off_by_half_a_scale_at_most(bits: int, top: int) -> None:
    weight = random(9, 4, 5) * torch.logspace(-6, 6, 9)[:, None, None]
    weight[3] = 0.0
    weight[:, 2, 2] = 0.0
    codes, scales = quantize(weight, bits)
    error = (codes * scales[:, None, None] - weight).abs().flatten(1).amax(1)
    assert bool((error <= scales / 2 * 1.0001).all())
    largest = codes.abs().flatten(1).amax(1)
    assert largest.tolist() == [top] * 3 + [0] + [top] * 5
    assert not codes[:, 2, 2].any(), "zero stays zero"
    torch.testing.assert_close(scales[4] * top, weight[4].abs().max())


def test_more_bits_are_nearer() -> None:
    model = MODELS["ctc, ours"]()
    exact = outputs(model)
    errors = [
        float((outputs(WeightQuantization(bits, how).apply(model)) - exact).abs().mean())
        for bits, how in ((8, "bfloat16"), (8, "int8"), (4, "int8"))
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.05 < errors[2]


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (24, 33), (80, 64), (300, 192), (512, 501)])
def test_the_kernel_equals_the_formula(
    shape: tuple[int, int], bias: bool, activations: str
) -> None:
    layer = quantized(nn.Linear(*shape, bias=bias), activations=activations)
    if min(shape) == 1:  # codes and scale would take as much as one float
        return
    assert isinstance(layer, QuantizedLinear)
    for rows in (0, 1, 2, 5, 17, 70):
        x = random(2, rows, shape[0], seed=rows)
        fast, slow = layer(x), layer.reference(x)
        assert fast.shape == slow.shape and fast.dtype == torch.float32
        if rows == 0:
            continue
        tolerance = 1e-5 if activations == "int8" else 8e-3  # the kernel's result is bf16
        assert float((fast - slow).abs().max()) <= tolerance * float(slow.abs().max())
        float_result = F.linear(x, layer.weight, layer.bias)
        assert float((fast - float_result).norm() / float_result.norm()) < 0.02


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_row_depends_on_no_other_row(activations: str) -> None:
    layer = quantized(nn.Linear(48, 40), activations=activations)
    x = random(30, 48) * torch.logspace(-3, 3, 30)[:, None]
    whole = layer(x)
    for size in (1, 4, 7):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), whole)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_rows_of_zeros_and_nan_stay_by_themselves(activations: str) -> None:
    layer = quantized(nn.Linear(48, 40), activations=activations)
    x = random(3, 48)
    alone = layer(x[:1])
    x[1], x[2, 5] = 0.0, torch.nan
    y = layer(x)
    assert torch.equal(y[:1], alone)
    assert torch.equal(y[1], layer.bias)
    assert bool(y[2].isnan().all())


def test_codes_are_held_once_and_moved_with_the_layer() -> None:
    """Also where rows are filled up for the kernel: 300 is no multiple of 64."""
    layer, x = quantized(nn.Linear(300, 40), activations="bfloat16"), random(3, 300)
    for same in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to("cpu")):
        assert same.codes.shape == (40, 300)
        assert same.codes.untyped_storage().nbytes() == 40 * 320
        assert torch.equal(same(x), layer(x))
        before = same(x)
        same.codes.neg_()
        torch.testing.assert_close(same(x) - layer.bias, layer.bias - before)
        same.codes.neg_()
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [32, 64])
def test_an_embedding_scores_by_the_kernel(dim: int) -> None:
    table = quantized(nn.Embedding(61, dim))
    h = random(2, 5, dim)
    fast, slow = table.scores(h), F.linear(h.bfloat16().float(), table.weight)
    assert float((fast - slow).abs().max()) <= 8e-3 * float(slow.abs().max())
    assert torch.equal(table.scores(h[1, 3:4]), fast[1, 3:4])


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_reads_through_its_modules(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is made anew, at whatever exit; so every product has its kernel."""
    model = WeightQuantization(8).apply(toy.decoder(tied_embeddings=tied))
    head, h = (model.embedding if tied else model.unembedding), random(2, 3, 32)
    expected = F.linear(model.norm(h).bfloat16().float(), head.weight)
    monkeypatch.setattr(QuantizedWeight, "weight", property(lambda self: 1 / 0))
    for exit_layer in range(1, model.config.num_layers + 1):
        found = model.logits(h, exit_layer)
        assert float((found - expected).abs().max()) <= 8e-3 * float(expected.abs().max())
    assert toy.run(model, toy.tokens(2, 4)).dtype == model.dtype == torch.float32


def test_a_quantised_layer_does_not_train() -> None:
    layer = quantized(nn.Linear(8, 8))
    x = random(2, 8).requires_grad_()
    with pytest.raises(InputError, match="does not train; fine-tune first"):
        layer(x)
    with torch.no_grad():
        assert layer(x).isfinite().all()
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.slow
def test_embeddings_and_convolutions_read_what_their_weight_says() -> None:
    table = quantized(nn.Embedding(11, 24))
    assert isinstance(table, QuantizedEmbedding)
    tokens = torch.tensor([[1, 5], [10, 0]])
    assert torch.equal(table(tokens), F.embedding(tokens, table.weight))
    conv = nn.Conv1d(16, 8, 3, stride=2, padding=1, groups=4)
    small = quantized(conv)
    assert isinstance(small, QuantizedConv1d)
    x = random(2, 16, 9)
    weight = small.weight
    assert torch.equal(small(x), F.conv1d(x, weight, small.bias, 2, 1, groups=4))
    torch.testing.assert_close(weight, conv.weight, atol=2e-3, rtol=0)
    torch.testing.assert_close(small.bias, conv.bias, atol=3e-4, rtol=0)


def test_vectors_become_numbers_that_16_bits_hold_as_well() -> None:
    layer = quantized(nn.Linear(16, 8))
    for vector in (layer.bias, layer.scales):
        assert vector.dtype == torch.float32 and torch.equal(vector.half().float(), vector)
    wide = torch.tensor([1.0, 1e-3, 7e4])  # more than float16 holds
    assert torch.equal(halved(wide), wide)
    assert torch.equal(halved(torch.full((3,), 1e-8)), torch.full((3,), 1e-8))  # or less
    third = torch.tensor([1 / 3, 1e-9])
    assert torch.equal(halved(third), third.half().float())
    assert halved(torch.zeros(0)).shape == (0,)


def test_a_convolution_that_cannot_be_kept_is_refused() -> None:
    for how in ({"dilation": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}):
        with pytest.raises(InputError, match="cannot quantise Conv1d"):
            quantized(nn.Conv1d(16, 16, 3, **how))


def test_what_would_not_shrink_stays_as_it_is() -> None:
    kept = WeightQuantization(8).apply(nn.Sequential(nn.Linear(1, 4), nn.Linear(2, 4)))
    assert type(kept[0]) is nn.Linear
    assert type(kept[1]) is QuantizedLinear
    model = WeightQuantization(4).apply(MODELS["transducer, all together"]())
    assert not modules_of(model, (nn.Linear, nn.Embedding))


def median_us(calls: list[Callable[[], object]]) -> list[float]:
    """Of each call, taken in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(30):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(taken[5:]) for taken in times]


@pytest.mark.slow
@pytest.mark.parametrize(("activations", "rows"), [("bfloat16", 1), ("bfloat16", 5), ("int8", 20)])
def test_kernels_are_faster_than_float(activations: str, rows: int) -> None:
    """Over layers that, like a model's, do not all stay in the near cache: 16 MB as floats."""
    plain = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))).requires_grad_(False)
    fast, x = WeightQuantization(8, activations).apply(plain), random(rows, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        slow_us, fast_us = median_us([lambda: plain(x), lambda: fast(x)])
    finally:
        torch.set_num_threads(threads)
    assert fast_us < slow_us
