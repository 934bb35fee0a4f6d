"""Simpler rules: each does what its name says, and none beats the planner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from offramp.compress.baselines import global_magnitude, paper_rule, size_optimal, uniform
from offramp.compress.plan import Choice, CompressionPlan
from offramp.compress.planner import solve
from offramp.compress.problem import Budget, Candidate, Problem, Setting
from offramp.errors import InputError
from thinned import thinned
from toy_plans import NAMES, alike, component, device, drawn, increase

Rule = Callable[[Problem, float], CompressionPlan]
RULES: dict[str, Rule] = {
    "uniform": uniform,
    "global_magnitude": global_magnitude,
    "size_optimal": size_optimal,
    "paper_rule": paper_rule,
}


def as_global(problem: Problem) -> Problem:
    """With `global_magnitude` for `magnitude`."""
    renamed = {
        name: tuple(
            replace(c, choice=replace(c.choice, method="global_magnitude")) if c.choice.level else c
            for c in some
        )
        for name, some in problem.candidates.items()
    }
    return replace(problem, candidates=renamed)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", thinned(range(12), keep=(0, 4, 8)))
def test_none_takes_less_than_the_planner(name: str, seed: int) -> None:
    problem = drawn(seed)
    if name == "global_magnitude":
        problem = as_global(problem)
    for limit in (0.005, 0.02, 0.08):
        plan, best = RULES[name](problem, limit), solve(problem, Budget(limit))
        assert plan.made_by == name
        assert plan.wer_increase <= limit + 1e-12
        assert plan.chunk_ms == 320.0 and plan.blank_skip is None

        def ratio(plan: CompressionPlan, problem: Problem = problem) -> float:
            mj = plan.modelled_mj_per_audio_s
            return max(mj[profile] / problem.dense_mj[profile] for profile in mj)

        assert ratio(best) <= ratio(plan)
        if name == "size_optimal":
            assert plan.stored_bytes <= best.stored_bytes or best.chunk_ms != 320.0


def test_the_planner_is_really_better_somewhere() -> None:
    gains = []
    for seed in range(12):
        problem = drawn(seed).only(settings=lambda s: s.chunk_ms == 320.0)
        best = solve(problem, Budget(0.02)).modelled_mj_per_audio_s
        for rule in (uniform, size_optimal, paper_rule):
            gains.append(rule(problem, 0.02).modelled_mj_per_audio_s["small"] / best["small"])
    assert max(gains) > 1.2


@pytest.mark.parametrize("seed", range(4))
def test_uniform_is_the_best_of_one_level_for_all(seed: int) -> None:
    problem = drawn(seed)
    plan = uniform(problem, 0.03)
    (how,) = set(plan.choices.values())
    energies = {}
    for number, candidate in enumerate(problem.candidates["encoder"]):
        pick = next(
            p
            for p in problem.picks()
            if p.setting == 0 and p.candidates == (number, number, number, 0)
        )
        if problem.increase(pick) <= 0.03:
            energies[candidate.choice] = problem.outcome(pick).ratio
    assert how in energies and energies[how] == min(energies.values())


@pytest.mark.parametrize("seed", range(4))
def test_size_optimal_stores_the_fewest_bytes(seed: int) -> None:
    problem = drawn(seed)
    sizes = [
        sum(c.stored_bytes for c in combination)
        for combination in itertools.product(*problem.candidates.values())
        if sum(c.increase.value for c in combination) <= 0.03
    ]
    assert size_optimal(problem, 0.03).stored_bytes == min(sizes)


def test_one_threshold_takes_from_each_component_its_share() -> None:
    levels = (0.0, 0.2, 0.4, 0.6, 0.8)
    problem = as_global(alike(lambda level: level, levels))
    shares = {"encoder": 0.6, "predictor": 0.0, "joiner": 0.2}
    found = global_magnitude(replace(problem, global_levels=(shares,)), 1.0)
    assert {name: c.level for name, c in found.choices.items()} == shares
    assert found.choices["encoder"].method == "global_magnitude"
    missing = replace(problem, global_levels=(shares | {"joiner": 0.21},))
    with pytest.raises(InputError, match="global_magnitude lacks candidates by global_mag"):
        global_magnitude(missing, 1.0)


def test_the_paper_s_rule_takes_the_best_ratio_first_and_the_joiner_of_equal_ones() -> None:
    problem = alike(lambda level: 0.01 * level)
    one = paper_rule(problem, 0.002)
    assert [n for n, c in one.choices.items() if c.level] == ["joiner"]
    two = paper_rule(problem, 0.010)
    levels = {name: choice.level for name, choice in two.choices.items()}
    assert levels["joiner"] == 0.8 and levels["predictor"] == pytest.approx(0.2)
    busy = replace(problem.settings[0], calls_per_s=dict.fromkeys(NAMES, 10.0) | {"encoder": 99.0})
    candidates = dict(problem.candidates)
    busier = Problem.of("toy", 0.2, candidates, (busy,), problem.profiles)
    assert [n for n, c in paper_rule(busier, 0.002).choices.items() if c.level] == ["encoder"]


def test_a_compressed_joiner_is_thought_of_as_near() -> None:
    """Small enough for the near memory it saves most, which a rule that knows no memory misses."""

    def candidates(name: str, *sizes: int) -> tuple[Candidate, ...]:
        levels = [0.0, 0.2, 0.4]
        return tuple(
            Candidate(
                Choice("magnitude" if level else "none", level),
                increase(level / 100),
                (component(name, size),),
            )
            for level, size in zip(levels, sizes, strict=True)
        )

    some = {
        "encoder": candidates("encoder", 1000, 700, 690),
        "predictor": candidates("predictor", 10, 9, 8),
        "joiner": candidates("joiner", 500, 410, 400),
    }
    setting = Setting(320.0, None, increase(0.0), dict.fromkeys(NAMES, 10.0))
    devices = (device("one", ("near", 420, 1.0), ("far", None, 30.0)),)
    problem = Problem.of("toy", 0.2, some, (setting,), devices)
    plan = paper_rule(problem, 0.002)
    assert [n for n, c in plan.choices.items() if c.level] == ["joiner"]
    assert plan.placements["one"]["joiner.weights"] == "near"


@pytest.mark.parametrize("name", RULES)
def test_a_budget_that_cannot_be_met_is_refused_alike(name: str) -> None:
    problem = as_global(drawn(0)) if name == "global_magnitude" else drawn(0)
    with pytest.raises(
        InputError, match=r"increase to -5\.00 percentage points; the nearest that can be met is"
    ):
        RULES[name](problem, -0.05)


def test_equal_sensitivities_make_uniform_as_good_as_the_planner() -> None:
    def cost(level: float) -> float:
        return 0.01 * (math.exp(3 * level) - 1)

    problem = alike(cost)
    plan, rule = solve(problem, Budget(3 * cost(0.6))), uniform(problem, 3 * cost(0.6))
    assert rule == replace(plan, made_by="uniform")


def test_one_level_for_all_may_compute_its_products_either_way() -> None:
    """As the planner may, or it would win by what the rule was not offered."""
    problem = drawn(0)
    both = []
    for candidate in problem.candidates["encoder"]:
        both.append(candidate)
        if candidate.choice.bits < 32:
            cheap = replace(candidate.choice, activations="int8")
            worse = increase(candidate.increase.value + 0.015)
            costs = tuple(replace(c, macs={}) for c in candidate.costs)
            both.append(replace(candidate, choice=cheap, increase=worse, costs=costs))
    free = replace(problem, candidates={**problem.candidates, "encoder": tuple(both)})
    ways = {uniform(free, limit).choices["encoder"].activations for limit in (0.002, 1.0)}
    assert ways == {"bfloat16", "int8"}
    for limit in (0.002, 0.02, 0.08):
        plan = uniform(free, limit)
        assert plan.wer_increase <= limit + 1e-12
        alike = {replace(choice, activations="int8") for choice in plan.choices.values()}
        assert len(alike) == 1, "one level and one number of bits"
