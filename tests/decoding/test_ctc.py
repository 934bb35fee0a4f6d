"""CTC decoding against the obvious frame-by-frame version, and alignments against all paths."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from offramp.decoding.ctc import Hypothesis, align, aligned, greedy, text, words
from offramp.errors import InputError

CHARACTERS = ["", " ", "a", "b", "c"]
PIECES = ["", " th", "e", " a", "t", "n o"]


def log_probs(*shape: int, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator)).log_softmax(-1)


def collapse(path: list[int] | tuple[int, ...], blank_id: int = 0) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank_id)


def slow_greedy(grid: Tensor, blank_id: int = 0) -> Hypothesis:
    """Frame by frame, one utterance [T, V]."""
    tokens: list[int] = []
    frames: list[int] = []
    peaks: list[float] = []
    score, before = 0.0, blank_id
    for t, row in enumerate(grid):
        best = int(row.argmax())
        score += float(row[best])
        if best not in (blank_id, before):
            tokens.append(best)
            frames.append(t)
            peaks.append(0.0)
        if tokens:
            peaks[-1] = max(peaks[-1], math.exp(row[tokens[-1]]))
        before = best
    return Hypothesis(tuple(tokens), tuple(frames), score, tuple(peaks))


def assert_same(got: Hypothesis, want: Hypothesis) -> None:
    assert (got.tokens, got.frames) == (want.tokens, want.frames)
    assert got.score == pytest.approx(want.score, abs=1e-4)
    assert got.confidences == pytest.approx(want.confidences, abs=1e-6)


# -- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank_id", [0, 3])
@pytest.mark.parametrize("vocab_size", [4, 9])
def test_the_vectorised_greedy_is_the_obvious_one(vocab_size: int, blank_id: int) -> None:
    grid = log_probs(24, 17, vocab_size)
    lengths = torch.tensor([1 + i % 17 for i in range(24)])
    found = greedy(grid, lengths, blank_id)
    for row, length, got in zip(grid, lengths.tolist(), found, strict=True):
        assert_same(got, slow_greedy(row[:length], blank_id))
    assert any(len(h.tokens) > 3 for h in found)


@pytest.mark.parametrize("garbage", [0.0, -math.inf, math.nan])
def test_padded_frames_do_not_matter(garbage: float) -> None:
    grid = log_probs(3, 12, 5)
    lengths = torch.tensor([12, 7, 0])
    want = greedy(grid, lengths)
    for row, length in zip(grid, lengths.tolist(), strict=True):
        row[length:] = garbage
    assert greedy(grid, lengths) == want
    assert want[2] == Hypothesis((), (), 0.0, ())


def test_no_frames_at_all_are_an_empty_text() -> None:
    empty = Hypothesis((), (), 0.0, ())
    assert greedy(torch.zeros(2, 0, 5), torch.tensor([0, 0])) == [empty, empty]


def test_a_blank_separates_equal_tokens() -> None:
    path = [0, 2, 2, 0, 2, 1, 1, 0]
    grid = torch.full((len(path), 3), math.log(0.1))
    grid[range(len(path)), path] = math.log(0.8)
    (found,) = greedy(grid[None], torch.tensor([len(path)]))
    assert found.tokens == (2, 2, 1)
    assert found.frames == (1, 4, 5)
    assert found.confidences == pytest.approx((0.8, 0.8, 0.8))
    assert found.score == pytest.approx(8 * math.log(0.8))


# -- alignment ---------------------------------------------------------------------------------


def best_path(grid: Tensor, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """By trying all V^T paths."""
    T, V = grid.shape
    rows = grid.tolist()
    writing = (p for p in itertools.product(range(V), repeat=T) if collapse(p) == tokens)
    path = max(writing, key=lambda p: sum(row[s] for row, s in zip(rows, p, strict=True)))
    starts = [t for t, s in enumerate(path) if s and (t == 0 or path[t - 1] != s)]
    return tuple(starts)


@pytest.mark.parametrize("tokens", [(1,), (1, 2), (2, 2), (1, 2, 1), (1, 1, 2)])
def test_alignment_is_the_best_of_all_paths(tokens: tuple[int, ...]) -> None:
    for seed in range(5):
        grid = log_probs(6, 3, seed=seed)
        assert align(grid, tokens) == best_path(grid, tokens)


def test_aligning_the_greedy_text_gives_the_greedy_frames() -> None:
    for seed in range(20):
        grid = log_probs(30, 6, seed=seed)
        (found,) = greedy(grid[None], torch.tensor([30]))
        again = aligned(grid, found.tokens, found.score)
        assert (again.tokens, again.frames) == (found.tokens, found.frames)
        assert again.confidences == pytest.approx(found.confidences, abs=1e-6)


def test_no_tokens_need_no_frames() -> None:
    assert align(log_probs(4, 3), ()) == ()
    assert aligned(log_probs(4, 3), (), -1.0) == Hypothesis((), (), -1.0, ())


@pytest.mark.parametrize(("frames", "tokens"), [(1, (1, 2)), (3, (1, 1, 2)), (0, (1,))])
def test_a_text_that_does_not_fit_is_refused(frames: int, tokens: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"do not fit {frames} frames; they need at least"):
        align(log_probs(frames, 3), tokens)


# -- words -------------------------------------------------------------------------------------


def hypothesis(tokens: list[int], frames: list[int], confidences: list[float]) -> Hypothesis:
    return Hypothesis(tuple(tokens), tuple(frames), 0.0, tuple(confidences))


def test_pieces_with_a_leading_space_begin_words() -> None:
    found = hypothesis([1, 2, 3, 4], [2, 3, 7, 9], [0.9, 0.4, 0.8, 0.5])
    the, at = words(found, PIECES, frame_s=0.04)
    assert (the.text, at.text) == ("the", "at")
    assert (the.start_s, the.end_s) == pytest.approx((0.08, 0.16))
    assert (at.start_s, at.end_s) == pytest.approx((0.28, 0.40))
    assert the.confidence == pytest.approx(math.sqrt(0.9 * 0.4))
    assert at.confidence == pytest.approx(math.sqrt(0.8 * 0.5))


def test_both_spellings_of_a_leading_space_are_alike() -> None:
    found = hypothesis([1, 2, 3, 4], [2, 3, 7, 9], [0.9, 0.4, 0.8, 0.5])
    marked = [p.replace(" ", "\u2581") for p in PIECES]
    assert words(found, marked, 0.04) == words(found, PIECES, 0.04)
    assert text(found.tokens, marked) == text(found.tokens, PIECES) == "the at"


def test_a_space_may_be_a_token_or_stand_inside_one() -> None:
    spaced = hypothesis([2, 3, 1, 1, 4], [0, 1, 2, 4, 6], [0.5] * 5)
    assert [w.text for w in words(spaced, CHARACTERS, 0.04)] == ["ab", "c"]
    inside = hypothesis([3, 5, 4], [0, 2, 5], [0.5, 0.6, 0.7])
    first, second = words(inside, PIECES, 0.04)
    assert (first.text, second.text) == ("an", "ot")
    assert (first.end_s, second.start_s) == pytest.approx((0.12, 0.12)), "one token, two words"


def test_times_are_monotone_and_inside_the_audio() -> None:
    draw = random.Random(0)
    counts = set()
    for seed in range(30):
        grid = log_probs(40, len(CHARACTERS), seed=seed)
        (found,) = greedy(grid[None], torch.tensor([40]))
        duration_s = draw.uniform(0.2, 1.7)
        spoken = words(found, CHARACTERS, 0.04, duration_s)
        assert text(found.tokens, CHARACTERS) == " ".join(w.text for w in spoken)
        times = [t for w in spoken for t in (w.start_s, w.end_s)]
        assert times == sorted(times)
        assert all(0.0 <= t <= duration_s for t in times)
        assert all(0.0 <= w.confidence <= 1.0 for w in spoken)
        counts.add(len(spoken))
    assert max(counts) > 4


def test_a_token_of_no_probability_makes_a_word_of_no_confidence() -> None:
    (word,) = words(hypothesis([3, 4], [0, 1], [0.0, 0.9]), PIECES, 0.04)
    assert word.confidence == 0.0


def test_nothing_said_is_no_word() -> None:
    assert words(hypothesis([], [], []), PIECES, 0.04) == []
    assert words(hypothesis([1], [3], [0.9]), CHARACTERS, 0.04) == []
    assert text((), PIECES) == ""
