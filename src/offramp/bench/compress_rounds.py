"""Plans carried out and checked: what they really give, and the next one by that.

That the WER is additive over components is a premise of the planner. Where a plan misses its
budget, the next one aims lower by as much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from offramp.bench.compress_measure import Ear
from offramp.bench.stream_profile import energies
from offramp.compress.components import stored_weights
from offramp.compress.plan import CompressionPlan, pruned, quantised
from offramp.compress.planner import solve
from offramp.compress.problem import Budget, Problem
from offramp.compress.sensitivity import Increase
from offramp.config import Chunking
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.energy.modelled import ModelledEnergy
from offramp.energy.profiles import Profile
from offramp.energy.trace import StreamTrace
from offramp.errors import InputError
from offramp.models.transducer import Transducer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """A plan that was carried out. increase: really measured. stored_bytes, energies: of the model
    that it became, by what its own streams ran, one per hardware profile."""

    plan: CompressionPlan
    increase: Increase
    stored_bytes: int
    energies: tuple[ModelledEnergy, ...]

    @property
    def additivity_error(self) -> float:
        """WER that the plan's prediction misses."""
        return self.increase.value - self.plan.wer_increase

    @property
    def mj_per_audio_s(self) -> dict[str, float]:
        return {e.profile.name: e.mj_per_audio_s for e in self.energies}


@dataclass(frozen=True)
class Session:
    """A model, the development set, and all that a plan is chosen and tried with.

    profiles: hardware. finetune: what a pruned model goes through; None: nothing.
    """

    model: Transducer
    ear: Ear
    profiles: tuple[Profile, ...]
    finetune: Callable[[Transducer], Transducer] | None

    def chunking(self, chunk_ms: float | None = None) -> Chunking:
        return StreamPlan(self.model, self.ear.pieces, StreamOptions(chunk_ms)).chunking

    @property
    def own_ms(self) -> float:
        plan = StreamPlan(self.model, self.ear.pieces, StreamOptions())
        return 1000 * plan.frame_s * plan.chunking.chunk

    def energies(
        self, model: Transducer, how: StreamOptions, trace: StreamTrace
    ) -> tuple[ModelledEnergy, ...]:
        return energies(StreamPlan(model, self.ear.pieces, how), trace, self.profiles)

    def carry_out(self, plan: CompressionPlan) -> tuple[Transducer, Tried]:
        """The model that the plan makes, and what it really gives."""
        made = pruned(self.model, plan.choices)
        if self.finetune is not None:
            made = self.finetune(made)
        made = quantised(made, plan.choices, self.ear.moments(made))
        how = StreamOptions(plan.chunk_ms, blank_skip=plan.blank_skip)
        found = self.ear.increase(made, how)
        taken = self.energies(made, how, self.ear.trace(made, how))
        tried = Tried(plan, found, stored_bytes(made), taken)
        log.info("%s: WER %+.4f, off by %+.4f", plan.choices, found.value, tried.additivity_error)
        return made, tried


Made = TypeVar("Made")
Rule = Callable[[Problem, Budget], CompressionPlan]


@dataclass(frozen=True)
class SearchOptions:
    """rounds: plans carried out at most. rule: chooses a plan. bolder: whether one that kept to
    the budget is followed by another that spends what it left, as after fine-tuning there is."""

    rounds: int = 3
    rule: Rule = solve
    bolder: bool = False


def search(
    carry_out: Callable[[CompressionPlan], tuple[Made, Tried]],
    problem: Problem,
    budget: Budget,
    options: SearchOptions = SearchOptions(),
) -> tuple[Made, Tried, tuple[Tried, ...]]:
    """(what was made of the best plan within the budget, what it gives, all that was tried).

    What a plan really spends beyond its prediction is taken off the next one's budget, and what it
    spares is given to it: fine-tuned models mostly do better than curves of models that were not.
    InputError: none kept to the budget.
    """
    by_wer = budget.max_wer_increase is not None
    limit = budget.max_wer_increase if by_wer else budget.max_mj_per_audio_s
    assert limit is not None
    tried: list[Tried] = []
    best: tuple[float, Made, Tried] | None = None
    aim = limit
    for _ in range(options.rounds):
        try:
            plan = options.rule(problem, Budget(aim) if by_wer else Budget(None, aim))
        except InputError:
            if not tried:
                raise
            break
        if any(t.plan == plan for t in tried):
            break
        made, now = carry_out(plan)
        tried.append(now)
        spent, predicted = now.increase.value, plan.wer_increase
        rank = worst_ratio(now, problem)
        if not by_wer:
            rank = spent
            spent = max(now.mj_per_audio_s.values())
            predicted = max(plan.modelled_mj_per_audio_s.values())
        if spent <= limit:
            if best is None or rank < best[0]:
                best = rank, made, now
            if not options.bolder:
                break
        else:
            problem = problem.without(plan)  # whatever is predicted, it will not keep to it
        aim = limit - (spent - predicted)
        if aim <= 0 < limit:  # so far off that nothing would be left
            aim = predicted * limit / spent
    if best is None:
        raise _missed(tried, limit, by_wer)
    return best[1], best[2], tuple(tried)


def worst_ratio(tried: Tried, problem: Problem) -> float:
    """Energy over that of the model as it was, on the profile where this is worst."""
    return max(mj / problem.dense_mj[name] for name, mj in tried.mj_per_audio_s.items())


def _missed(tried: Sequence[Tried], limit: float, by_wer: bool) -> InputError:
    if by_wer:
        nearest = min(t.increase.value for t in tried)
        told = f"a WER increase of {100 * limit:+.2f} (the nearest is {100 * nearest:+.2f})"
    else:
        nearest = min(max(t.mj_per_audio_s.values()) for t in tried)
        told = f"{limit:g} mJ per audio second (the nearest takes {nearest:.4g})"
    return InputError(
        f"plans tried: {len(tried)}, and none kept to {told}; allow that much, give more "
        "development data, or fine-tune by a recipe"
    )


def stored_bytes(model: Transducer) -> int:
    """Of the components that run."""
    return sum(held.stored_bytes for held in stored_weights(model).values())
