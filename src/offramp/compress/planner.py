"""The planner: which choice for each component, chunk and blank threshold take the least energy.

Exact over components x choices x settings x placement in tiers. The WER is additive (problem.py).
Energy is not, since parts compete for the near memories. But it is never less than if each byte
there could be had at a price, with what all of them cost given back: that bound (Lagrange's) is
additive at any price, and the highest of a few ranks the combinations. Only those whose bound is
below the best found are placed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from offramp.compress.plan import CompressionPlan
from offramp.compress.problem import (
    PJ_PER_MJ,
    Budget,
    Candidate,
    Floats,
    Pick,
    Problem,
    idle_mj,
    mac_pj,
)
from offramp.energy.placement import Component
from offramp.energy.profiles import Profile
from offramp.errors import InputError

_SLACK = 1e-12  # sums of floats in another order; relative for energies, absolute for WER


def solve(problem: Problem, budget: Budget) -> CompressionPlan:
    """The least energy within a WER budget, or the least WER within an energy budget.

    Less energy means: a lower ratio to the model as it was, on the profile where it is highest; so
    no profile pays for the gain of another. Of equal ones the lower WER is taken (the lower ratio
    under an energy budget), then fewer bytes, then what comes first. InputError: no plan is within
    the budget; it names the nearest that can be met.
    """
    best = _search(problem, _goal(budget))
    if best is None:
        raise unmeetable(problem, budget)
    return problem.plan(best, "exact")


def solve_by_trying_all(problem: Problem, budget: Budget) -> CompressionPlan:
    """The slow, obvious version of `solve`."""
    goal = _goal(budget)
    best: tuple[Any, Pick] | None = None
    for pick in problem.picks():
        key = _key(problem, pick, goal)
        if key is not None and (best is None or key < best[0]):
            best = key, pick
    if best is None:
        raise unmeetable(problem, budget)
    return problem.plan(best[1], "exact")


def front(problem: Problem, max_wer_increases: Sequence[float]) -> list[CompressionPlan]:
    """The best plans for rising WER budgets, those that another one matches left out."""
    found: list[CompressionPlan] = []
    least = _least_increase(problem)
    for limit in sorted(max_wer_increases):
        if limit < least:
            continue
        plan = solve(problem, Budget(limit))
        if not found or plan != found[-1]:
            found.append(plan)
    return found


def unmeetable(problem: Problem, budget: Budget) -> InputError:
    """What to raise where no plan is within `budget`."""
    if budget.max_wer_increase is not None:
        least = _least_increase(problem)
        # Rounded up, or the figure itself could not be met.
        nearest = math.ceil(least * 1e4 - 1e-6) / 1e2
        return InputError(
            f"no plan keeps the WER increase to {100 * budget.max_wer_increase:+.2f} percentage "
            f"points; the nearest that can be met is {nearest:+.2f}"
        )
    mj = math.inf
    if (pick := _search(problem, _Goal("top", None, None))) is not None:
        mj = max(problem.outcome(pick).mj_per_audio_s.values())
    names = ", ".join(profile.name for profile in problem.profiles)
    return InputError(
        f"no plan takes {budget.max_mj_per_audio_s:g} mJ per audio second or less on each of "
        f"{names}; the nearest that can be met is {_rounded_up(mj):g}"
    )


def _rounded_up(value: float) -> float:
    """To four digits, and never below `value`."""
    if not 0 < value < math.inf:
        return value
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale


# -- the search --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Goal:
    """least: what is to be small, the worst `ratio`, the `increase`, or `top`, the energy in mJ
    on the profile where it is highest. Limits hold for all but the last."""

    least: str
    max_increase: float | None
    max_top: float | None

    def key(self, increase: Any, ratio: Any, top: Any) -> tuple[Any, Any]:
        """Smaller is better: numbers, or arrays of them."""
        if self.least == "increase":
            return increase, ratio
        return (ratio if self.least == "ratio" else top), increase

    def allows(self, increase: Any, top: Any) -> Any:
        """Numbers, or arrays of them."""
        if self.max_increase is not None:
            return increase <= self.max_increase + _SLACK
        return top <= (math.inf if self.max_top is None else self.max_top * (1 + _SLACK))


def _goal(budget: Budget) -> _Goal:
    if budget.max_wer_increase is not None:
        return _Goal("ratio", budget.max_wer_increase, None)
    return _Goal("increase", None, budget.max_mj_per_audio_s)


def _key(
    problem: Problem, pick: Pick, goal: _Goal, give_up: float = math.inf
) -> tuple[Any, ...] | None:
    """By which picks are compared; None: not allowed, or its ratio is beyond `give_up`."""
    increase = problem.increase(pick)
    beyond = goal.max_increase is not None and not goal.allows(increase, None)
    if beyond or not problem.allows(pick):
        return None
    try:
        found = problem.outcome(pick, give_up)
    except InputError:
        return None  # no room in the memory of a profile, or too much energy
    top = max(found.mj_per_audio_s.values())
    if not goal.allows(increase, top):
        return None
    order = (pick.setting, pick.candidates)
    return (*goal.key(increase, found.ratio, top), found.stored_bytes, order)


def _search(problem: Problem, goal: _Goal) -> Pick | None:
    """Best bound first, until no bound is below the best found."""
    best: tuple[Any, ...] | None = None
    found: Pick | None = None
    for setting in range(len(problem.settings)):
        kept = [_worth_trying(problem, setting, name) for name in problem.candidates]
        increase, ratio, top = _bounds(problem, setting, kept)
        first, second = goal.key(increase, ratio, top)
        allowed = goal.allows(increase, top) & np.isfinite(ratio)
        if best is not None:
            allowed &= first <= best[0]
        numbers = np.flatnonzero(allowed)
        numbers = numbers[np.lexsort((second.flat[numbers], first.flat[numbers]))]
        for number in numbers:
            if best is not None and (first.flat[number], second.flat[number]) > best[:2]:
                break
            at = np.unravel_index(number, first.shape)
            pick = Pick(setting, tuple(some[int(n)] for some, n in zip(kept, at, strict=True)))
            give_up = best[0] if best is not None and goal.least == "ratio" else math.inf
            key = _key(problem, pick, goal, give_up)
            if key is not None and (best is None or key < best):
                best, found = key, pick
    return found


def _worth_trying(problem: Problem, setting: int, name: str) -> list[int]:
    """Numbers of the candidates that no other one matches in WER, bytes and products alike, which
    wherever all lies would do as well."""
    rows = []
    for candidate in problem.candidates[name]:
        component = candidate.costs[setting]
        row = [candidate.increase.value]
        for part in component.parts:
            row += [part.stored_bytes, part.read_bytes, part.written_bytes]
        row += [mac_pj(component, profile) for profile in problem.profiles]
        rows.append(row)
    return problem.needed(name, np.array(rows))


def _bounds(
    problem: Problem, setting: int, kept: Sequence[Sequence[int]]
) -> tuple[Floats, Floats, Floats]:
    """Of every combination of those `kept`, an axis per component: WER increase (exact), worst
    ratio and highest energy in mJ, neither above what any placement takes."""
    lists = {
        name: [problem.candidates[name][n] for n in numbers]
        for name, numbers in zip(problem.candidates, kept, strict=True)
    }
    start = problem.settings[setting].increase.value
    values = [np.array([c.increase.value for c in some]) for some in lists.values()]
    increase = reduce(np.add.outer, [start + values[0], *values[1:]])
    ratio = top = np.zeros(())
    for profile in problem.profiles:
        mj = _least_mj(problem, setting, lists, profile)
        top = np.maximum(top, mj)
        ratio = np.maximum(ratio, mj / problem.dense_mj[profile.name])
    return increase, ratio, top


def _least_mj(
    problem: Problem, setting: int, lists: Mapping[str, Sequence[Candidate]], profile: Profile
) -> Floats:
    """The highest bound over prices: each part lies where traffic and rent together are least,
    and the rent of all near memory is given back."""
    calls = problem.settings[setting].calls_per_s
    made = {name: [c.costs[setting] for c in some] for name, some in lists.items()}
    products = [
        np.array([calls[name] * mac_pj(c, profile) for c in some]) for name, some in made.items()
    ]
    parts = [_traffic(some, calls[name], profile) for name, some in made.items()]
    sizes = np.array([min(tier.size, 1e18) for tier in profile.tiers])
    best: Floats | None = None
    for prices in _prices(calls, profile):
        least = [
            fixed + (pj + stored[:, :, None] * prices).min(2).sum(1)
            for fixed, (stored, pj) in zip(products, parts, strict=True)
        ]
        rent = float(sizes @ prices)
        found = reduce(np.add.outer, least) * (1 - _SLACK) - rent * (1 + _SLACK)
        best = found if best is None else np.maximum(best, found, out=best)
    assert best is not None
    return best / PJ_PER_MJ + idle_mj(profile)


def _traffic(
    components: Sequence[Component], calls: float, profile: Profile
) -> tuple[Floats, Floats]:
    """(stored bytes of each part [N, P], pJ per second in each tier [N, P, T]); infinite where it
    does not fit, and 0 where a component has fewer parts than others."""
    count = max(len(component.parts) for component in components)
    stored = np.zeros((len(components), count))
    pj = np.zeros((*stored.shape, len(profile.tiers)))
    for n, component in enumerate(components):
        for p, part in enumerate(component.parts):
            stored[n, p] = part.stored_bytes
            for t, tier in enumerate(profile.tiers):
                pj[n, p, t] = calls * part.pj_per_call(tier) if part.fits(tier) else math.inf
    return stored, pj


def _prices(calls: Mapping[str, float], profile: Profile) -> Iterator[Floats]:
    """Of a byte in each tier [T], in pJ per second. Any do; the best are those at which a part that
    is read whole, so often, might as well lie in the next tier."""
    steps = np.diff([tier.read_pj_per_byte.value for tier in profile.tiers])
    rates = sorted({0.0, *calls.values()})
    for chosen in itertools.combinations_with_replacement(rates[::-1], len(steps)):
        rents = np.array(chosen) * steps  # what is read most lies nearest
        yield np.append(np.cumsum(rents[::-1])[::-1], 0.0)


def _least_increase(problem: Problem) -> float:
    start = min(setting.increase.value for setting in problem.settings)
    parts = [min(c.increase.value for c in some) for some in problem.candidates.values()]
    return math.fsum([start, *parts])
