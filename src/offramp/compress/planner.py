"""The planner: which choice for each component, chunk and blank threshold take the least energy.

Exact over components x choices x settings x placement in tiers. The WER is taken to be additive:
a setting's increase plus that of each component alone; how far that is off shows when a plan is
carried out. Energy is not additive, since components compete for the near memory. But it is never
less than if each had all of it to itself: that bound, which is additive, ranks the combinations,
and only those whose bound is below the best found are placed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from offramp.compress.plan import MODULES, Choice, CompressionPlan
from offramp.compress.sensitivity import Increase
from offramp.energy.modelled import modelled_energy
from offramp.energy.placement import Component
from offramp.energy.profiles import Profile
from offramp.errors import InputError

_PJ_PER_MJ = 1e9
_SLACK = 1e-12  # sums of floats in another order; relative for energies, absolute for WER

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One way to store a component. costs: what it then is to the energy model, by setting."""

    choice: Choice
    increase: Increase
    costs: tuple[Component, ...]

    @property
    def stored_bytes(self) -> int:
        """Of the weights, which no call writes."""
        return sum(part.stored_bytes for part in self.costs[0].parts if not part.written_bytes)


@dataclass(frozen=True)
class Setting:
    """One way to run a stream. increase: over the first setting, of the model as it was."""

    chunk_ms: float
    blank_skip: float | None
    increase: Increase
    calls_per_s: Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """One of both. max_wer_increase: a share of the words, over the model as it was, in its own
    setting. max_mj_per_audio_s: on every hardware profile of the problem."""

    max_wer_increase: float | None = None
    max_mj_per_audio_s: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.max_wer_increase, self.max_mj_per_audio_s) if v is not None]
        if len(given) != 1:
            raise InputError(
                "give one budget: the WER increase that is allowed at most, or the energy"
            )
        if not math.isfinite(given[0]):
            raise InputError(f"the budget is {given[0]}; it must be a number")


