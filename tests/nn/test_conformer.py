"""The parts of a Conformer layer against the obvious computation, and their care for padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy_encoder
import toy_transducer
from offramp.nn.conformer import (
    ConformerLayer,
    ConvModule,
    Dropout,
    Frames,
    SelfAttention,
    attend,
    attend_fused,
    attend_plainly,
    sinusoids,
)
from offramp.nn.subsampling import Downsample, Halving, Subsampling, upsample

D = 16


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frames_of(lengths: list[int], rotary: bool = False) -> Frames:
    like = torch.zeros(1)
    return Frames.of(torch.tensor(lengths), max(lengths), 8 if rotary else None, like)


def module(kind: type[nn.Module], **changes: Any) -> Any:
    it = kind(toy_encoder.config(**changes))
    toy_encoder.randomize(it, 0)
    return it.requires_grad_(False).eval()


# -- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_plain_and_the_fused_attention_are_one(
    masked: bool, dtype: torch.dtype, error: float
) -> None:
    q, k, v = (random(2, 3, 9, 8, seed=s).to(dtype).requires_grad_() for s in range(3))
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])[:, None, None] if masked else None
    results = []
    for attention in (attend_fused, attend_plainly, attend):
        y = attention(q, k, v, mask)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=error, atol=error)


def test_attention_is_softmax_over_real_frames() -> None:
    it, x = module(SelfAttention), random(2, 7, D)
    found = it(x, frames_of([7, 4]))
    for row, n in enumerate((7, 4)):
        q, k, v = it.qkv(it.norm(x[row, :n])).view(n, 3, 2, 8).permute(1, 2, 0, 3)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), -1)
        y = (weights @ v).transpose(0, 1).reshape(n, D)
        close(found[row, :n], it.output(y))


def test_rotary_attention_sees_distances_only() -> None:
    """Shifted to later positions, the same frames see each other the same."""
    it, x = module(SelfAttention, positions="rotary"), random(1, 6, D)
    near, far = frames_of([6], rotary=True), frames_of([46], rotary=True)
    assert near.turns is not None and far.turns is not None
    later = Frames(near.lengths, None, (far.turns[0][:, 40:], far.turns[1][:, 40:]))
    close(it(x, later), it(x, near))
    assert not torch.allclose(it(x, Frames(near.lengths, None, None)), it(x, near), atol=1e-2)


def test_sinusoids_are_those_of_the_transformer_at_any_length() -> None:
    table = sinusoids(3000, 6, torch.zeros(1))
    for t in (0, 1, 2999):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-3)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-3)


# -- convolution -------------------------------------------------------------------------------


@pytest.mark.parametrize("conv_norm", ["batch", "layer"])
def test_the_convolution_module_is_its_steps(conv_norm: str) -> None:
    it, x = module(ConvModule, conv_norm=conv_norm), random(2, 9, D)
    y = F.glu(F.linear(it.norm(x), it.gated.weight, it.gated.bias), -1)
    y = it.depthwise(y.transpose(1, 2))
    y = it.inner_norm(y).transpose(1, 2) if conv_norm == "batch" else it.inner_norm(y.mT)
    close(it(x, frames_of([9, 9])), it.output(F.silu(y)))


@pytest.mark.parametrize("conv_norm", ["batch", "layer"])
def test_the_convolution_reads_zeros_where_there_is_padding(conv_norm: str) -> None:
    it, x = module(ConvModule, conv_norm=conv_norm), random(2, 9, D)
    found = it(x, frames_of([9, 6]))
    close(found[1, :6], it(x[1:, :6], frames_of([6]))[0])
    assert not torch.allclose(it(x, frames_of([9, 9]))[1, :6], found[1, :6], atol=1e-3)


def test_batch_norm_trains_on_the_statistics_of_real_frames() -> None:
    it = module(ConvModule).train()
    x, lengths = random(3, 9, D), [9, 6, 1]
    it.inner_norm.momentum = 1.0
    it(x, frames_of(lengths))
    y = F.glu(it.gated(it.norm(x)), -1)
    for row, n in enumerate(lengths):
        y[row, n:] = 0.0
    y = it.depthwise(y.transpose(1, 2)).transpose(1, 2)
    real = torch.cat([y[row, :n] for row, n in enumerate(lengths)])
    close(it.inner_norm.running_mean, real.mean(0))
    close(it.inner_norm.running_var, real.var(0))


def test_a_layer_is_its_modules_in_turn() -> None:
    it, x = module(ConformerLayer), random(2, 9, D)
    frames = frames_of([9, 5])
    y = x + it.first_feed_forward(x) / 2
    y = y + it.attention(y, frames)
    y = y + it.convolution(y, frames)
    y = y + it.second_feed_forward(y) / 2
    close(it(x, frames), F.layer_norm(y, (D,), it.norm.weight, it.norm.bias))
    half = it.first_feed_forward
    close(half(x), half.down(F.silu(half.up(half.norm(x)))))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    x, share = torch.ones(401, 503, requires_grad=True), round(256 * p) / 256
    share = min(255 / 256, max(1 / 256, share))
    torch.manual_seed(0)
    y = Dropout(p).train()(x)
    dropped = (y == 0).float()
    deviation = math.sqrt(share * (1 - share) / x.numel())
    assert abs(dropped.mean().item() - share) < 5 * deviation
    # No pattern over places: every byte of a word drops alike.
    columns = dropped.flatten()[: 401 * 503 // 8 * 8].view(-1, 8).mean(0)
    assert (columns - share).abs().max() < 5 * deviation * math.sqrt(8)
    assert y.max().item() == pytest.approx(1 / (1 - share))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)


def test_dropout_is_a_function_of_the_seed() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        y: Tensor = Dropout(0.3).train()(torch.ones(100))
        return y

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    x = random(9)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_dropout_acts_in_training_alone() -> None:
    it, x = module(ConformerLayer, dropout=0.5), random(1, 9, D)
    frames = frames_of([9])
    assert torch.equal(it(x, frames), it(x, frames))
    it.train()
    assert not torch.equal(it(x, frames), it(x, frames))


# -- masks -------------------------------------------------------------------------------------


def test_frames_follow_their_rows_and_lose_only_padding() -> None:
    frames = frames_of([5, 9, 3], rotary=True)
    some = frames.select(torch.tensor([2, 0])).trim(5)
    assert some.lengths.tolist() == [3, 5]
    assert some.real is not None
    assert some.real[:, :, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert some.turns is not None and frames.turns is not None
    assert torch.equal(some.turns[1], frames.turns[1][:, :5])
    assert frames.select(torch.tensor([2])).trim(3).real is None
    assert frames_of([4, 4]).real is None


@pytest.mark.parametrize(("factor", "expected"), [(1, [5, 8, 1]), (2, [3, 4, 1]), (3, [2, 3, 1])])
def test_a_lower_rate_has_the_true_frames_rounded_up(factor: int, expected: list[int]) -> None:
    frames = frames_of([5, 8, 1]).every(factor, None, torch.zeros(3, 8, D))
    assert frames.lengths.tolist() == expected
    assert frames.real is not None
    assert frames.real.shape == (3, max(expected), 1)
    assert frames.real.sum((1, 2)).tolist() == expected


# -- other rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 8, 9])
def test_down_then_up_gives_as_many_frames(learned: bool, factor: int, num_frames: int) -> None:
    x = random(2, num_frames, D)
    down = Downsample(factor, learned)
    y = down(x, None)
    assert y.shape == (2, -(-num_frames // factor), D)
    back = upsample(y, factor, num_frames)
    assert back.shape == x.shape
    if factor == 1:
        close(back, x)
    for t in range(num_frames):
        assert torch.equal(back[:, t], y[:, t // factor])


def test_the_pool_is_a_mean_weighted_by_place_over_real_frames() -> None:
    down, x = Downsample(2, True), random(2, 5, D)
    down.requires_grad_(False).scores.copy_(torch.tensor([0.3, -0.4]))
    w = torch.softmax(torch.tensor([0.3, -0.4]), 0)
    y = down(x, frames_of([5, 3]).real)
    close(y[0, 0], w[0] * x[0, 0] + w[1] * x[0, 1])
    close(y[0, 2], x[0, 4])
    close(y[1, 1], x[1, 2])
    assert torch.equal(y[1, 2], torch.zeros(D))
    close(Downsample(2, True)(x, None)[:, 0], x[:, :2].mean(1))
    assert torch.equal(Downsample(2, False)(x, None), x[:, ::2])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_halving_is_convolutions_of_stride_two(factor: int) -> None:
    it = Halving(toy_transducer.config(subsampling="halving", time_reduction=factor))
    x = random(2, 5 * factor + factor - 1, 8)
    expected = x.transpose(1, 2)
    for layer in it.layers:
        kernel = layer.weight.view(len(layer.weight), 3, -1).transpose(1, 2)
        expected = F.silu(F.conv1d(expected, kernel, layer.bias, stride=2))
    assert expected.shape == (2, 16, 5)
    close(it(x), expected.transpose(1, 2))


@pytest.mark.parametrize("subsampling", [2, 4, 8])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_subsampled_frames_read_no_padding(subsampling: int, activation: str) -> None:
    config = toy_encoder.config(subsampling=subsampling, subsampling_activation=activation)
    it = module(Subsampling, subsampling=subsampling, subsampling_activation=activation)
    x = random(1, 60, 8)
    for n in range(2 * subsampling - 1, 60):
        T = config.output_frames(n)
        assert it(x[:, :n]).shape == (1, T, D)
        spoiled = x.clone()
        spoiled[:, n:] = torch.nan
        close(it(spoiled)[:, :T], it(x[:, :n]))
    scaled = it(3 * x) - 3 * it(x)
    bias = it(torch.zeros_like(x))
    assert torch.allclose(scaled, -2 * bias, atol=1e-4) == (activation == "none")
