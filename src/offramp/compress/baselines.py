"""What a plan is compared with: simpler rules that choose among the same candidates.

All keep to a WER budget, by the same predictions, in the model's own setting, and what they choose
is placed in memory as well as can be. So none of them can take less energy than the planner, and
the difference is what choosing well is worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import numpy as np

from offramp.compress.plan import FULL_BITS, CompressionPlan
from offramp.compress.planner import unmeetable
from offramp.compress.problem import Budget, Candidate, Pick, Problem
from offramp.energy.placement import Part
from offramp.energy.profiles import Profile, Tier
from offramp.errors import InputError

_SLACK = 1e-12
_ORDER = ("joiner", "predictor", "encoder")  # of equal ratios, the paper's


def uniform(
    problem: Problem, max_wer_increase: float, method: str = "magnitude"
) -> CompressionPlan:
    """One level and one number of bits for all components."""
    levels = sorted({c.choice.level for some in problem.candidates.values() for c in some} - {0.0})
    alike = [dict.fromkeys(problem.candidates, level) for level in levels]
    return _least_energy(problem, max_wer_increase, method, alike, "uniform")


def global_magnitude(problem: Problem, max_wer_increase: float) -> CompressionPlan:
    """One threshold over the weights of all components, and one number of bits."""
    name = "global_magnitude"
    return _least_energy(problem, max_wer_increase, name, problem.global_levels, name)


def size_optimal(problem: Problem, max_wer_increase: float) -> CompressionPlan:
    """The fewest stored bytes, exactly; of equal ones the lowest WER."""
    rows = [
        np.array([[c.increase.value, c.stored_bytes] for c in some], float)
        for some in problem.candidates.values()
    ]
    kept = [problem.needed(name, some) for name, some in zip(problem.candidates, rows, strict=True)]
    increases, sizes = ([r[k, n] for r, k in zip(rows, kept, strict=True)] for n in (0, 1))
    start = problem.settings[0].increase.value
    increase = reduce(np.add.outer, [start + increases[0], *increases[1:]])
    size = reduce(np.add.outer, sizes)
    allowed = np.flatnonzero(increase <= max_wer_increase + _SLACK)
    for number in allowed[np.lexsort((increase.flat[allowed], size.flat[allowed]))]:
        at = np.unravel_index(number, size.shape)
        pick = Pick(0, tuple(some[int(n)] for some, n in zip(kept, at, strict=True)))
        if problem.allows(pick):
            return problem.plan(pick, "size_optimal")
    raise unmeetable(problem, Budget(max_wer_increase))


def paper_rule(problem: Problem, max_wer_increase: float) -> CompressionPlan:
    """Greedy by ratio (arXiv 2402.13076, as far as it is known): step by step that change of one
    component that saves most power per WER, as long as it fits; of equal ones joiner first, then
    predictor, then encoder.

    Power is told as the rule knows it: a compressed joiner in the nearest memory that holds it, all
    else in the far one; as a mean over the hardware profiles, each against the model as it was.
    """
    names = list(problem.candidates)
    power = {name: [_power(problem, name, c) for c in problem.candidates[name]] for name in names}
    pick = Pick(0, (0,) * len(names))
    if problem.increase(pick) > max_wer_increase + _SLACK:
        raise unmeetable(problem, Budget(max_wer_increase))
    while (step := _best_step(problem, pick, power, max_wer_increase)) is not None:
        pick = step
    return problem.plan(pick, "paper_rule")


def _best_step(
    problem: Problem, pick: Pick, power: Mapping[str, list[float]], max_wer_increase: float
) -> Pick | None:
    """The change of one component that saves most power per WER; None: none that saves fits."""
    names, best = list(problem.candidates), None
    step: Pick | None = None
    for name in sorted(names, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER)):
        at = names.index(name)
        now = pick.candidates[at]
        before = problem.candidates[name][now].increase.value
        for number, candidate in enumerate(problem.candidates[name]):
            gain = power[name][now] - power[name][number]
            changed = Pick(0, (*pick.candidates[:at], number, *pick.candidates[at + 1 :]))
            beyond = problem.increase(changed) > max_wer_increase + _SLACK
            if gain <= 0 or beyond or not problem.allows(changed):
                continue
            loss = candidate.increase.value - before
            score = (gain / loss if loss > 0 else math.inf, gain)
            if best is None or score > best:
                best, step = score, changed
    return step


def _alike(problem: Problem, method: str, levels: Mapping[str, float]) -> Iterator[Pick]:
    """Each component by `method` at its level (0: not pruned), for every number of bits that all
    have, with products in every way that is there; a component that is always stored alike stays
    so."""
    free = {name: some for name, some in problem.candidates.items() if len(some) > 1}
    for bits in sorted({c.choice.bits for some in free.values() for c in some}):
        fitting = []
        for name, some in problem.candidates.items():
            level = levels.get(name, 0.0)
            wanted = ("none" if level == 0 else method, level, bits)
            kinds = [(c.choice.method, c.choice.level, c.choice.bits) for c in some]
            fitting.append([n for n, k in enumerate(kinds) if k == wanted or name not in free])
        for numbers in itertools.product(*fitting):
            yield Pick(0, numbers)


def _least_energy(
    problem: Problem,
    max_wer_increase: float,
    method: str,
    levels: Sequence[Mapping[str, float]],
    made_by: str,
) -> CompressionPlan:
    """Within the budget, by the measure of the planner; not to prune at all counts too."""
    picks = [pick for some in levels for pick in _alike(problem, method, some)]
    if not picks:
        raise InputError(
            f"the baseline {made_by} lacks candidates by {method}, at its levels, somewhere; "
            "measure that method on every component"
        )
    picks += _alike(problem, method, {})
    allowed = [
        p for p in picks if problem.increase(p) <= max_wer_increase + _SLACK and problem.allows(p)
    ]
    if not allowed:
        raise unmeetable(problem, Budget(max_wer_increase))
    return problem.plan(min(allowed, key=lambda pick: _rank(problem, pick)), made_by)


def _rank(problem: Problem, pick: Pick) -> tuple[float, float]:
    outcome = problem.outcome(pick)
    return outcome.ratio, outcome.increase


def _power(problem: Problem, name: str, candidate: Candidate) -> float:
    """As `paper_rule` knows it."""
    component, how = candidate.costs[0], candidate.choice
    near = name == "joiner" and (how.method != "none" or how.bits != FULL_BITS)
    calls, shares = problem.settings[0].calls_per_s[name], []
    for profile in problem.profiles:
        pj = [part.pj_per_call(_tier(part, profile, near)) for part in component.parts]
        pj += [count * profile.mac_pj[dtype].value for dtype, count in component.macs.items()]
        shares.append(calls * math.fsum(pj) / problem.dense_mj[profile.name])
    return math.fsum(shares) / len(shares)


def _tier(part: Part, profile: Profile, near: bool) -> Tier:
    """The nearest, or the farthest, that may hold `part` alone."""
    fitting = [tier for tier in profile.tiers if part.fits(tier)]
    return fitting[0 if near else -1]
