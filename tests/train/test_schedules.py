"""Curricula, loss weights and learning rate against the figures of LayerSkip (arXiv 2404.16710)."""

from __future__ import annotations

import itertools
import math

import pytest

from offramp.errors import ConfigError
from offramp.train.schedules import (
    CURRICULA,
    ExitCurriculum,
    exit_scale,
    exit_weights,
    learning_rate,
)
from thinned import thinned

ROTATIONS = [(32, 8), (40, 39), (16, 8), (24, 23), (7, 3), (5, 5), (5, 9), (1, 1), (1, 4), (6, 1)]


@pytest.mark.parametrize("num_layers", [2, 3, 16, 32])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_exit_scale_is_the_papers_formula(num_layers: int, scale: float) -> None:
    e = [exit_scale(i, num_layers, scale) for i in range(num_layers)]
    last = num_layers - 1
    assert e[:last] == [pytest.approx(scale * sum(range(i + 1))) for i in range(last)]
    assert e[last] == pytest.approx(last + scale * sum(range(num_layers - 1)))
    assert num_layers == 1 or e[0] == 0.0


@pytest.mark.parametrize("kind", CURRICULA)
@pytest.mark.parametrize("num_layers", [1, 2, 3, 12])
@pytest.mark.parametrize("scale", thinned([0.0, 0.2, 1.0], keep=[0.2]))
@pytest.mark.parametrize("period", [1, 4, 12, 30])
def test_weights_sum_to_1_at_every_step(
    kind: str, num_layers: int, scale: float, period: int
) -> None:
    for total in (1, 7, 40):
        for step in range(total + 3):  # a little beyond the end, too
            curriculum = ExitCurriculum(kind, period)
            weights = exit_weights(step, total, num_layers, curriculum, scale)
            assert sum(weights.values()) == pytest.approx(1.0)
            assert all(w > 0.0 for w in weights.values())
            assert num_layers - 1 in weights, "the last layer always learns"
            assert set(weights) <= set(curriculum.enabled(step, total, num_layers))
            assert (0 in weights) == (num_layers == 1), "e(0) = 0"


@pytest.mark.parametrize(
    ("num_layers", "curriculum", "scale", "mean"),
    [
        (32, ExitCurriculum("rotational", 8), 0.2, 0.51),  # Llama2 7B
        (40, ExitCurriculum("rotational", 39), 0.1, 0.84),  # Llama2 13B
        (32, ExitCurriculum("rotational", 8), 0.1, 0.56),  # Llama3 8B
        (16, ExitCurriculum("rotational", 8), 0.1, 0.79),  # Llama3.2 1B
        (24, ExitCurriculum("rotational", 23), 0.2, 0.83),  # 1.5B from scratch
        (32, ExitCurriculum("rotational", 31), 0.2, 0.82),  # 7B from scratch
        (32, ExitCurriculum("rotational", 16), 1.0, 0.63),  # 7B, code
        (24, ExitCurriculum("all"), 1.0, 0.12),
    ],
)
def test_mean_weight_of_the_last_layer_is_the_references(
    num_layers: int, curriculum: ExitCurriculum, scale: float, mean: float
) -> None:
    steps = range(curriculum.period if curriculum.kind == "rotational" else 1)
    weights = [exit_weights(t, 100, num_layers, curriculum, scale)[num_layers - 1] for t in steps]
    assert sum(weights) / len(weights) == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize(("num_layers", "period"), ROTATIONS)
def test_rotation_enables_each_exit_once_per_period(num_layers: int, period: int) -> None:
    curriculum, last = ExitCurriculum("rotational", period), num_layers - 1
    for first in (0, 5):
        rounds = [curriculum.enabled(first + t, 1000, num_layers) for t in range(period)]
        for layer in range(last):
            assert sum(layer in enabled for enabled in rounds) == 1
        for enabled in rounds:
            rotating = [i for i in enabled if i != last]
            assert len(rotating) <= math.ceil(num_layers / period)
            assert enabled == sorted(set(enabled))
            assert last in enabled


def test_rotation_shifts_by_one_each_step() -> None:
    curriculum = ExitCurriculum("rotational", 4)
    assert curriculum.enabled(0, 100, 12) == [0, 4, 8, 11]
    assert curriculum.enabled(1, 100, 12) == [1, 5, 9, 11]
    assert curriculum.enabled(7, 100, 12) == [3, 7, 11]


