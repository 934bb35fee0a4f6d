"""The planner: as good as trying all, within its budget, and honest about what cannot be met."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from offramp.compress import planner
from offramp.compress.plan import Choice, CompressionPlan
from offramp.compress.planner import front, solve, solve_by_trying_all
from offramp.compress.problem import Budget, Candidate, Problem, undominated
from offramp.energy.placement import Part
from offramp.errors import InputError
from thinned import thinned
from toy_plans import NAMES, alike, drawn, increase


def figures(problem: Problem, plan: CompressionPlan) -> tuple[float, float, int]:
    mj = plan.modelled_mj_per_audio_s
    ratio = max(mj[name] / problem.dense_mj[name] for name in mj)
    return ratio, plan.wer_increase, plan.stored_bytes


@pytest.mark.parametrize("seed", thinned(range(6), keep=(1, 4)))
def test_no_other_plan_is_better(seed: int) -> None:
    problem = drawn(seed).only(lambda _, c: c.bits < 32 and c.level != 0.5)
    budgets = [Budget(limit) for limit in (0.004, 0.015, 0.1)]
    middle = max(solve(problem, budgets[1]).modelled_mj_per_audio_s.values())
    for budget in (*budgets, Budget(None, middle), Budget(None, 1.1 * middle)):
        plan = solve(problem, budget)
        assert figures(problem, plan) == figures(problem, solve_by_trying_all(problem, budget))
        if budget.max_wer_increase is not None:
            assert plan.wer_increase <= budget.max_wer_increase + 1e-12
        else:
            assert max(plan.modelled_mj_per_audio_s.values()) <= budget.max_mj_per_audio_s


def test_few_combinations_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, placed = drawn(0), []
    outcome = Problem.outcome
    monkeypatch.setattr(Problem, "outcome", lambda self, *a: placed.append(a) or outcome(self, *a))
    solve(problem, Budget(0.02))
    assert len(placed) < len(list(problem.picks())) / 10


def test_a_bound_is_never_above_what_is_bounded() -> None:
    problem = drawn(3)
    for setting in (0, 1):
        everything = [range(len(some)) for some in problem.candidates.values()]
        increases, ratios, tops = planner._bounds(problem, setting, everything)
        for pick in list(problem.picks())[::53]:
            if pick.setting == setting:
                found = problem.outcome(pick)
                assert increases[pick.candidates] == found.increase
                assert ratios[pick.candidates] <= found.ratio
                assert tops[pick.candidates] <= max(found.mj_per_audio_s.values())


def test_what_another_candidate_matches_in_all_is_left_out() -> None:
    rows = [[2, 2], [1, 3], [3, 1], [2, 2], [2, 3], [3, 3], [1, 4], [4, 1]]
    assert undominated(np.array(rows, float)) == [0, 1, 2]


def test_equal_sensitivities_give_equal_levels() -> None:
    """What convex costs make best; and the same for every order of the components."""

    def cost(level: float) -> float:
        return 0.01 * (math.exp(3 * level) - 1)

    problem = alike(cost)
    for level in (0.2, 0.4, 0.6, 0.8):
        plan = solve(problem, Budget(3 * cost(level)))
        assert plan.choices == dict.fromkeys(NAMES, Choice("magnitude", level))
        turned = replace(problem, candidates=dict(reversed(problem.candidates.items())))
        assert solve(turned, Budget(3 * cost(level))).choices == plan.choices


def test_a_plan_says_what_it_predicts() -> None:
    problem = drawn(1)
    plan = solve(problem, Budget(0.02))
    assert plan.made_by == "exact" and plan.model == "toy"
    assert set(plan.choices) == set(NAMES), "the blank's scorer is not chosen"
    parts = [next(c for c in problem.candidates[n] if c.choice == plan.choices[n]) for n in NAMES]
    setting = next(s for s in problem.settings if s.chunk_ms == plan.chunk_ms)
    assert plan.wer_increase == pytest.approx(
        setting.increase.value + sum(c.increase.value for c in parts)
    )
    assert plan.wer == pytest.approx(0.2 + plan.wer_increase)
    low, high = plan.wer_increase_ci95
    assert high - low == pytest.approx(2 * 0.001 * math.sqrt(5)), "independent errors"
    assert plan.stored_bytes == 3 + sum(c.stored_bytes for c in parts)
    assert list(plan.placements) == list(plan.modelled_mj_per_audio_s) == ["small", "large"]


def test_no_profile_pays_for_the_gain_of_another() -> None:
    """The worst ratio counts; a named profile alone may be had for less."""
    problem = drawn(2)
    both = solve(problem, Budget(0.02)).modelled_mj_per_audio_s
    for profile in problem.profiles:
        alone = solve(replace(problem, profiles=(profile,)), Budget(0.02))
        assert alone.modelled_mj_per_audio_s[profile.name] <= both[profile.name]


def test_fewer_candidates_are_against_the_same_model() -> None:
    problem = drawn(4)
    bytes8 = problem.only(lambda _, c: c.bits == 8, lambda s: s.chunk_ms == 320.0)
    plan = solve(bytes8, Budget(0.03))
    assert {c.bits for c in plan.choices.values()} == {8} and plan.chunk_ms == 320.0
    assert bytes8.dense_mj == problem.dense_mj
    free = solve(problem, Budget(0.03))
    assert figures(problem, free) <= figures(problem, plan)
    with pytest.raises(InputError, match="nothing is left to choose from for encoder"):
        problem.only(lambda _, c: c.bits == 7)
    with pytest.raises(InputError, match="nothing is left"):
        problem.only(settings=lambda s: False)


@pytest.mark.parametrize("budget", [Budget(-0.05), Budget(None, 1e-9)], ids=["WER", "energy"])
def test_a_budget_that_cannot_be_met_names_the_nearest_that_can(budget: Budget) -> None:
    problem = drawn(5)
    with pytest.raises(InputError, match=r"the nearest that can be met is ") as caught:
        solve(problem, budget)
    nearest = float(str(caught.value).rsplit(" ", 1)[1])
    energy = budget.max_wer_increase is None
    met = Budget(None, nearest) if energy else Budget(nearest / 100)
    assert solve(problem, met)
    less = Budget(None, 0.99 * nearest) if energy else Budget(nearest / 100 - 0.0002)
    with pytest.raises(InputError, match="the nearest"):
        solve(problem, less)


def test_a_budget_is_one_number() -> None:
    for wrong in ((None, None), (0.01, 3.0)):
        with pytest.raises(InputError, match="give one budget"):
            Budget(*wrong)
    with pytest.raises(InputError, match="the budget is nan; it must be a number"):
        Budget(math.nan)


def test_memory_without_room_is_no_way_out() -> None:
    """All must lie in 150 bytes: what is larger is no plan, however small its WER."""
    problem = drawn(0)
    near = problem.profiles[0].tiers[0]
    tight = replace(
        problem.profiles[0], tiers=(replace(near, size_bytes=replace(near.size_bytes, value=150)),)
    )
    problem = replace(problem, profiles=(tight,))
    plan = solve(problem, Budget(1.0))
    least_wer = solve(problem, Budget(None, 1e9))
    assert max(plan.stored_bytes, least_wer.stored_bytes) <= 150
    assert 0 < least_wer.wer_increase <= plan.wer_increase


def test_a_front_rises_in_wer_and_falls_in_energy() -> None:
    problem = drawn(3)
    plans = front(problem, [0.05, -1.0, 0.0, 0.01, 0.02, 0.05, 0.5, 0.6])
    found = [figures(problem, plan) for plan in plans]
    assert len(found) > 2
    for (ratio, wer, _), (next_ratio, next_wer, _) in pairwise(found):
        assert next_ratio < ratio and next_wer > wer


def test_recordings_of_silence_tell_nothing() -> None:
    problem = alike(lambda level: level)
    silent = replace(problem.settings[0], calls_per_s=dict.fromkeys(NAMES, 0.0))
    with pytest.raises(InputError, match="made nothing run; give some with speech"):
        Problem.of("toy", 0.2, problem.candidates, (silent,), problem.profiles)


def test_a_setting_may_better_the_wer() -> None:
    problem = alike(lambda level: level)
    better = replace(problem.settings[0], chunk_ms=640.0, increase=increase(-0.01))
    doubled = {
        name: tuple(replace(c, costs=2 * c.costs) for c in some)
        for name, some in problem.candidates.items()
    }
    both = replace(problem, candidates=doubled, settings=(*problem.settings, better))
    assert solve(both, Budget(0.0)).chunk_ms == 640.0
    assert solve(both, Budget(-0.01)).wer_increase == -0.01


@pytest.mark.parametrize("seed", thinned(range(3), keep=[0]))
def test_a_plan_that_is_excluded_is_followed_by_the_next_best(seed: int) -> None:
    """Also where that takes a candidate which is worse than one of the excluded plan in all."""
    problem = drawn(seed).only(lambda _, c: c.bits < 32 and c.level != 0.5)
    for budget in (Budget(0.015), Budget(0.05)):
        left, found = problem, []
        for _ in range(3):
            plan = solve(left, budget)
            assert figures(left, plan) == figures(left, solve_by_trying_all(left, budget))
            found.append(figures(left, plan))
            left = left.without(plan)
        assert found == sorted(found)


def layered(candidate: Candidate) -> Candidate:
    """Its weights in three parts."""
    costs = []
    for cost in candidate.costs:
        (weights, *rest) = cost.parts
        size = max(1, weights.stored_bytes // 3)
        layers = [Part(f"layers.{n}", size, size) for n in range(3)]
        costs.append(replace(cost, parts=(*layers, *rest)))
    return replace(candidate, costs=tuple(costs))


def test_layers_that_do_not_fit_all_together_are_planned_as_well() -> None:
    split = 0
    for seed in range(4):
        problem = drawn(seed).only(lambda _, c: c.bits < 32 and c.level in (0.0, 0.75))
        encoder = tuple(layered(c) for c in problem.candidates["encoder"])
        problem = replace(problem, candidates={**problem.candidates, "encoder": encoder})
        for limit in (0.004, 0.05):
            plan, slow = (make(problem, Budget(limit)) for make in (solve, solve_by_trying_all))
            assert figures(problem, plan) == figures(problem, slow)
            for placed in plan.placements.values():
                split += len({tier for key, tier in placed.items() if "layers" in key}) > 1
    assert split > 0, "some layers lie near and some far"
