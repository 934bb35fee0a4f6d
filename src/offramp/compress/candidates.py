"""From fitted curves and counted streams to the planner's problem: every choice with its cost.

A candidate is really made: the component is pruned and quantised, and its bytes are those that
would be stored, its products those that would be computed (components.py). Curves give its WER at
levels between the measured ones; how often components run comes from streams of the model as it
was, one for each setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from offramp.compress.components import stored_by_chunking, stored_weights
from offramp.compress.method import modules_of
from offramp.compress.plan import MODULES, Choice, pruned, quantised
from offramp.compress.problem import Candidate, Problem, Setting
from offramp.compress.prune import WITH_WEIGHT, Weighted
from offramp.compress.sensitivity import NO_INCREASE, Curve, Increase, Point
from offramp.config import Chunking
from offramp.energy.placement import Component
from offramp.energy.profiles import Profile
from offramp.energy.trace import StreamTrace
from offramp.energy.transducer_components import StoredWeights, call_costs, transducer_components
from offramp.errors import InputError
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer

# Twice as fine as what is measured: the curves tell the rest.
PLANNED_LEVELS = tuple(n / 20 for n in range(1, 20))

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Heard:
    """A setting as it was tried with the model as it was: what ran, and what it cost in WER."""

    chunk_ms: float
    chunking: Chunking
    blank_skip: float | None
    trace: StreamTrace
    increase: Increase


@dataclass(frozen=True)
class Sensitivity:
    """points: measured, of which those at level 0 are used as they are. curves: one for each
    component, method and bits; see `sensitivity.curves`. wer: of the model as it was."""

    wer: float
    points: Sequence[Point]
    curves: Sequence[Curve]


def problem_of(
    model: Transducer,
    sensitivity: Sensitivity,
    heard: Sequence[Heard],
    profiles: Sequence[Profile],
    levels: Sequence[float] = PLANNED_LEVELS,
    tell: Tell = lambda done, total: None,
) -> Problem:
    """The problem of compressing `model`; the first of `heard` is its own setting.

    levels: that the plan may choose, as far as they were measured. tell: hears of candidates made.
    """
    if not heard:
        raise InputError("no setting is given; give at least the model's own")
    chunkings = dict.fromkeys(h.chunking for h in heard)
    dense = stored_by_chunking(model, chunkings)
    thresholds = global_levels(model, levels)
    wanted = _wanted(sensitivity, levels, thresholds)
    total, done = sum(map(len, wanted.values())), 0
    candidates = {
        name: [Candidate(Choice(), NO_INCREASE, _costs(model, heard, dense, name))]
        for name in call_costs(model.config)
    }
    for choices, small in _made(model, wanted):
        held = _stored(small, list(chunkings), "encoder" in choices)
        for name, choice in choices.items():
            costs = _costs(model, heard, held, name)
            candidates[name].append(Candidate(choice, wanted[name][choice], costs))
        done += len(choices)
        tell(done, total)
    return replace(
        Problem.of(
            fingerprint(model),
            sensitivity.wer,
            {name: tuple(found) for name, found in candidates.items()},
            tuple(_setting(model, h) for h in heard),
            tuple(profiles),
        ),
        global_levels=thresholds,
    )


def global_levels(model: Transducer, levels: Sequence[float]) -> tuple[dict[str, float], ...]:
    """For each of `levels`, the share of each component's weights among the lowest so many of all.

    `global_magnitude` at these shares prunes every component by one threshold.
    """
    flat = {}
    for component, module in MODULES.items():
        found: dict[str, Weighted] = modules_of(model, WITH_WEIGHT, [module])
        flat[component] = torch.cat([m.weight.detach().abs().flatten() for m in found.values()])
    owner = torch.cat([torch.full((len(w),), at) for at, w in enumerate(flat.values())])
    ranked = owner[torch.cat(list(flat.values())).argsort(stable=True).to("cpu")]
    shares = []
    for level in levels:
        low = ranked[: round(level * len(ranked))].bincount(minlength=len(flat)).tolist()
        shares.append({name: low[at] / len(w) for at, (name, w) in enumerate(flat.items())})
    return tuple(shares)


def _wanted(
    sensitivity: Sensitivity, levels: Sequence[float], thresholds: Sequence[Mapping[str, float]]
) -> dict[str, dict[Choice, Increase]]:
    """By component, what is to be made; choices that differ in bits only follow each other."""
    wanted: dict[str, dict[Choice, Increase]] = {}
    for point in sensitivity.points:
        if point.choice.level == 0:
            value = max(0.0, point.increase.value)  # less is noise
            half = point.increase.half_width
            kept = Increase(value, (value - half, value + half))
            wanted.setdefault(point.component, {})[point.choice] = kept
    by_method = sorted(sensitivity.curves, key=lambda c: (c.component, c.choice.method))
    for (component, method), group in groupby(by_method, lambda c: (c.component, c.choice.method)):
        some = list(group)
        tried = sorted(t[component] for t in thresholds) if method == "global_magnitude" else levels
        for level in tried:
            for curve in some:
                if 0 < level <= curve.levels[-1]:
                    choice = replace(curve.choice, level=level)
                    wanted.setdefault(component, {})[choice] = curve.at(level)
    return wanted


def _made(
    model: Transducer, wanted: Mapping[str, Mapping[Choice, Increase]]
) -> Iterator[tuple[dict[str, Choice], Transducer]]:
    """All that is wanted, choices for several components in one model: they know nothing of each
    other. What differs in bits only is pruned once."""
    groups = {
        component: [list(g) for _, g in groupby(choices, lambda c: (c.method, c.level))]
        for component, choices in wanted.items()
    }
    for row in range(max(map(len, groups.values()), default=0)):
        now = {name: some[row] for name, some in groups.items() if row < len(some)}
        smaller = pruned(model, {name: some[0] for name, some in now.items()})
        for at in range(max(map(len, now.values()))):
            choices = {name: some[at] for name, some in now.items() if at < len(some)}
            yield choices, quantised(smaller, choices)


def _setting(model: Transducer, heard: Heard) -> Setting:
    trace = heard.trace
    tokens_per_s = trace.per_s()["tokens"]
    rates = trace.rates(model.config.factorised_blank)
    calls = {name: rate.at(tokens_per_s) for name, rate in rates.items()}
    return Setting(heard.chunk_ms, heard.blank_skip, heard.increase, calls)


def _stored(
    small: Transducer, chunkings: Sequence[Chunking], in_all: bool
) -> dict[Chunking, dict[str, StoredWeights]]:
    """By chunking, which only an encoder knows of; without it one is like another."""
    if in_all:
        return stored_by_chunking(small, chunkings)
    return dict.fromkeys(chunkings, stored_weights(small, chunkings[0]))


def _costs(
    model: Transducer,
    heard: Sequence[Heard],
    weights: Mapping[Chunking, Mapping[str, StoredWeights]],
    name: str,
) -> tuple[Component, ...]:
    """The component `name` with these weights, by setting."""
    found = []
    for h in heard:
        made = transducer_components(
            model.config,
            weights[h.chunking],
            h.trace.positions_per_call(model.config.factorised_blank),
            h.chunking,
            cache_bits=8 * model.dtype.itemsize,
        )
        found.append(next(component for component in made if component.name == name))
    return tuple(found)
