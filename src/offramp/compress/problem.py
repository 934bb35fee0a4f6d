"""What a plan is chosen from: candidates by component, settings of a stream, hardware profiles.

The WER is taken to be additive: a setting's increase plus that of each component alone; how far
that is off shows when a plan is carried out. Energy is not: components share the near memories.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self

import numpy as np
from numpy.typing import NDArray

from offramp.compress.plan import MODULES, Choice, CompressionPlan
from offramp.compress.sensitivity import Increase
from offramp.energy.modelled import modelled_energy
from offramp.energy.placement import Component, place
from offramp.energy.profiles import Profile
from offramp.errors import InputError

PJ_PER_MJ = 1e9

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
    over all components takes from each, for rising thresholds. excluded: plans not to be chosen.
    """

    model: str
    wer: float
    candidates: Mapping[str, tuple[Candidate, ...]]
    settings: tuple[Setting, ...]
    profiles: tuple[Profile, ...]
    dense_mj: Mapping[str, float]
    global_levels: tuple[Mapping[str, float], ...] = ()
    excluded: tuple[CompressionPlan, ...] = ()

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

    def without(self, plan: CompressionPlan) -> Problem:
        """The same, with `plan` no longer to choose."""
        return replace(self, excluded=(*self.excluded, plan))

    def allows(self, pick: Pick) -> bool:
        """Whether it is not excluded."""
        return not any(self._is(plan, pick) for plan in self.excluded)

    def _is(self, plan: CompressionPlan, pick: Pick) -> bool:
        setting, chosen = self.settings[pick.setting], self.chosen(pick)
        return (setting.chunk_ms, setting.blank_skip) == (plan.chunk_ms, plan.blank_skip) and all(
            chosen[name].choice == choice for name, choice in plan.choices.items()
        )

    def needed(self, name: str, rows: Floats) -> list[int]:
        """Numbers of the candidates for `name` without which no best pick is missed; rows [N, K]:
        of each, what is to be small. Those that others match in all are not needed, but for what
        takes the place of those in plans that are excluded."""
        taken = {plan.choices[name] for plan in self.excluded if name in plan.choices}
        used = [n for n, c in enumerate(self.candidates[name]) if c.choice in taken]
        others = [n for n in range(len(rows)) if n not in used]
        rest = [others[n] for n in undominated(rows[others])] if used else []
        return sorted({*undominated(rows), *used, *rest})

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
        """Of `pick`, each component placed where all together take least. InputError: no room, or a
        ratio beyond `give_up`."""
        chosen, calls = self.chosen(pick), self.settings[pick.setting].calls_per_s
        costs = [candidate.costs[pick.setting] for candidate in chosen.values()]
        mj, placements, ratio = {}, {}, 0.0
        for profile in self.profiles:
            dense = self.dense_mj[profile.name]
            products = math.fsum(calls[c.name] * mac_pj(c, profile) for c in costs)
            left = (give_up * dense - idle_mj(profile)) * PJ_PER_MJ - products
            tiers = place(costs, calls, profile, at_most=left).tiers
            energy = modelled_energy(costs, calls, profile, tiers)
            mj[profile.name] = energy.mj_per_audio_s
            placements[profile.name] = energy.placement
            ratio = max(ratio, energy.mj_per_audio_s / dense)
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


def undominated(rows: Floats) -> list[int]:
    """Numbers of rows [N, K] that no other row is at most as large as in every column; of equal
    rows the first."""
    kept: list[int] = []
    # A row can only be matched by one that comes before it in this order.
    for n in np.lexsort((np.arange(len(rows)), *rows.T[::-1])):
        if not bool((rows[kept] <= rows[n]).all(axis=1).any()):
            kept.append(int(n))
    return sorted(kept)


def mac_pj(component: Component, profile: Profile) -> float:
    return math.fsum(n * profile.mac_pj[dtype].value for dtype, n in component.macs.items())


def idle_mj(profile: Profile) -> float:
    return profile.idle_mw.value if profile.idle_mw else 0.0