@pytest.mark.parametrize("num_layers", [1, 2, 12, 24])
@pytest.mark.parametrize("total", [2, 10, 99, 5800])
def test_gradual_goes_from_the_last_layer_down_to_all_at_half_time(
    num_layers: int, total: int
) -> None:
    curriculum = ExitCurriculum("gradual")
    enabled = [curriculum.enabled(t, total, num_layers) for t in range(total)]
    assert enabled[0] == [num_layers - 1]
    assert all(e == list(range(num_layers)) for e in enabled[math.ceil(total / 2) :])
    assert all(e == list(range(e[0], num_layers)) for e in enabled)
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(enabled))
    if total >= 4 * num_layers:  # one more every T/(2L) steps
        sizes = [len(e) for e in enabled]
        assert all(
            sizes.count(n) in (total // (2 * num_layers), -(-total // (2 * num_layers)))
            for n in range(1, num_layers)
        )


def test_all_and_last_do_not_change_over_time() -> None:
    for step in (0, 3, 99):
        assert ExitCurriculum("all").enabled(step, 100, 6) == list(range(6))
        assert ExitCurriculum("last").enabled(step, 100, 6) == [5]


@pytest.mark.parametrize("kind", CURRICULA)
def test_naming_every_exit_is_naming_none(kind: str) -> None:
    named, unnamed = ExitCurriculum(kind, 3, exits=tuple(range(1, 12))), ExitCurriculum(kind, 3)
    for step in range(41):
        assert named.enabled(step, 40, 12) == unnamed.enabled(step, 40, 12)


def test_only_named_exits_and_the_last_take_part() -> None:
    exits = (2, 3, 4, 6)
    gradual = ExitCurriculum("gradual", exits=exits)
    assert [gradual.enabled(t, 40, 12) for t in (0, 4, 8, 12, 16, 39)] == [
        [11],
        [5, 11],
        [3, 5, 11],
        [2, 3, 5, 11],
        [1, 2, 3, 5, 11],
        [1, 2, 3, 5, 11],
    ]
    rotational = ExitCurriculum("rotational", 2, exits=exits)
    assert [rotational.enabled(t, 40, 12) for t in (0, 1)] == [[1, 3, 11], [2, 5, 11]]
    assert ExitCurriculum("all", exits=(12, 3)).enabled(0, 40, 12) == [2, 11]


def test_uniform_weights_favour_no_exit() -> None:
    curriculum = ExitCurriculum("all", exits=(2, 3, 4), weighting="uniform")
    weights = exit_weights(0, 40, 12, curriculum, early_exit_scale=0.25)
    assert weights == pytest.approx({1: 1 / 7, 2: 1 / 7, 3: 1 / 7, 11: 4 / 7})
    assert exit_weights(0, 40, 12, curriculum, early_exit_scale=0.0) == {11: 1.0}


def test_unknown_curricula_are_refused() -> None:
    with pytest.raises(ConfigError, match="'cubic'; allowed: quadratic, uniform"):
        ExitCurriculum(weighting="cubic")
    with pytest.raises(ConfigError, match="exits is 0; it must be a whole number of at least 1"):
        ExitCurriculum(exits=(4, 0))
    with pytest.raises(ConfigError, match=r"exits are \(13,\); each must be at most 12"):
        ExitCurriculum(exits=(13,)).enabled(0, 40, 12)
    with pytest.raises(ConfigError, match="'random'; allowed: rotational, gradual, all, last"):
        ExitCurriculum("random")
    with pytest.raises(ConfigError, match="period is 0; it must be a whole number of at least 1"):
        ExitCurriculum(period=0)


def test_learning_rate_warms_up_to_the_peak_and_decays_to_a_twentieth() -> None:
    rates = [learning_rate(t, 1000, 3e-3, 100) for t in range(1000)]
    assert rates[0] == pytest.approx(3e-5)
    assert max(rates) == pytest.approx(3e-3) == rates[99]
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(3e-3 / 20, rel=0.01)
    assert all(r > 0 for r in rates)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 0), (5, 5), (5, 50)])
def test_learning_rate_of_short_runs_is_finite(total: int, warmup: int) -> None:
    rates = [learning_rate(t, total, 1.0, warmup) for t in range(total)]
    assert all(0.0 < r <= 1.0 for r in rates)
