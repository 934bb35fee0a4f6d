"""Sensitivity curves: what is measured, once; laws that fit, and lines where they do not."""

from __future__ import annotations

import csv
import io
import logging
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp.compress.curves import Exponential, Lines, fit, fit_exponential, fit_lines
from offramp.compress.packing import stored_size
from offramp.compress.plan import Choice
from offramp.compress.sensitivity import (
    GRIDS,
    Grid,
    Increase,
    Point,
    SweepOptions,
    curves,
    points_csv,
    sweep,
    to_measure,
)
from offramp.errors import ConfigError, InputError
from toy_transducer import transducer

LEVELS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
GRID = Grid(("magnitude", "low_rank"), (0.3, 0.6, 0.9), (32, 8))


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "c"), [(0.1, 0.01, 3.0), (-0.02, 1e-4, 9.0), (0.0, 2.0, 0.1)])
def test_an_exponential_is_found_again(a: float, b: float, c: float) -> None:
    truth = Exponential(a, b, c)
    found = fit(LEVELS, [truth.at(x) for x in LEVELS])
    assert isinstance(found.law, Exponential) and found.residual < 1e-6
    assert found.law.c == pytest.approx(c, rel=1e-2)
    for x in (0.05, 0.55, 0.85):
        assert found.law.at(x) == pytest.approx(truth.at(x), abs=1e-5)


def test_no_other_exponential_is_nearer() -> None:
    """Least squares over a and b at many c, by a general solver."""
    draw = np.random.default_rng(0)
    for _ in range(10):
        x = np.array(LEVELS)
        y = 0.02 * np.exp(4 * x) + draw.normal(0, 0.02, len(x))
        found = fit_exponential(x, y)
        errors = []
        for c in np.geomspace(0.02, 50, 400):
            basis = np.stack((np.ones_like(x), np.exp(c * x)), axis=1)
            solved, *_ = np.linalg.lstsq(basis, y, rcond=None)
            if solved[1] >= 0:
                errors.append(float(np.square(basis @ solved - y).sum()))
        ours = sum((found.at(at) - value) ** 2 for at, value in zip(x, y, strict=True))
        assert ours <= min(errors) * (1 + 1e-4)
        assert found.b >= 0 and found.c > 0


