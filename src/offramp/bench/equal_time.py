"""Recognisers with exits compared at equal CPU time, with the errors of several seeds in pairs.

Depth is chosen by time alone, never by the errors that it is then judged by. Seeds are added up
before anything is resampled: three runs on one string are not three strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from offramp.bench.wer import Edits, paired_difference

TOLERANCE = 0.05  # "equal time": at most so much more


@dataclass(frozen=True)
class Wer:
    """Word error rate over seeds: mean and standard deviation, None for a single seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class ExitFigures:
    """wer: by test set, the main one first."""

    wer: Mapping[str, Wer]
    macs_per_audio_s: float
    cpu_s_per_audio_s: float

    @property
    def main_wer(self) -> Wer:
        return next(iter(self.wer.values()))


@dataclass(frozen=True)
class ArmFigures:
    params: int
    exits: Mapping[int, ExitFigures]


@dataclass(frozen=True)
class Gap:
    """WER of ours minus theirs, errors of all seeds together, with 95 % intervals: over strings
    and over takes. significant: both leave out 0."""

    difference: float
    ci95: tuple[float, float]
    ci95_takes: tuple[float, float]

    @property
    def significant(self) -> bool:
        return all(not low <= 0.0 <= high for low, high in (self.ci95, self.ci95_takes))


@dataclass(frozen=True)
class EqualTime:
    """Ours beside a baseline's exit. our_exit: the deepest at its time, up to TOLERANCE
    more. gaps: by test set."""

    our_exit: int
    cpu_ratio: float
    gaps: Mapping[str, Gap]


@dataclass(frozen=True)
class Best:
    """The arm with the lowest WER among the deepest exits at `cpu_s_per_audio_s`, up to TOLERANCE
    more."""

    cpu_s_per_audio_s: float
    arm: str
    exit_layer: int
    wer_mean: float


def affordable(times: Mapping[int, float], budget: float) -> int | None:
    """The deepest exit whose time is within TOLERANCE of `budget` or below; None: not one."""
    return max((e for e, t in times.items() if t <= budget * (1 + TOLERANCE)), default=None)


def best_at(budget: float, arms: Mapping[str, ArmFigures]) -> Best:
    """The arm that does best in `budget` CPU seconds per second of audio.

    Each arm leaves at its deepest affordable exit, chosen by time alone; at least one has one.
    """
    candidates = []
    for arm, made in arms.items():
        times = {e: figures.cpu_s_per_audio_s for e, figures in made.exits.items()}
        exit_layer = affordable(times, budget)
        if exit_layer is not None:
            candidates.append(Best(budget, arm, exit_layer, made.exits[exit_layer].main_wer.mean))
    return min(candidates, key=lambda best: best.wer_mean)


def gap(
    strings: tuple[Sequence[Edits], Sequence[Edits]], takes: tuple[Sequence[Edits], Sequence[Edits]]
) -> Gap:
    """Of (ours, theirs), per string and per take; at least one word was said."""
    over_strings, over_takes = paired_difference(*strings), paired_difference(*takes)
    assert over_strings.difference is not None, "some word was said"
    assert over_strings.ci95 is not None and over_takes.ci95 is not None
    return Gap(over_strings.difference, over_strings.ci95, over_takes.ci95)


def pooled(by_seed: Sequence[Sequence[Edits]]) -> list[Edits]:
    """Per unit, the edits of all seeds together: what is resampled are units, not seeds."""
    return [
        Edits(
            substitutions=sum(e.substitutions for e in unit),
            deletions=sum(e.deletions for e in unit),
            insertions=sum(e.insertions for e in unit),
            length=sum(e.length for e in unit),
        )
        for unit in zip(*by_seed, strict=True)
    ]


def edits_by_word(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edits]:
    """Edits of a cheapest alignment, each at one of the words of `reference`, at least one.

    What is inserted counts at the word before it, at the beginning at the first.
    """
    # Cell j of a row: the edits at each word read so far, against the first j words written; the
    # first place holds what was inserted before any word.
    row: list[tuple[Edits, ...]] = [(Edits(0, 0, j, 0),) for j in range(len(hypothesis) + 1)]
    for word in reference:
        above, row = row, []
        for j, cell in enumerate(above):
            options: list[tuple[Edits, ...]] = [(*cell, Edits(0, 1, 0, 1))]
            if j:
                options.append((*above[j - 1], Edits(int(word != hypothesis[j - 1]), 0, 0, 1)))
                last = row[j - 1][-1]
                options.append((*row[j - 1][:-1], replace(last, insertions=last.insertions + 1)))
            row.append(min(options, key=lambda edits: sum(e.errors for e in edits)))
    lead, first, *rest = row[-1]
    return [*pooled([[lead], [first]]), *rest]
