"""Error rates against edit distance by definition, and intervals against their meaning."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from offramp.bench.wer import (
    Bootstrap,
    Difference,
    Edits,
    character_edits,
    error_rate,
    paired_difference,
    word_edits,
)
from offramp.errors import ConfigError, InputError

try:
    import jiwer  # noqa: F401
except ImportError:
    HAS_JIWER = False
else:
    HAS_JIWER = True
needs_jiwer = pytest.mark.skipif(not HAS_JIWER, reason="jiwer is not installed")


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """By definition, without a table; short texts only."""
    if not a or not b:
        return len(a) + len(b)
    change = distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, change)


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(["a", "be", "sea"], k=draw.randrange(6))) for _ in range(count)]


# -- edits -------------------------------------------------------------------------------------


@needs_jiwer
def test_word_edits_are_as_few_as_can_be() -> None:
    references, hypotheses = texts(80, 0), texts(80, 1)
    for r, h, e in zip(references, hypotheses, word_edits(references, hypotheses), strict=True):
        assert e.errors == distance(r.split(), h.split())
        assert e.length == len(r.split())
        assert e.length - e.deletions + e.insertions == len(h.split())


@needs_jiwer
def test_character_edits_are_as_few_as_can_be() -> None:
    draw = random.Random(2)
    references, hypotheses = (
        ["".join(draw.choices("ab c", k=draw.randrange(6))) for _ in range(60)] for _ in "rh"
    )
    found = character_edits(references, hypotheses)
    for r, h, e in zip(references, hypotheses, found, strict=True):
        spaced = [" ".join(t.split()) for t in (r, h)]
        assert e.errors == distance(*spaced)
        assert e.length == len(spaced[0])


@needs_jiwer
@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("the cat sat", "the bat sat", Edits(1, 0, 0, 3)),
        ("the cat sat", "the sat", Edits(0, 1, 0, 3)),
        ("the cat sat", "so the cat sat down", Edits(0, 0, 2, 3)),
        ("the  cat\tsat\n", " the cat sat", Edits(0, 0, 0, 3)),
        ("the cat", "", Edits(0, 2, 0, 2)),
        ("", "the cat", Edits(0, 0, 2, 0)),
        ("", "", Edits(0, 0, 0, 0)),
        ("The cat.", "the cat", Edits(2, 0, 0, 2)),
    ],
)
def test_what_counts_as_what(reference: str, hypothesis: str, edits: Edits) -> None:
    assert word_edits([reference], [hypothesis]) == [edits]


def test_every_utterance_needs_both_texts() -> None:
    with pytest.raises(InputError, match="there are 2 references and 1 hypotheses"):
        word_edits(["a", "b"], ["a"])
    assert word_edits([], []) == []


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(InputError, match=r"need jiwer: pip install 'offramp\[wer\]'$"):
        word_edits(["a"], ["a"])


# -- rates -------------------------------------------------------------------------------------


def utterances(count: int, error_rate: float, seed: int) -> list[Edits]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 20, size=count)
    return [Edits(int(draw.binomial(n, error_rate)), 0, 0, int(n)) for n in lengths]


def test_the_rate_is_pooled_over_words() -> None:
    found = error_rate([Edits(1, 0, 0, 1), Edits(0, 1, 1, 9), Edits(0, 0, 2, 0)])
    assert found.rate == 5 / 10
    assert (found.substitutions, found.deletions, found.insertions) == (1, 1, 3)
    assert (found.length, found.utterances) == (10, 3)


@pytest.mark.parametrize("edits", [[], [Edits(0, 0, 0, 0)], [Edits(0, 0, 3, 0)] * 4])
def test_without_a_word_there_is_no_rate(edits: list[Edits]) -> None:
    found = error_rate(edits)
    assert (found.rate, found.ci95) == (None, None)
    assert paired_difference(edits, edits) == Difference(None, None)
    assert paired_difference(edits, edits).significant is None


def test_resamples_of_empty_references_alone_are_left_out() -> None:
    found = error_rate([Edits(1, 0, 0, 2), *[Edits(0, 0, 0, 0)] * 9], Bootstrap(200))
    assert found.ci95 == (0.5, 0.5)


@pytest.mark.parametrize(("utterances", "known"), [(1, False), (9, False), (10, True)])
def test_few_utterances_have_no_interval(utterances: int, known: bool) -> None:
    found = error_rate([Edits(1, 0, 0, 4)] * utterances)
    assert found.rate == 0.25 and (found.ci95 is not None) == known


def test_the_same_seed_gives_the_same_interval() -> None:
    edits = utterances(60, 0.2, 0)
    first, again = (error_rate(edits, Bootstrap(seed=5)) for _ in range(2))
    other = error_rate(edits, Bootstrap(seed=6))
    assert first == again
    assert first.ci95 != other.ci95


def test_utterances_that_are_alike_leave_no_doubt() -> None:
    found = error_rate([Edits(1, 0, 0, 4)] * 30)
    assert found.ci95 == (0.25, 0.25)


def test_95_of_100_intervals_hold_the_true_rate() -> None:
    hits = 0
    for seed in range(100):
        ci95 = error_rate(utterances(80, 0.15, seed), Bootstrap(120, seed)).ci95
        assert ci95 is not None
        hits += ci95[0] <= 0.15 <= ci95[1]
    assert 0.87 <= hits / 100 <= 0.99


def test_an_interval_narrows_with_the_root_of_the_size() -> None:
    widths = []
    for count in (50, 5000):
        ci95 = error_rate(utterances(count, 0.3, 1), Bootstrap(300)).ci95
        assert ci95 is not None
        widths.append(ci95[1] - ci95[0])
    assert widths[0] / widths[1] == pytest.approx(10.0, rel=0.3)


# -- pairs -------------------------------------------------------------------------------------


def test_pairing_sees_what_two_intervals_hide() -> None:
    """Utterances differ a lot, the systems only a little, and always to the same side."""
    draw = np.random.default_rng(0)
    baseline = [Edits(int(n), 0, 0, 20) for n in draw.integers(1, 15, size=100)]
    better = [
        Edits(e.substitutions - int(i % 3 == 0), 0, 0, e.length) for i, e in enumerate(baseline)
    ]
    found = paired_difference(better, baseline)
    a, b = error_rate(better).ci95, error_rate(baseline).ci95
    assert a is not None and b is not None and found.ci95 is not None
    assert found.difference == pytest.approx(-34 / 2000)
    assert found.significant
    assert a[1] > b[0], "each alone, they overlap"
    swapped = paired_difference(baseline, better)
    assert swapped.difference == pytest.approx(34 / 2000)
    assert swapped.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))


def test_a_system_does_not_differ_from_itself() -> None:
    edits = utterances(50, 0.3, 0)
    found = paired_difference(edits, edits)
    assert (found.difference, found.ci95, found.significant) == (0.0, (0.0, 0.0), False)


def test_equal_systems_seldom_seem_to_differ() -> None:
    seeming = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        lengths = draw.integers(5, 20, size=80)
        one, two = (
            [Edits(int(draw.binomial(n, 0.2)), 0, 0, int(n)) for n in lengths] for _ in range(2)
        )
        seeming += bool(paired_difference(one, two, Bootstrap(120, seed)).significant)
    assert seeming <= 9


def test_systems_on_other_utterances_are_not_compared() -> None:
    with pytest.raises(InputError, match="references differ"):
        paired_difference([Edits(0, 0, 0, 2)], [Edits(0, 0, 0, 3)])
    with pytest.raises(InputError, match=r"references differ \(1 and 2 utterances\)"):
        paired_difference([Edits(0, 0, 0, 2)], [Edits(0, 0, 0, 2)] * 2)


def test_a_bootstrap_draws_at_least_once() -> None:
    with pytest.raises(ConfigError, match="resamples is 0"):
        Bootstrap(0)
