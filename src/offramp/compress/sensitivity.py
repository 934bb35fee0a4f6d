"""How much the WER grows as one component alone is compressed more and more.

Each component is pruned by each method at rising levels, at once and optionally fine-tuned, and
quantised in every way. All is told as an increase over the model as it was, measured on
the same utterances. How a WER is measured is the caller's business, so no audio is needed here.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np

from offramp.compress.curves import Exponential, Fit, fit
from offramp.compress.plan import FULL_BITS, Choice, pruned, quantised
from offramp.compress.rounding import Moments
from offramp.errors import ConfigError, InputError
from offramp.models.transducer import Transducer

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ALL_BITS = (FULL_BITS, 8, 4)


@dataclass(frozen=True)
class Increase:
    """WER beyond that of the model as it was, as a share of the words, with a 95 % interval."""

    value: float
    ci95: tuple[float, float]

    @property
    def half_width(self) -> float:
        return (self.ci95[1] - self.ci95[0]) / 2


NO_INCREASE = Increase(0.0, (0.0, 0.0))

Measure = Callable[[Transducer], Increase]
Finetune = Callable[[Transducer], Transducer]


@dataclass(frozen=True)
class Grid:
    """What is tried on a component: every method at every level (rising), with every bits and,
    where weights are quantised, all `activations`."""

    methods: tuple[str, ...]
    levels: tuple[float, ...] = LEVELS
    bits: tuple[int, ...] = ALL_BITS
    activations: tuple[str, ...] = ("bfloat16",)

    def __post_init__(self) -> None:
        if not self.activations:
            raise ConfigError("activations are empty; give at least one")
        _ = self.every  # faults of single choices show here
        if list(self.levels) != sorted(set(self.levels)):
            raise ConfigError(f"levels are {self.levels}; they must rise")

    def choices(self, method: str, level: float) -> list[Choice]:
        """Of this grid; what is not quantised has the default activations."""
        found = []
        for bits in self.bits:
            if bits == FULL_BITS:
                found.append(Choice(method, level))
            else:
                found += [Choice(method, level, bits, kind) for kind in self.activations]
        return found

    @property
    def unpruned(self) -> list[Choice]:
        """The choices at level 0, but for the model as it is."""
        return [choice for choice in self.choices("none", 0.0) if choice.bits != FULL_BITS]

    @property
    def every(self) -> list[Choice]:
        """All that is measured, without fine-tuning."""
        pairs = ((method, level) for method in self.methods for level in self.levels)
        return [*self.unpruned, *(c for pair in pairs for c in self.choices(*pair))]


# Encoder: hidden units, alone and with heads, leave smaller matrices, so they save time as well as
# bytes; single weights and blocks cost least WER per byte, and save no time. Products of int8 take
# a fifth of the energy of those of bf16, and at the five rows of a short chunk more time (they are
# the quicker ones from about ten rows on). A plan is for least energy, so both are measured, and
# int8 is chosen unless it costs WER; who wants the quicker one gives a grid with bf16 alone.
# Predictor: an embedding, of which single rows are read, and a matrix. Joiner: one matrix, and the
# most often read of all. Both hear one row at a time, and need no structure to be quick; low rank
# makes their matrices really smaller. `magnitude` and `global_magnitude` are there for all three,
# since uniform and global pruning are what a plan is compared with.
GRIDS: dict[str, Grid] = {
    "encoder": Grid(
        ("feed_forward", "units_and_heads", "blocks", "magnitude", "global_magnitude"),
        activations=("int8", "bfloat16"),
    ),
    "predictor": Grid(("magnitude", "global_magnitude", "low_rank")),
    "joiner": Grid(("magnitude", "global_magnitude", "low_rank")),
}


@dataclass(frozen=True)
class Point:
    """A component that was compressed alone, and what that cost."""

    component: str
    choice: Choice
    finetuned: bool
    increase: Increase


Known = Mapping[tuple[str, Choice, bool], Increase]


@dataclass(frozen=True)
class SweepOptions:
    """finetune: makes a pruned model better, and a new one; None: only as pruned. gather: what the
    layers of a model hear, for quantising it; None: codes are the nearest. stop_above: once a level
    of a method costs so much with all bits, higher ones are not tried. known: points of an earlier
    sweep."""

    finetune: Finetune | None = None
    gather: Callable[[Transducer], Moments] | None = None
    stop_above: float = math.inf
    known: Known = field(default_factory=dict)


def sweep(
    model: Transducer,
    grids: Mapping[str, Grid],
    measure: Measure,
    options: SweepOptions = SweepOptions(),
) -> Iterator[Point]:
    """Every point as soon as it is measured; `model` stays as it is."""
    yield from _walk(grids, options, partial(_points, model, measure, options))


def to_measure(grids: Mapping[str, Grid], options: SweepOptions = SweepOptions()) -> int:
    """How many points a `sweep` without fine-tuning still has to measure, at most."""

    def looked_up(component: str, choices: Sequence[Choice], finetuned: bool) -> Iterator[Point]:
        for choice in choices:
            found = options.known.get((component, choice, finetuned), _UNKNOWN)
            yield Point(component, choice, finetuned, found)

    points = _walk(grids, replace(options, finetune=None), looked_up)
    return sum(point.increase is _UNKNOWN for point in points)


_UNKNOWN = Increase(-math.inf, (-math.inf, math.inf))  # after which a higher level is tried


def _walk(
    grids: Mapping[str, Grid],
    options: SweepOptions,
    points: Callable[[str, Sequence[Choice], bool], Iterator[Point]],
) -> Iterator[Point]:
    """Every point in the order of a sweep; points: of a component and choices that differ in how
    they are quantised only, fine-tuned or not."""
    for component, grid in grids.items():
        yield from points(component, grid.unpruned, False)
        for method in grid.methods:
            for level in grid.levels:
                found = []
                for finetuned in (False,) if options.finetune is None else (False, True):
                    for point in points(component, grid.choices(method, level), finetuned):
                        found.append(point.increase.value)
                        yield point
                if min(found) > options.stop_above:
                    break


def _points(
    model: Transducer,
    measure: Measure,
    options: SweepOptions,
    component: str,
    choices: Sequence[Choice],
    finetuned: bool,
) -> Iterator[Point]:
    """Pruned, fine-tuned and listened to once, if at all."""
    smaller, moments = None, None
    for choice in choices:
        found = options.known.get((component, choice, finetuned))
        if found is None:
            if smaller is None:
                smaller = pruned(model, {component: choice})
                if finetuned:
                    assert options.finetune is not None
                    smaller = options.finetune(smaller)
            if moments is None and choice.bits != FULL_BITS and options.gather is not None:
                moments = options.gather(smaller)
            found = measure(quantised(smaller, {component: choice}, moments))
        yield Point(component, choice, finetuned, found)


@dataclass(frozen=True)
class Curve:
    """What one method costs one component, quantised in one way, at any level up to the last.

    choices: one of them; the level is free. fit: over the increases at `levels`, of which the
    first is 0. Its law is never extended beyond `levels`.
    """

    component: str
    choice: Choice
    finetuned: bool
    levels: tuple[float, ...]
    increases: tuple[Increase, ...]
    fit: Fit

    def at(self, level: float) -> Increase:
        """InputError beyond the levels. An increase below 0 is noise, and counts as 0.

        The interval is as wide as those around it, and by the fit's residual.
        """
        if not 0 <= level <= self.levels[-1]:
            raise InputError(
                f"level is {level}; the curve of {self.component} was measured from 0 to "
                f"{self.levels[-1]}"
            )
        value = max(0.0, self.fit.law.at(level))
        widths = [increase.half_width for increase in self.increases]
        half = float(np.interp(level, self.levels, widths)) + self.fit.residual
        return Increase(value, (value - half, value + half))

    @property
    def form(self) -> str:
        return "exponential" if isinstance(self.fit.law, Exponential) else "lines"


def curves(points: Sequence[Point], finetuned: bool = False) -> list[Curve]:
    """One for each component, method, bits and activations. Level 0 is what quantising alone
    costs, which is nothing where all 32 bits are left."""
    start = {(p.component, *_stored(p.choice)): p.increase for p in points if p.choice.level == 0}
    measured = [p for p in points if p.choice.level > 0 and p.finetuned == finetuned]

    def kind(point: Point) -> tuple[str, str, int, str]:
        return point.component, point.choice.method, *_stored(point.choice)

    found = []
    for (component, method, bits, activations), group in groupby(sorted(measured, key=kind), kind):
        members = sorted(group, key=lambda p: p.choice.level)
        first = NO_INCREASE if bits == FULL_BITS else start[component, bits, activations]
        levels = (0.0, *(p.choice.level for p in members))
        increases = (first, *(p.increase for p in members))
        name = f"{component}, {method}, {bits} bits, {activations}"
        law = fit(levels, [increase.value for increase in increases], name)
        found.append(Curve(component, members[-1].choice, finetuned, levels, increases, law))
    return found


def _stored(choice: Choice) -> tuple[int, str]:
    return choice.bits, choice.activations


def points_csv(points: Sequence[Point], fitted: Sequence[Curve]) -> str:
    """A line per point, with what the fitted curve says there (none for points at level 0)."""
    laws = {(c.component, c.choice.method, *_stored(c.choice), c.finetuned): c for c in fitted}
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    columns = ("component", "method", "level", "bits", "activations", "finetuned")
    write([*columns, "wer_increase", "low", "high", "fitted", "form"])
    for p in points:
        how = p.choice
        curve = laws.get((p.component, how.method, *_stored(how), p.finetuned))
        told = ["", ""] if curve is None else [curve.at(how.level).value, curve.form]
        row = [p.component, how.method, how.level, how.bits, how.activations, int(p.finetuned)]
        write([*row, p.increase.value, *p.increase.ci95, *told])
    return text.getvalue()