def test_where_no_exponential_fits_lines_are_taken_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A WER that rises soon and then stays."""
    y = [0.0, 0.05, 0.4, 0.8, 0.95, 0.97, 0.98, 0.98, 0.99, 0.99]
    with caplog.at_level(logging.WARNING):
        found = fit(LEVELS, y, "encoder, rows, 8 bits")
    assert isinstance(found.law, Lines) and found.unseen > found.unseen_lines
    assert "encoder, rows, 8 bits: an exponential is off by" in caplog.text
    assert found.law.at(0.25) == pytest.approx(0.6) and found.residual == 0.0


def test_lines_never_fall() -> None:
    y = np.array([0.0, 0.3, 0.1, 0.2, 0.5, 0.4])
    found = fit_lines(np.arange(6.0), y)
    assert found.ys == pytest.approx((0.0, 0.2, 0.2, 0.2, 0.45, 0.45))
    draw = np.random.default_rng(1)
    for _ in range(20):
        y = draw.normal(size=9)
        ys = fit_lines(np.arange(9.0), y).ys
        assert all(low <= high for low, high in pairwise(ys))
        assert sum(ys) == pytest.approx(y.sum())


def test_few_points_make_lines(caplog: pytest.LogCaptureFixture) -> None:
    found = fit([0.0, 0.5, 1.0], [0.0, 0.1, 0.3])
    assert isinstance(found.law, Lines) and found.unseen is None
    assert "lines between 3 points" in caplog.text
    for xs, ys in (([0.0], [0.0]), ([0.0, 0.0], [0.0, 0.1]), ([0.0, 1.0], [0.1])):
        with pytest.raises(InputError, match="give at least 2 rising places"):
            fit(xs, ys)


# -- the sweep ---------------------------------------------------------------------------------


class Scale:
    """A WER that follows the bytes saved; counts how often it is asked."""

    def __init__(self, model: nn.Module) -> None:
        self.full, self.calls = stored_size(model).nbytes, 0

    def __call__(self, model: nn.Module) -> Increase:
        self.calls += 1
        value = 0.1 * (1 - stored_size(model).nbytes / self.full)
        return Increase(value, (value - 0.01, value + 0.01))


def test_every_choice_is_measured_on_a_model_that_is_really_so() -> None:
    model = transducer()
    measure = Scale(model)
    grids = {"joiner": GRID, "encoder": replace(GRID, methods=("feed_forward",))}
    points = list(sweep(model, grids, measure))
    assert len(points) == measure.calls == sum(len(grid.every) for grid in grids.values())
    assert len({(p.component, p.choice) for p in points}) == len(points)
    found = {(p.component, p.choice): p.increase.value for p in points}
    magnitude = [found["joiner", Choice("magnitude", level)] for level in GRID.levels]
    assert magnitude == sorted(magnitude) and magnitude[0] > 0
    small = [found["encoder", Choice("feed_forward", x, 8)] for x in GRID.levels]
    large = [found["encoder", Choice("feed_forward", x)] for x in GRID.levels]
    assert all(less > more for less, more in zip(small, large, strict=True))
    assert found["joiner", Choice(bits=8)] > 0 and ("joiner", Choice()) not in found


def test_ways_to_compute_are_measured_apart_and_have_curves_of_their_own() -> None:
    model = transducer()
    costs = {"int8": 0.02, "bfloat16": 0.01}

    def measure(small: Any) -> Increase:
        value = costs[small.joiner.tokens.activations]
        return Increase(value, (value, value))

    grid = Grid(("magnitude",), (0.3, 0.6), (32, 8), ("int8", "bfloat16"))
    kinds = [(c.bits, c.activations) for c in grid.every]
    assert kinds[:2] == [(8, "int8"), (8, "bfloat16")], "at level 0, not the model as it is"
    assert kinds[2:] == 2 * [(32, "bfloat16"), (8, "int8"), (8, "bfloat16")]
    points = list(sweep(model, {"joiner": replace(grid, bits=(8,))}, measure))
    made = {c.choice.activations: c for c in curves(points)}
    assert {name: c.at(0.45).value for name, c in made.items()} == pytest.approx(costs)
    assert {name: c.increases[0].value for name, c in made.items()} == costs
    rows = list(csv.DictReader(io.StringIO(points_csv(points, list(made.values())))))
    assert [float(r["fitted"]) for r in rows if r["fitted"]] == pytest.approx(2 * [0.02, 0.01])


def test_what_is_known_is_not_measured_again() -> None:
    """So an interrupted sweep goes on."""
    model = transducer()
    whole = list(sweep(model, {"joiner": GRID}, Scale(model)))
    measure, known = Scale(model), {(p.component, p.choice, p.finetuned): p.increase for p in whole}
    dropped = [key for key in known if key[1].method == "low_rank"][:2]
    for key in dropped:
        del known[key]
    assert to_measure({"joiner": GRID}, SweepOptions(known=known)) == 2
    again = list(sweep(model, {"joiner": GRID}, measure, SweepOptions(known=known)))
    assert again == whole and measure.calls == 2


def test_layers_are_listened_to_once_in_each_model_that_is_pruned_alike() -> None:
    """And codes follow what they hear."""
    model, heard = transducer(), []

    def gather(smaller: Any) -> dict[str, Tensor]:
        weight = smaller.joiner.tokens.weight
        heard.append(round(float((weight == 0).float().mean()), 1))
        draw = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
        return {"joiner.tokens": (draw.T @ draw).double()}

    made: dict[str, list[Tensor]] = {}

    def measure(name: str, small: Any) -> Increase:
        made.setdefault(name, []).append(small.joiner.tokens.weight.clone())
        return Increase(0.0, (0.0, 0.0))

    grids = {"joiner": Grid(("magnitude",), (0.3, 0.6), (32, 8, 4))}
    told = list(sweep(model, grids, partial(measure, "told"), SweepOptions(gather=gather)))
    assert heard == [0.0, 0.3, 0.6]
    plain = list(sweep(model, grids, partial(measure, "plain")))
    assert told == plain
    for point, ours, nearest in zip(told, made["told"], made["plain"], strict=True):
        assert torch.equal(ours, nearest) == (point.choice.bits == 32)
    options = SweepOptions(
        gather=gather, known={(p.component, p.choice, p.finetuned): p.increase for p in told}
    )
    assert list(sweep(model, grids, partial(measure, "again"), options)) == told
    assert heard == [0.0, 0.3, 0.6] and "again" not in made


def test_hopeless_levels_are_not_tried() -> None:
    model = transducer()
    costs = {0.3: 0.02, 0.6: 0.5, 0.9: 0.9}
    asked: list[float] = []

    def measure(small: Any) -> Increase:
        weight = small.joiner.tokens.weight
        level = round(float((weight == 0).float().mean()), 1)
        asked.append(level)
        return Increase(costs.get(level, 0.0), (0.0, 1.0))

    grid = Grid(("magnitude",), (0.3, 0.6, 0.9), (32, 8))
    points = list(sweep(model, {"joiner": grid}, measure, SweepOptions(stop_above=0.3)))
    assert [p.choice.level for p in points] == [0.0, 0.3, 0.3, 0.6, 0.6]
    assert 0.9 not in asked
    assert to_measure({"joiner": grid}, SweepOptions(stop_above=0.3)) == len(grid.every)
    known = {(p.component, p.choice, p.finetuned): p.increase for p in points}
    assert to_measure({"joiner": grid}, SweepOptions(stop_above=0.3, known=known)) == 0
    (plain,) = (c for c in curves(points) if c.choice.bits == 32)
    with pytest.raises(InputError, match=r"level is 0\.7; the curve of joiner was measured from 0"):
        plain.at(0.7)


def test_fine_tuning_comes_between_pruning_and_bits_once_for_all_bits() -> None:
    model = transducer()
    tuned: list[float] = []

    def finetune(small: Any) -> Any:
        tuned.append(float((small.joiner.tokens.weight == 0).float().mean()))
        return transducer(seed=7)

    seen: list[Any] = []

    def measure(small: Any) -> Increase:
        seen.append(small)
        return Increase(0.01 * len(seen), (0.0, 0.0))

    grid = Grid(("magnitude",), (0.3, 0.6), (32, 8))
    points = list(sweep(model, {"joiner": grid}, measure, SweepOptions(finetune)))
    assert [round(level, 1) for level in tuned] == [0.3, 0.6]
    assert [p.finetuned for p in points] == [False] + 2 * [False, False, True, True]
    both = [curves(points, finetuned=how) for how in (False, True)]
    assert all(len(c) == 2 for c in both)
    assert both[0][0].increases != both[1][0].increases
    assert both[0][1].increases[0] == both[1][1].increases[0], "bits alone are never fine-tuned"


def points_of(method: str, values: list[float], bits: int = 32) -> list[Point]:
    return [
        Point(
            "joiner",
            Choice(method if level else "none", level, bits),
            False,
            Increase(value, (value - 0.02, value + 0.02)),
        )
        for level, value in zip(LEVELS, values, strict=True)
        if level or bits < 32
    ]


def test_a_curve_starts_at_what_the_bits_alone_cost() -> None:
    truth = [0.01 * (math.exp(3 * x) - 1) for x in LEVELS]
    points = points_of("magnitude", truth) + points_of("magnitude", [v + 0.05 for v in truth], 4)
    four, full = curves(points)
    assert (four.choice.bits, full.choice.bits) == (4, 32)
    assert full.at(0.0).value == pytest.approx(0.0, abs=1e-6)
    assert four.at(0.0).value == pytest.approx(0.05, abs=1e-6)
    middle = full.at(0.45)
    assert middle.value == pytest.approx(0.01 * (math.exp(1.35) - 1), abs=1e-5)
    assert middle.half_width == pytest.approx(0.02, abs=1e-4)


def test_less_wer_than_before_is_noise() -> None:
    points = points_of("magnitude", [0.0] + [-0.004] * 5 + [0.0, 0.01, 0.05, 0.2])
    (curve,) = curves(points)
    values = [curve.at(x).value for x in LEVELS]
    assert min(values) == 0.0 and values == sorted(values)
    assert curve.at(0.5).half_width >= curve.fit.residual > 0


def test_a_table_has_what_was_measured_and_what_was_made_of_it() -> None:
    points = points_of("magnitude", [0.05 * x for x in LEVELS], 8)
    rows = list(csv.DictReader(io.StringIO(points_csv(points, curves(points)))))
    assert len(rows) == 10 and {row["component"] for row in rows} == {"joiner"}
    assert rows[0]["method"] == "none" and rows[0]["fitted"] == ""
    assert float(rows[5]["wer_increase"]) == 0.025 and rows[5]["form"] in ("exponential", "lines")
    assert float(rows[5]["fitted"]) == pytest.approx(0.025, abs=1e-3)
    assert rows[5]["bits"] == "8" and rows[5]["finetuned"] == "0"


def test_a_grid_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="method is 'prayer'; allowed: none, magnitude"):
        Grid(("prayer",))
    with pytest.raises(ConfigError, match="they must rise"):
        Grid(("magnitude",), (0.5, 0.3))
    with pytest.raises(ConfigError, match="level 0 is method 'none', and only that"):
        Grid(("magnitude",), (0.0, 0.3))
    with pytest.raises(ConfigError, match="bits is 7"):
        Grid(("magnitude",), bits=(7,))
    with pytest.raises(ConfigError, match="activations is 'fp8'; allowed: "):
        Grid(("magnitude",), activations=("fp8",))
    with pytest.raises(ConfigError, match="activations are empty; give at least one"):
        Grid(("magnitude",), activations=())
    assert GRIDS["encoder"].activations == ("int8", "bfloat16"), "one saves energy, one time"
    for name in ("feed_forward", "units_and_heads"):
        assert name in GRIDS["encoder"].methods, "only structure saves an encoder time"
    assert all(len(grid.levels) >= 8 for grid in GRIDS.values())
