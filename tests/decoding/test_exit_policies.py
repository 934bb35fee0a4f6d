"""Every policy: what it scores, its extremes, padding, and cost that grows with the threshold."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.decoding.ctc import Hypothesis, greedy
from offramp.decoding.early_exit_ctc import EarlyExitOptions, early_exit
from offramp.decoding.exit_policies import (
    Agreement,
    AnyOf,
    Budget,
    Confidence,
    Decision,
    ExitPolicy,
    ExitTest,
    FixedExit,
    FrameEntropy,
    edit_distance,
    likeness,
)
from offramp.errors import ConfigError, InputError
from toy_ctc import ToyTower, batch

LENGTHS = [31, 8, 22, 40, 17, 3, 26, 35]


def at_exit(
    log_probs: Tensor, lengths: list[int], *earlier: list[tuple[int, ...]], blank_id: int = 0
) -> ExitTest:
    """A test of exit 4 of 2, 4, 6; earlier: the tokens that each row wrote before."""
    rows = torch.tensor(lengths)
    before = [[Hypothesis(t, (), 0.0, ()) for t in trail] for trail in earlier]
    trails = [
        [*b, h]
        for b, h in zip(
            before or [[] for _ in lengths], greedy(log_probs, rows, blank_id), strict=True
        )
    ]
    return ExitTest(4, 6, log_probs, rows, trails, [0.0] * len(lengths), blank_id)


def scores(policy: ExitPolicy, test: ExitTest) -> list[float]:
    found = [d.score for d in policy.decide(test)]
    assert None not in found
    return [s for s in found if s is not None]


def exits_taken(policy: ExitPolicy, exits: Sequence[int] = ToyTower.exits) -> list[int]:
    return [r.exit_layer for r in early_exit(ToyTower(), exits, *batch(LENGTHS), policy)]


# -- scores ------------------------------------------------------------------------------------


def test_entropy_is_0_for_one_hot_and_log_v_for_uniform() -> None:
    one_hot = torch.full((1, 5, 8), -math.inf)
    one_hot[0, range(5), [0, 3, 3, 7, 0]] = 0.0
    uniform = torch.full((1, 5, 8), -math.log(8))
    test = at_exit(torch.cat((one_hot, uniform)), [5, 5])
    assert scores(FrameEntropy(), test) == pytest.approx([0.0, -math.log(8)], abs=1e-6)


def test_entropy_is_the_mean_over_frames() -> None:
    grid = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()[None]
    want = [math.log(2), -sum(p * math.log(p) for p in (0.2, 0.3, 0.5))]
    assert scores(FrameEntropy(), at_exit(grid, [2])) == pytest.approx([-sum(want) / 2])


def test_confidence_leaves_blank_frames_out() -> None:
    grid = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]).log()[None]
    assert scores(Confidence(), at_exit(grid, [3])) == pytest.approx([math.sqrt(0.8 * 0.4)])
    other = at_exit(grid, [3], blank_id=1)
    assert scores(Confidence(), other) == pytest.approx([math.sqrt(0.5 * 0.4)])


def test_an_output_that_is_all_blank_is_not_confident() -> None:
    grid = torch.tensor([[0.98, 0.01, 0.01]] * 4).log()[None]
    assert scores(Confidence(), at_exit(grid, [4])) == [0.0]


def test_no_frames_are_certain_and_say_nothing() -> None:
    test = at_exit(torch.zeros(1, 3, 4).log_softmax(-1), [0])
    assert scores(FrameEntropy(), test) == [0.0]
    assert scores(Confidence(), test) == [0.0]


def test_agreement_is_the_likeness_of_the_last_two_texts() -> None:
    path = [[1, 2, 0, 3, 3]] * 4
    grid = torch.full((4, 5, 4), -9.0)
    for row, ids in zip(grid, path, strict=True):
        row[range(5), ids] = -0.01
    test = at_exit(grid, [5] * 4, [], [(1, 2, 3)], [(1, 2)], [(1, 2, 3), (3, 2, 1)])
    assert scores(Agreement(), test) == pytest.approx([0.0, 1.0, 2 / 3, 1 / 3])
    assert [d.leave for d in Agreement().decide(test)] == [False, True, False, False]
    assert [d.leave for d in Agreement(0.6).decide(test)] == [False, True, True, False]


def test_patience_asks_for_more_agreeing_exits() -> None:
    grid = torch.full((3, 2, 3), -9.0)
    grid[:, 0, 1] = grid[:, 1, 2] = -0.01
    test = at_exit(grid, [2] * 3, [(1, 2)], [(1,), (1, 2)], [(1, 2), (1, 2)])
    assert scores(Agreement(patience=1), test) == [1.0, 1.0, 1.0]
    assert scores(Agreement(patience=2), test) == [0.0, 0.5, 1.0]
    assert scores(Agreement(patience=3), test) == [0.0, 0.0, 0.0]


def test_exits_that_all_wrote_nothing_do_not_agree() -> None:
    grid = torch.tensor([[0.9, 0.1]] * 4).log()[None]
    assert scores(Agreement(), at_exit(grid, [4], [(), ()])) == [0.0]


def recursive_distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """By definition."""

    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        change = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, change)

    return distance(len(a), len(b))


def test_edit_distance_is_that_of_the_definition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        a, b = (tuple(draw.choices(range(3), k=draw.randrange(8))) for _ in range(2))
        assert edit_distance(a, b) == recursive_distance(a, b)
        assert 0.0 <= likeness(a, b) == likeness(b, a) <= 1.0
    assert likeness((1, 2), (1, 2)) == 1.0


# -- laws of every rule ------------------------------------------------------------------------

RULES: dict[str, Callable[[float], ExitPolicy]] = {
    "entropy": FrameEntropy,
    "confidence": Confidence,
    "agreement": Agreement,
    "patience": lambda threshold: Agreement(threshold, patience=2),
}
# From "leave at once" to "never leave early".
EXTREMES = {
    "entropy": (math.inf, -1e-9),
    "confidence": (0.0, 1.0000001),
    "agreement": (0.0, 1.0000001),
    "patience": (0.0, 1.0000001),
}


@pytest.mark.parametrize("name", RULES)
def test_extreme_thresholds_give_the_first_and_the_last_exit(name: str) -> None:
    first, last = EXTREMES[name]
    assert exits_taken(RULES[name](first)) == [2] * len(LENGTHS)
    assert exits_taken(RULES[name](last)) == [6] * len(LENGTHS)


@pytest.mark.parametrize("name", RULES)
def test_depth_is_monotone_in_the_threshold_for_each_utterance(name: str) -> None:
    first, last = EXTREMES[name]
    grid = [first, *torch.linspace(min(first, 2.0), last, 15).tolist(), last]
    taken = [exits_taken(RULES[name](threshold), range(1, 7)) for threshold in grid]
    for before, after in itertools.pairwise(taken):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert len({tuple(t) for t in taken}) > 2, "some thresholds must lie between the extremes"


@pytest.mark.parametrize("garbage", [0.0, math.nan, -math.inf])
@pytest.mark.parametrize("name", RULES)
def test_padded_frames_do_not_matter(name: str, garbage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = (3 * torch.randn(4, 9, 5, generator=generator)).log_softmax(-1)
    lengths = [9, 4, 1, 6]
    earlier: list[list[tuple[int, ...]]] = [[(1, 2)], [(3,)], [()], [(1,)]]
    want = RULES[name](0.5).decide(at_exit(grid, lengths, *earlier))
    alone = [
        RULES[name](0.5).decide(at_exit(grid[i : i + 1, :n], [n], earlier[i]))[0]
        for i, n in enumerate(lengths)
    ]
    for row, n in zip(grid, lengths, strict=True):
        row[n:] = garbage
    assert RULES[name](0.5).decide(at_exit(grid, lengths, *earlier)) == want
    for a, w in zip(alone, want, strict=True):
        assert a.leave == w.leave
        assert a.score == pytest.approx(w.score)


@pytest.mark.parametrize("name", RULES)
def test_a_score_that_reaches_the_threshold_leaves(name: str) -> None:
    grid = torch.randn(5, 9, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    test = at_exit(grid, [9] * 5, *([[(1, 2, 3), (1, 2, 4)]] * 5))
    for row, score in enumerate(scores(RULES[name](0.5), test)):
        sign = -1.0 if name == "entropy" else 1.0
        exact = RULES[name](sign * score).decide(test)[row]
        above = RULES[name](sign * math.nextafter(score, math.inf)).decide(test)[row]
        assert (exact.leave, above.leave) == (True, False)


# -- fixed, budget, any of ---------------------------------------------------------------------


@pytest.mark.parametrize("exit_layer", [2, 4, 6])
def test_a_fixed_exit_reads_no_other_head(exit_layer: int) -> None:
    tower = ToyTower()
    results = early_exit(tower, tower.exits, *batch(LENGTHS), FixedExit(exit_layer))
    assert [r.exit_layer for r in results] == [exit_layer] * len(LENGTHS)
    assert tower.heads == [exit_layer]
    assert [run[:2] for run in tower.runs] == [(0, exit_layer)]


def test_the_default_fixed_exit_is_the_last() -> None:
    assert FixedExit().tested((2, 4, 6)) == (6,)


def test_a_layer_without_an_exit_is_refused() -> None:
    with pytest.raises(InputError, match="exit layer is 3; this model has exits at 2, 4, 6"):
        exits_taken(FixedExit(3))


def by_frames(start: int, stop: int, frames: int) -> float:
    """Unlike layers: 1 per frame for the lower four, 3 for the upper two, 5 to begin with."""
    layers = sum(3.0 if layer >= 4 else 1.0 for layer in range(start, stop))
    return frames * layers + (5.0 if start == 0 else 0.0)


@pytest.mark.parametrize("limit", [0.0, 30.0, 45.0, 90.0, 1000.0])
def test_a_budget_is_kept_and_used(limit: float) -> None:
    tower, policy = ToyTower(), Budget(limit, by_frames)
    options = EarlyExitOptions(cost=by_frames)
    results = early_exit(tower, tower.exits, *batch(LENGTHS), policy, options)
    segments = list(itertools.pairwise((0, *tower.exits)))
    for r in results:
        costs = list(itertools.accumulate(by_frames(*s, r.frames) for s in segments))
        affordable = [e for e, c in zip(tower.exits, costs, strict=True) if c <= limit]
        assert r.exit_layer == (affordable[-1] if affordable else 2)
        assert r.spent == costs[tower.exits.index(r.exit_layer)]
        assert r.spent <= limit or r.exit_layer == 2
        assert r.hypothesis == r.trail[-1].hypothesis


def test_budgets_cut_the_batch_unevenly() -> None:
    taken = set()
    for limit in (0.0, 45.0, 90.0):
        policy = Budget(limit, by_frames)
        tower = ToyTower()
        options = EarlyExitOptions(cost=by_frames)
        results = early_exit(tower, tower.exits, *batch(LENGTHS), policy, options)
        taken.add(tuple(r.exit_layer for r in results))
    assert len(taken) == 3
    assert any(len(set(t)) == 3 for t in taken)


@pytest.mark.parametrize(
    ("limit", "exit_layer"), [(10.5, 2), (11.0, 4), (20.9, 4), (21.0, 6), (99.0, 6)]
)
def test_a_budget_counts_what_the_clock_says(limit: float, exit_layer: int) -> None:
    """It shows 10, 20 and 30 ms at the exits, though a segment should have taken 1."""
    clock = iter((10.0, 20.0, 30.0))
    options = EarlyExitOptions(cost=by_frames, stopwatch=lambda: next(clock))
    tower, policy = ToyTower(), Budget(limit, lambda start, stop, frames: 1.0)
    results = early_exit(tower, tower.exits, *batch([8, 5]), policy, options)
    assert [r.exit_layer for r in results] == [exit_layer] * 2
    assert [r.spent for r in results] == [5.0 * exit_layer] * 2


def test_any_of_leaves_when_the_first_rule_does() -> None:
    sure, cheap = Confidence(0.6), Budget(90.0, by_frames)
    both = AnyOf((sure, cheap))
    tower, options = ToyTower(), EarlyExitOptions(cost=by_frames)
    taken = {}
    for policy in (sure, cheap, both):
        results = early_exit(tower, tower.exits, *batch(LENGTHS), policy, options)
        taken[policy] = [r.exit_layer for r in results]
    assert taken[both] == [min(pair) for pair in zip(taken[sure], taken[cheap], strict=True)]
    assert taken[both] not in (taken[sure], taken[cheap])
    assert all(t.score is not None for r in results for t in r.trail)


def test_any_of_tests_what_any_of_them_tests() -> None:
    exits = (2, 4, 6, 8)
    assert AnyOf((FixedExit(4), FixedExit(8))).tested(exits) == (4, 8)
    assert AnyOf((FixedExit(4), Confidence())).tested(exits) == exits
    test = at_exit(torch.zeros(1, 2, 3).log_softmax(-1), [2])
    assert AnyOf((FixedExit(4), Budget(9.0, by_frames))).decide(test) == [Decision(True)]


@pytest.mark.parametrize("fixed", [2, 4, 6, None])
def test_a_fixed_exit_leaves_there_whatever_else_is_tested(fixed: int | None) -> None:
    """A budget that allows all and a rule that never leaves look at exits before it."""
    for other in (Budget(math.inf, by_frames), Confidence(1.1)):
        for policies in ((FixedExit(fixed), other), (other, FixedExit(fixed))):
            assert set(exits_taken(AnyOf(policies))) == {fixed or ToyTower.exits[-1]}


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FrameEntropy, Confidence, Agreement])
def test_at_score_leaves_where_the_score_is_at_least_that(kind: Any) -> None:
    exits = ToyTower.exits
    never = early_exit(ToyTower(), exits, *batch(LENGTHS), kind.at_score(math.inf))
    found = [[t.score for t in result.trail if t.score is not None] for result in never]
    assert all(len(own) == len(exits) for own in found)
    limit = sorted(max(own[:-1]) for own in found)[len(found) // 2]
    want = [
        next((e for e, s in zip(exits, own, strict=True) if s >= limit), exits[-1]) for own in found
    ]
    assert exits_taken(kind.at_score(limit), exits) == want
    assert len(set(want)) > 1


@pytest.mark.parametrize("rule", [FrameEntropy, Confidence, Agreement])
def test_a_threshold_is_a_number(rule: Callable[[float], ExitPolicy]) -> None:
    with pytest.raises(InputError, match="threshold is nan; it must be a number"):
        rule(math.nan)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="patience is 0"):
        Agreement(patience=0)
    for limit in (-1.0, math.nan):
        with pytest.raises(InputError, match=f"limit is {limit}; it must be at least 0"):
            Budget(limit, by_frames)
    with pytest.raises(InputError, match="AnyOf was given no policies"):
        AnyOf(())
