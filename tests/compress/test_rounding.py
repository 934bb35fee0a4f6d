"""Codes are those of the plain least-squares rule, and outputs change less than by the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.compress.quantize import WeightQuantization
from offramp.compress.rounding import input_moments, rounded
from offramp.errors import InputError
from offramp.models.stored import nearest, row_scales


def heard(inputs: int, rows: int = 200, seed: int = 0) -> Tensor:
    """[rows, inputs] that depend on each other, as what layers hear does."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, inputs // 2, generator=generator)
    mixed = few @ torch.randn(inputs // 2, inputs, generator=generator)
    return mixed + 0.3 * torch.randn(rows, inputs, generator=generator)


def weights(out: int, inputs: int, zeros: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, inputs, generator=generator)
    return weight * (torch.rand(out, inputs, generator=generator) >= zeros)


def by_least_squares(weight: Tensor, scales: Tensor, bits: int, moments: Tensor) -> Tensor:
    """Of each row: round an input's weight, then find those still free anew, from the start."""
    most, n = 2 ** (bits - 1) - 1, len(moments)
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    order = moments.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for row, (own, unit) in enumerate(zip(weight.double(), scales.double(), strict=True)):
        now = own.clone()
        for at, i in enumerate(order):
            code = 0.0 if own[i] == 0 else float((now[i] / unit).round().clamp(-most, most))
            codes[row, i], now[i] = int(code), code * unit
            done, free = order[: at + 1], order[at + 1 :]
            if free:
                pull = moments[free][:, done] @ (now - own)[done]
                now[free] = own[free] - torch.linalg.solve(moments[free][:, free], pull)
    return codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_codes_are_those_of_least_squares(bits: int, zeros: float) -> None:
    weight, x = weights(5, 12, zeros), heard(12).double()
    scales = row_scales(weight, bits)
    expected = by_least_squares(weight, scales, bits, x.T @ x)
    assert torch.equal(rounded(weight, scales, bits, x.T @ x), expected)
    assert not expected[weight == 0].any()
    assert not torch.equal(expected, nearest(weight, scales))


def test_outputs_change_less_than_by_the_nearest() -> None:
    weight = weights(16, 32)
    scales = row_scales(weight, 4)
    x, unseen = heard(32, rows=400).double().split(200)

    def error(codes: Tensor) -> float:
        return float((unseen @ (codes * scales[:, None] - weight).double().T).square().mean())

    made = rounded(weight, scales, 4, x.T @ x)
    assert error(made) < 0.5 * error(nearest(weight, scales))
    assert torch.equal(rounded(weight, scales, 4, 4 * x.T @ x), made), "how long was heard is free"


def test_where_nothing_is_known_codes_are_the_nearest() -> None:
    weight = weights(6, 8)
    scales = row_scales(weight, 4)
    for moments in (torch.zeros(8, 8).double(), torch.eye(8).double()):
        assert torch.equal(rounded(weight, scales, 4, moments), nearest(weight, scales))
    x = heard(8).double()
    x[:, 3] = 0.0  # an input that is never heard
    found = rounded(weight, scales, 4, x.T @ x)
    assert torch.equal(found[:, 3], nearest(weight, scales)[:, 3])
    others = [0, 1, 2, 4, 5, 6, 7]
    moments = (x.T @ x)[others][:, others]
    moments += 0.01 * (x.square().sum() / 8 - moments.diagonal().mean()) * torch.eye(7)
    assert torch.equal(found[:, others], rounded(weight[:, others], scales, 4, moments))


def test_moments_are_of_all_that_was_heard_in_the_scope() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model.add_module("never", nn.Linear(2, 2))
    first, second = heard(4).view(2, 50, 8)[..., :4], heard(4, seed=1)
    model[0](first)
    with input_moments(model) as found:
        for x in (first, second):
            model[2](torch.relu(model[0](x)))
    model[0](first)
    assert set(found) == {"0", "2"}
    x = torch.cat((first.flatten(0, 1), second)).double()
    torch.testing.assert_close(found["0"], x.T @ x, rtol=1e-5, atol=1e-3)
    h = torch.relu(model[0](x.float())).double()
    torch.testing.assert_close(found["2"], (h.T @ h).detach(), rtol=1e-5, atol=1e-3)


def test_a_model_is_rounded_by_what_its_layers_hear() -> None:
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 40)).requires_grad_(False)
    x = heard(32)
    with input_moments(model) as moments:
        expected = model(x)
    plain = WeightQuantization(4).apply(model)
    made = WeightQuantization(4, moments=moments).apply(model)
    off = [float((m(x) - expected).square().mean()) for m in (made, plain)]
    assert off[0] < 0.7 * off[1]
    half = WeightQuantization(4, moments={"0": moments["0"]}).apply(model)
    assert torch.equal(half[0].codes, made[0].codes) and torch.equal(half[2].codes, plain[2].codes)
    with pytest.raises(InputError, match=r"0 \[24, 32\] has moments of 24 inputs; gather"):
        WeightQuantization(4, moments={"0": moments["2"]}).apply(model)
