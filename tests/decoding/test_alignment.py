"""Aligning a decoder's text by CTC: against all paths, and with words that were never said."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from offramp.decoding.alignment import TextAligner, TokenSpan, align_text, text_words
from offramp.decoding.ctc import align, aligned, greedy
from offramp.errors import InputError
from toy_beam import spoken

BLANK = 2
Places = list[tuple[int, int] | None]


def log_probs(T: int, V: int, seed: int, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = sharpness * torch.randn(T, V, generator=generator, dtype=torch.float64)
    return grid.log_softmax(-1)


def runs(path: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(token, start, end) of each run of a path that is not blank."""
    found, at = [], 0
    for token, group in itertools.groupby(path):
        length = len(list(group))
        if token != BLANK:
            found.append((token, at, at + length))
        at += length
    return found


def writes(path: tuple[int, ...], tokens: tuple[int, ...], kept: tuple[int, ...]) -> bool:
    """Whether `path` writes the `kept` ones of `tokens`, a blank where others are left out."""
    found = runs(path)
    if [t for t, _, _ in found] != [tokens[i] for i in kept]:
        return False
    gaps = zip(itertools.pairwise(found), itertools.pairwise(kept), strict=True)
    return all(j == i + 1 or b[1] > a[2] for (a, b), (i, j) in gaps)


def best_places(grid: Tensor, tokens: tuple[int, ...], min_odds: float) -> Places:
    """By trying all V^T paths with every choice of tokens to leave out.

    At either end the blank may be one that is not in the audio. Of choices that are worth the same
    the one that keeps earlier tokens.
    """
    T, V = grid.shape
    best = (-math.inf, 0)
    places: Places = [None] * len(tokens)
    for n in range(len(tokens) + 1):
        for kept in itertools.combinations(range(len(tokens)), n):
            cost = (len(tokens) - n) * math.log(min_odds)
            for path in itertools.product(range(V), repeat=T):
                if not writes(path, tokens, kept):
                    continue
                score = cost + sum(float(grid[t, s]) for t, s in enumerate(path))
                if (rank := (round(score, 9), -sum(kept))) > best:
                    best, places = rank, [None] * len(tokens)
                    for i, (_, start, end) in zip(kept, runs(path), strict=True):
                        places[i] = (start, end)
    return places


@pytest.mark.parametrize("tokens", [(0,), (0, 1), (1, 1), (0, 1, 0), (0, 0, 1), (1, 0, 0, 1)])
def test_places_are_those_of_the_best_of_all_paths(tokens: tuple[int, ...]) -> None:
    left_out = 0
    for seed, min_odds in itertools.product(range(4), (0.9, 0.1)):
        grid = log_probs(5, 3, seed)
        aligner = TextAligner(grid, BLANK, min_odds)
        for token in tokens:
            aligner.push(token)
        want = best_places(grid, tokens, min_odds)
        assert aligner.places() == want
        left_out += sum(place is None for place in want)
    assert left_out > 0 or len(tokens) < 3


def test_a_text_that_is_all_heard_has_the_frames_of_forced_alignment() -> None:
    for seed in range(10):
        grid = log_probs(30, 6, seed)
        (said,) = greedy(grid[None], torch.tensor([30]), BLANK)
        for tokens in (said.tokens, said.tokens[1:], (*said.tokens, 1, 0)):
            if len(tokens) > 14:
                continue
            found = align_text(grid, tokens, BLANK, min_odds=1e-300)
            want = aligned(grid, tokens, 0.0, BLANK)
            assert tuple(s.start for s in found) == align(grid, tokens, BLANK) == want.frames
            assert [s.confidence for s in found] == pytest.approx(want.confidences)
            assert all(s.heard for s in found)


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_any_text_fits_any_number_of_frames(frames: int) -> None:
    spans = align_text(log_probs(frames, 4, 0), [1, 3, 1, 0], BLANK)
    assert sum(s.heard for s in spans) <= frames
    assert [s.token for s in spans] == [1, 3, 1, 0]
    assert align_text(log_probs(frames, 4, 0), [], BLANK) == []


# A recording in which 4, 5, 4, 6 are said, in frames 3, 7 and 8, 12, 15 of 20.
SAID = {3: 4, 7: 5, 8: 5, 12: 4, 15: 6}


def test_a_word_that_was_never_said_has_no_time_and_spoils_no_other() -> None:
    grid = spoken(20, SAID)
    spans = align_text(grid, [4, 1, 1, 5, 4, 6, 3, 3, 3], blank_id=9)
    assert [(s.start, s.end) for s in spans if s.heard] == [(3, 4), (7, 9), (12, 13), (15, 16)]
    assert [s.token for s in spans if not s.heard] == [1, 1, 3, 3, 3]
    assert [s.confidence > 0.9 for s in spans] == [s.heard for s in spans]
    assert [s.start for s in spans] == [3, 3, 3, 7, 12, 15, 15, 15, 15]


def test_a_word_in_place_of_another_has_its_time_and_little_confidence() -> None:
    grid = spoken(20, SAID)
    spans = align_text(grid, [4, 1, 4, 6], blank_id=9)
    assert [s.heard for s in spans] == [True] * 4
    assert 7 <= spans[1].start <= 8
    assert spans[1].confidence < 0.05


def test_nothing_said_leaves_every_token_unheard() -> None:
    spans = align_text(spoken(12, {}), [4, 5], blank_id=9)
    assert spans == [TokenSpan(4, 0, 0, 0.0), TokenSpan(5, 0, 0, 0.0)]


def test_the_tail_says_what_is_unheard_and_how_far_the_text_has_got() -> None:
    aligner = TextAligner(spoken(20, SAID), blank_id=9)
    tails = []
    for token in (4, 1, 5, 4, 6, 3, 3):
        aligner.push(token)
        tails.append(aligner.tail())
    assert [count for count, _ in tails] == [0, 1, 0, 0, 0, 1, 2]
    passed = [frame for _, frame in tails]
    assert [4 <= passed[1] <= 7, passed[2] <= 12, 13 <= passed[3] <= 15] == [True] * 3
    assert min(passed[4:]) >= 16


def test_words_have_the_times_of_their_tokens() -> None:
    spans = align_text(spoken(20, SAID), [4, 5, 1, 4, 6], blank_id=9)
    one, made_up, two = text_words(spans, [" on", "e", " uh", " tw", "o"], frame_s=0.04)
    assert [w.text for w in (one, made_up, two)] == ["one", "uh", "two"]
    assert (one.start_s, one.end_s) == pytest.approx((0.12, 0.32))
    assert (two.start_s, two.end_s) == pytest.approx((0.48, 0.64))
    assert made_up.start_s == made_up.end_s == one.end_s
    assert (made_up.confidence, one.confidence > 0.9) == (0.0, True)
    assert text_words(spans, [" on", "e", " uh", " tw", "o"], 0.04, 0.6)[-1].end_s == 0.6


@pytest.mark.parametrize("token", [-1, 9, 10])
def test_a_token_that_ctc_cannot_write_is_refused(token: int) -> None:
    with pytest.raises(InputError, match=f"token {token} cannot be aligned; .* 10 tokens"):
        align_text(spoken(4, {}), [token], blank_id=9)


@pytest.mark.parametrize("min_odds", [0.0, 1.0, math.nan])
def test_impossible_odds_are_refused(min_odds: float) -> None:
    with pytest.raises(InputError, match=r"min_odds is .*; it must be greater than 0 and less"):
        align_text(spoken(4, {}), [1], 9, min_odds)