@dataclass(frozen=True)
class Pick:
    """One combination: numbers of its setting and of each component's candidate."""

    setting: int
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What a pick gives. ratio: energy over that of the model as it was, on the hardware profile
    where this is worst."""

    increase: float
    ratio: float
    stored_bytes: int
    mj_per_audio_s: Mapping[str, float]
    placements: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Problem:
    """All that a plan is chosen from; build it with `of`.

    model: its fingerprint. wer: of the model as it was. candidates: by component. dense_mj: energy
    per audio second of the model as it was, by hardware profile. global_levels: what one threshold
    over all components takes from each, for rising thresholds.
    """

    model: str
    wer: float
    candidates: Mapping[str, tuple[Candidate, ...]]
    settings: tuple[Setting, ...]
    profiles: tuple[Profile, ...]
    dense_mj: Mapping[str, float]
    global_levels: tuple[Mapping[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        model: str,
        wer: float,
        candidates: Mapping[str, tuple[Candidate, ...]],
        settings: tuple[Setting, ...],
        profiles: tuple[Profile, ...],
    ) -> Self:
        """The first candidates and the first setting are the model as it was."""
        problem = cls(model, wer, candidates, settings, profiles, {p.name: 1.0 for p in profiles})
        dense = problem.outcome(Pick(0, (0,) * len(candidates))).mj_per_audio_s
        if not all(dense.values()):
            raise InputError("the recordings made nothing run; give some with speech in them")
        return replace(problem, dense_mj=dense)

    def only(
        self,
        choices: Callable[[str, Choice], bool] = lambda component, choice: True,
        settings: Callable[[Setting], bool] = lambda setting: True,
    ) -> Problem:
        """With fewer candidates or settings, against the same model as it was. Components that
        are always stored alike keep their candidate. InputError: nothing is left."""
        kept = [n for n, setting in enumerate(self.settings) if settings(setting)]
        left = {}
        for name, all_of in self.candidates.items():
            some = [c for c in all_of if len(all_of) == 1 or choices(name, c.choice)]
            if not some or not kept:
                raise InputError(f"nothing is left to choose from for {name}; allow more")
            left[name] = tuple(replace(c, costs=tuple(c.costs[n] for n in kept)) for c in some)
        return replace(self, candidates=left, settings=tuple(self.settings[n] for n in kept))

    def chosen(self, pick: Pick) -> dict[str, Candidate]:
        numbers = zip(self.candidates.items(), pick.candidates, strict=True)
        return {name: candidates[n] for (name, candidates), n in numbers}

    def increase(self, pick: Pick) -> float:
        chosen = self.chosen(pick).values()
        return reduce(
            lambda total, c: total + c.increase.value,
            chosen,
            self.settings[pick.setting].increase.value,
        )

    def outcome(self, pick: Pick, give_up: float = math.inf) -> Outcome:
        """Of `pick`, each component placed where all together take least; the ratio is infinite
        once it is beyond `give_up` on one profile. InputError: no room."""
        chosen, setting = self.chosen(pick), self.settings[pick.setting]
        costs = [candidate.costs[pick.setting] for candidate in chosen.values()]
        mj, placements, ratio = {}, {}, 0.0
        for profile in self.profiles:
            energy = modelled_energy(costs, setting.calls_per_s, profile)
            mj[profile.name] = energy.mj_per_audio_s
            placements[profile.name] = energy.placement
            ratio = max(ratio, energy.mj_per_audio_s / self.dense_mj[profile.name])
            if ratio > give_up:
                ratio = math.inf
                break
        stored = sum(candidate.stored_bytes for candidate in chosen.values())
        return Outcome(self.increase(pick), ratio, stored, mj, placements)

    def plan(self, pick: Pick, made_by: str) -> CompressionPlan:
        """What the pick means, with its predictions. Intervals are those of independent errors."""
        chosen, setting, found = self.chosen(pick), self.settings[pick.setting], self.outcome(pick)
        parts = [setting.increase, *(candidate.increase for candidate in chosen.values())]
        half = math.hypot(*(part.half_width for part in parts))
        return CompressionPlan(
            made_by=made_by,
            model=self.model,
            choices={n: c.choice for n, c in chosen.items() if n in MODULES},
            chunk_ms=setting.chunk_ms,
            blank_skip=setting.blank_skip,
            wer=self.wer + found.increase,
            wer_increase=found.increase,
            wer_increase_ci95=(found.increase - half, found.increase + half),
            stored_bytes=found.stored_bytes,
            modelled_mj_per_audio_s=found.mj_per_audio_s,
            placements=found.placements,
        )

    def picks(self) -> Iterator[Pick]:
        """Every combination."""
        numbers = [range(len(candidates)) for candidates in self.candidates.values()]
        for setting in range(len(self.settings)):
            for pick in itertools.product(*numbers):
                yield Pick(setting, pick)


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
            f"no plan keeps the WER increase to {100 * budget.max_wer_increase:+.2f}; the nearest "
            f"that can be met is {nearest:+.2f}"
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
    if goal.max_increase is not None and not goal.allows(increase, None):
        return None
    try:
        found = problem.outcome(pick, give_up)
    except InputError:
        return None  # no memory of a profile has room for it
    if found.ratio == math.inf:
        return None
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
    """Numbers of the candidates that no other one matches in WER, bytes and products alike: these
    are never needed, wherever all lies."""
    rows = []
    for candidate in problem.candidates[name]:
        component = candidate.costs[setting]
        row = [candidate.increase.value]
        for part in component.parts:
            row += [part.stored_bytes, part.read_bytes, part.written_bytes]
        row += [_mac_pj(component, profile) for profile in problem.profiles]
        rows.append(row)
    return undominated(np.array(rows))


def undominated(rows: Floats) -> list[int]:
    """Numbers of rows [N, K] that no other row is at most as large as in every column; of equal
    rows the first."""
    kept: list[int] = []
    # A row can only be matched by one that comes before it in this order.
    for n in np.lexsort((np.arange(len(rows)), *rows.T[::-1])):
        if not bool((rows[kept] <= rows[n]).all(axis=1).any()):
            kept.append(int(n))
    return sorted(kept)


def _bounds(
    problem: Problem, setting: int, kept: Sequence[Sequence[int]]
) -> tuple[Floats, Floats, Floats]:
    """Of every combination of those `kept`, an axis per component: WER increase (exact), worst
    ratio and highest energy in mJ if every part had the nearest memory that holds it to itself."""
    calls = problem.settings[setting].calls_per_s
    start = problem.settings[setting].increase.value
    lists = {
        name: [problem.candidates[name][n] for n in numbers]
        for name, numbers in zip(problem.candidates, kept, strict=True)
    }
    values = [np.array([c.increase.value for c in some]) for some in lists.values()]
    increase = reduce(np.add.outer, [start + values[0], *values[1:]])
    ratio = top = np.zeros(())
    for profile in problem.profiles:
        least = [
            np.array([calls[name] * _least_pj(c.costs[setting], profile) for c in some])
            for name, some in lists.items()
        ]
        mj = reduce(np.add.outer, least) * ((1 - _SLACK) / _PJ_PER_MJ)
        mj += profile.idle_mw.value if profile.idle_mw else 0.0
        top = np.maximum(top, mj)
        ratio = np.maximum(ratio, mj / problem.dense_mj[profile.name])
    return increase, ratio, top


def _least_pj(component: Component, profile: Profile) -> float:
    """Of a call, if every part lies in the cheapest tier that could hold it alone."""
    memory = [
        min((part.pj_per_call(t) for t in profile.tiers if part.fits(t)), default=math.inf)
        for part in component.parts
    ]
    return math.fsum([*memory, _mac_pj(component, profile)])


def _mac_pj(component: Component, profile: Profile) -> float:
    return math.fsum(n * profile.mac_pj[dtype].value for dtype, n in component.macs.items())


def _least_increase(problem: Problem) -> float:
    start = min(setting.increase.value for setting in problem.settings)
    parts = [min(c.increase.value for c in some) for some in problem.candidates.values()]
    return math.fsum([start, *parts])
