"""Layer dropout: the right rates, the same draw everywhere, and rows that really pass unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import toy
from offramp.errors import ConfigError
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.layer_dropout import depth_factor, draw_survivors, run_survivors, time_factor
from offramp.train.layerskip import forward_exits
from thinned import thinned

L, B, T = 5, 6, 9


# -- rates (LayerSkip, arXiv 2404.16710, section 4.1) ------------------------------------------


@pytest.mark.parametrize("num_layers", [2, 3, 12, 24, 32, 80])
def test_depth_factor_rises_from_0_to_1(num_layers: int) -> None:
    d = [depth_factor(i, num_layers) for i in range(num_layers)]
    assert (d[0], d[-1]) == (0.0, 1.0)
    assert d == sorted(set(d))
    assert d[1] == pytest.approx(math.exp(math.log(2) / (num_layers - 1)) - 1)


def test_a_tower_of_one_layer_drops_nothing() -> None:
    assert depth_factor(0, 1) == 0.0


@pytest.mark.parametrize("total", [2, 10, 50_000])
def test_time_factor_rises_from_0_to_1_from_scratch_and_is_1_otherwise(total: int) -> None:
    steps = [0, total // 3, total // 2, total - 1]
    exp = [time_factor(t, total, "exp") for t in steps]
    assert (exp[0], exp[-1]) == (0.0, 1.0)
    assert exp == sorted(exp)
    assert {time_factor(t, total, "constant") for t in steps} == {1.0}
    assert time_factor(total + 5, total, "exp") == 1.0


def test_time_factor_of_a_run_of_one_step_divides_by_nothing() -> None:
    assert time_factor(0, 1, "exp") == 1.0


@pytest.mark.parametrize(("num_layers", "p_max", "mean"), [(32, 0.1, 0.0445), (24, 0.2, 0.0890)])
def test_mean_dropout_is_the_papers(num_layers: int, p_max: float, mean: float) -> None:
    rates = [p_max * depth_factor(i, num_layers) for i in range(num_layers)]
    assert sum(rates) / num_layers == pytest.approx(mean, abs=5e-5)


@pytest.mark.parametrize("time", [1.0, 0.4])
def test_drop_counts_match_the_rates(time: float) -> None:
    steps, rows, p_max = 400, 50, 0.5
    drawn = torch.stack([draw_survivors(L, rows, p_max, time, 7, t) for t in range(steps)])
    dropped = (~drawn).float().mean(dim=(0, 2))
    for layer in range(L):
        p = time * depth_factor(layer, L) * p_max
        sigma = (p * (1 - p) / (steps * rows)) ** 0.5
        assert abs(float(dropped[layer]) - p) <= 4 * sigma
    together = (~drawn[:, -1] & ~drawn[:, -2]).float().mean()
    assert float(together) == pytest.approx(float(dropped[-1] * dropped[-2]), abs=0.01)


# -- the draw ----------------------------------------------------------------------------------


def test_the_draw_is_a_function_of_seed_and_step_alone() -> None:
    first = draw_survivors(L, B, 0.5, 1.0, seed=3, step=11)
    torch.manual_seed(99)  # another rank, another history
    state = torch.get_rng_state()
    draw_survivors(L, B, 0.5, 1.0, seed=3, step=10)
    assert torch.equal(draw_survivors(L, B, 0.5, 1.0, seed=3, step=11), first)
    assert torch.equal(torch.get_rng_state(), state), "it takes nothing from the global generator"
    others = [draw_survivors(L, B, 0.5, 1.0, s, t) for s, t in ((3, 12), (4, 11))]
    assert not any(torch.equal(other, first) for other in others)


def test_no_dropout_drops_nothing_and_the_first_layer_never_drops() -> None:
    for step in range(50):
        assert draw_survivors(L, B, 0.0, 1.0, 0, step).all()
        assert draw_survivors(L, B, 0.9, 0.0, 0, step).all()
        assert draw_survivors(L, B, 0.9, 1.0, 0, step)[0].all()


@pytest.mark.parametrize("p_max", [-0.1, 1.0])
def test_rates_out_of_range_are_refused(p_max: float) -> None:
    with pytest.raises(ConfigError, match=f"p_max is {p_max}"):
        draw_survivors(L, B, p_max, 1.0, 0, 0)


def test_an_unknown_time_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linear'; allowed: constant, exp"):
        time_factor(0, 10, "linear")


# -- rows that run and rows that do not --------------------------------------------------------


@pytest.mark.parametrize("alive", range(8))
def test_dropped_rows_pass_unchanged_and_survivors_run(alive: int) -> None:
    survivors = torch.tensor([bool(alive >> i & 1) for i in range(3)])
    h, calls = torch.randn(3, 2, 4), []

    def layer(x: Tensor, rows: Tensor | None) -> Tensor:
        calls.append(list(range(3)) if rows is None else rows.tolist())
        return x + 10.0

    out = run_survivors(layer, h, survivors)
    assert torch.equal(out[~survivors], h[~survivors])
    assert torch.equal(out[survivors], h[survivors] + 10.0), "no rescaling"
    assert calls == ([survivors.nonzero().flatten().tolist()] if alive else [])


def test_gradients_pass_dropped_rows_unchanged_and_survivors_through_the_layer() -> None:
    h = torch.randn(3, 2, 4, requires_grad=True)
    survivors = torch.tensor([True, False, True])
    run_survivors(lambda x, _: 3 * x, h, survivors).sum().backward()
    assert h.grad is not None
    assert h.grad[:, 0, 0].tolist() == [3.0, 1.0, 3.0]


def test_a_layer_in_lower_precision_keeps_the_dtype_of_the_stream() -> None:
    h = torch.randn(3, 2, 4)
    out = run_survivors(lambda x, _: x.bfloat16(), h, torch.tensor([True, False, True]))
    assert out.dtype == torch.float32


PACKED = torch.tensor([[0] * n + [1] * (T - n) for n in (9, 1, 4, 8, 2, 5)])


def by_hand(model: DecoderLM, ids: Tensor, alive: Tensor, segments: Tensor | None) -> Tensor:
    """One sample [1, T] through the layers that are alive for it."""
    h, view = model.embed(ids), model.view(T, segments)
    for i in range(L):
        if alive[i]:
            h = model.layer(i, h, view)
    return h


@pytest.mark.parametrize("packed", [False, True], ids=["one document per row", "packed"])
@pytest.mark.parametrize("changes", thinned(toy.VARIANTS, toy.KEPT))
def test_every_sample_equals_itself_alone(changes: dict, packed: bool) -> None:
    """Masks and positions of a packed row go with the row when others drop out of the batch."""
    model, ids = toy.decoder(**changes), toy.tokens(B, T)
    segments = PACKED if packed else None
    for step in range(3):
        survivors = draw_survivors(L, B, 0.9, 1.0, 0, step)
        hidden = forward_exits(model, ids, set(range(L)), survivors, segments)
        for i in range(1, L):
            dropped = ~survivors[i]
            assert torch.equal(hidden[i][dropped], hidden[i - 1][dropped])
        for row in range(B):
            one = slice(row, row + 1)
            own = None if segments is None else segments[one]
            alone = by_hand(model, ids[one], survivors[:, row], own)
            torch.testing.assert_close(hidden[L - 1][one], alone, rtol=0, atol=1e-5)


def test_samples_that_drop_nothing_equal_the_run_without_dropout() -> None:
    model, ids = toy.decoder(), toy.tokens(B, T)
    survivors = torch.ones(L, B, dtype=torch.bool)
    without = forward_exits(model, ids, {L - 1}, survivors, None)[L - 1]
    torch.testing.assert_close(without, toy.run(model, ids), rtol=0, atol=1e-5)
    survivors[2:, 1] = survivors[3, 4] = False
    h = forward_exits(model, ids, {L - 1}, survivors, None)[L - 1]
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(h[kept], without[kept], rtol=0, atol=1e-5)
    assert not torch.allclose(h[[1, 4]], without[[1, 4]])


def test_all_samples_dropped_is_a_layer_not_run() -> None:
    model, ids = toy.decoder(), toy.tokens(B, T)
    survivors = torch.ones(L, B, dtype=torch.bool)
    survivors[3] = False
    hidden = forward_exits(model, ids, {2, 3}, survivors, None)
    assert torch.equal(hidden[3], hidden[2])
