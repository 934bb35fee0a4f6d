"""Word and character error rates with bootstrap intervals, alone and for two systems in a pair.

Edits come from jiwer (the extra `wer`), per utterance. Intervals resample utterances, not words,
because errors come in clumps (Bisani and Ney, 2004); two systems are resampled together, so what
makes an utterance hard for both cancels. Texts are compared as they are: normalise them first.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.config import check_counts
from offramp.data.speech import normalize_text
from offramp.errors import DataError, InputError
from offramp.results import ratio

_LEAST_UTTERANCES = 10  # fewer, drawn anew, say nothing about others


@dataclass(frozen=True)
class Edits:
    """What turns a reference into its hypothesis. length: the reference's words or characters."""

    substitutions: int
    deletions: int
    insertions: int
    length: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class ErrorRate:
    """Errors over the length of all references; it may exceed 1. ci95: its 95 % interval.

    An empty reference adds its insertions to the errors, and nothing to the length. Both are
    None where all references are empty.
    """

    rate: float | None
    ci95: tuple[float, float] | None
    substitutions: int
    deletions: int
    insertions: int
    length: int
    utterances: int


@dataclass(frozen=True)
class Difference:
    """Error rate of one system minus another's on the same utterances, with its 95 % interval.

    significant: whether the interval leaves out 0. All None where all references are empty.
    """

    difference: float | None
    ci95: tuple[float, float] | None

    @property
    def significant(self) -> bool | None:
        return None if self.ci95 is None else not self.ci95[0] <= 0.0 <= self.ci95[1]


@dataclass(frozen=True)
class Bootstrap:
    """resamples: how many times the utterances are drawn anew; seed: of the draws."""

    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(1, resamples=self.resamples)
        check_counts(0, seed=self.seed)


def word_edits(references: Sequence[str], hypotheses: Sequence[str]) -> list[Edits]:
    """Edits between the words (between white space) of each pair."""
    return _edits("process_words", references, hypotheses)


def character_edits(references: Sequence[str], hypotheses: Sequence[str]) -> list[Edits]:
    """Edits between the characters of each pair; runs of white space count as one space."""
    return _edits("process_characters", references, hypotheses)


def need_jiwer() -> Any:
    """The package; InputError where it is missing, best raised before the work, not after it."""
    try:
        return importlib.import_module("jiwer")
    except ImportError as error:
        raise InputError("error rates need jiwer: pip install 'offramp[wer]'") from error


def _edits(process: str, references: Sequence[str], hypotheses: Sequence[str]) -> list[Edits]:
    if len(references) != len(hypotheses):
        raise InputError(
            f"there are {len(references)} references and {len(hypotheses)} hypotheses; "
            "each utterance needs one of both"
        )
    if not references:
        return []
    jiwer = need_jiwer()
    texts = [[" ".join(t.split()) for t in side] for side in (references, hypotheses)]
    found = getattr(jiwer, process)(*texts)
    pairs = zip(found.references, found.alignments, strict=True)
    return [_count(len(reference), chunks) for reference, chunks in pairs]


def _count(length: int, chunks: Sequence[Any]) -> Edits:
    counts = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
    for c in chunks:
        # An insertion covers nothing of the reference, a deletion nothing of the hypothesis.
        covered = (c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
        counts[c.type] += max(covered)
    return Edits(counts["substitute"], counts["delete"], counts["insert"], length)


def as_reference(written: str) -> str:
    """`written` normalised as references are."""
    try:
        return normalize_text(written)
    except DataError:
        return written  # signs that no reference has: its words count as errors


def error_rate(edits: Sequence[Edits], bootstrap: Bootstrap = Bootstrap()) -> ErrorRate:
    """The rate over all utterances, and its interval from resampled utterances.

    No interval below `_LEAST_UTTERANCES`.
    """
    enough = len(edits) >= _LEAST_UTTERANCES
    length = sum(e.length for e in edits)
    return ErrorRate(
        rate=ratio(sum(e.errors for e in edits), length),
        ci95=_interval([e.errors for e in edits], edits, bootstrap) if enough else None,
        substitutions=sum(e.substitutions for e in edits),
        deletions=sum(e.deletions for e in edits),
        insertions=sum(e.insertions for e in edits),
        length=length,
        utterances=len(edits),
    )


def paired_difference(
    system: Sequence[Edits], baseline: Sequence[Edits], bootstrap: Bootstrap = Bootstrap()
) -> Difference:
    """Rate of `system` minus rate of `baseline`: below 0 where `system` is better.

    Both on the same utterances in the same order; InputError where their references differ.
    """
    if [e.length for e in system] != [e.length for e in baseline]:
        raise InputError(
            f"the systems' references differ ({len(system)} and {len(baseline)} utterances); "
            "compare them on the same utterances in the same order"
        )
    apart = [a.errors - b.errors for a, b in zip(system, baseline, strict=True)]
    return Difference(
        ratio(sum(apart), sum(e.length for e in system)), _interval(apart, system, bootstrap)
    )


def _interval(
    errors: Sequence[int], edits: Sequence[Edits], bootstrap: Bootstrap
) -> tuple[float, float] | None:
    """2.5 % and 97.5 % quantiles of errors / length over resampled utterances.

    Resamples that drew empty references alone have no rate and are left out.
    """
    top, bottom = np.array(errors, float), np.array([e.length for e in edits], float)
    if not bottom.sum():
        return None
    draw, rates = np.random.default_rng(bootstrap.seed), []
    for _ in range(bootstrap.resamples):
        rows = draw.integers(len(top), size=len(top))
        if length := bottom[rows].sum():
            rates.append(top[rows].sum() / length)
    if not rates:
        return None
    low, high = np.quantile(rates, (0.025, 0.975)).tolist()
    return low, high
