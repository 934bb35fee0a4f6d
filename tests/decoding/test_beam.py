"""Prefix beam search against the sum over all paths, with and without a scorer."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from offramp.decoding.beam import BeamOptions, beam_search
from offramp.decoding.ctc import align, greedy
from offramp.errors import ConfigError, InputError

EXACT = BeamOptions(beam_size=10_000, n_best=10_000, min_log_prob=-math.inf)


def log_probs(T: int, V: int, seed: int = 0, sharpness: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = sharpness * torch.randn(T, V, generator=generator, dtype=torch.float64)
    return grid.log_softmax(-1)


def all_texts(grid: Tensor, blank_id: int = 0) -> dict[tuple[int, ...], float]:
    """Every labelling and its probability, by walking through all V^T paths."""
    T, V = grid.shape
    p = grid.exp().tolist()
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(V), repeat=T):
        label = tuple(t for t, _ in itertools.groupby(path) if t != blank_id)
        found[label] += math.prod(p[t][s] for t, s in enumerate(path))
    return found


class Bigrams:
    """A scorer of random numbers: one per pair of tokens, one per end. Some pairs are forbidden."""

    def __init__(self, V: int, seed: int, forbidden: frozenset[tuple[int, int]] = frozenset()):
        generator = torch.Generator().manual_seed(seed)
        self.pairs = torch.randn(V, V, generator=generator, dtype=torch.float64).tolist()
        self.ends = torch.randn(V, generator=generator, dtype=torch.float64).tolist()
        self.forbidden = forbidden

    def start(self) -> int:
        return 0

    def extend(self, state: int, token: int) -> tuple[int, float]:
        return token, -math.inf if (state, token) in self.forbidden else self.pairs[state][token]

    def finish(self, state: int) -> float:
        return float(self.ends[state])

    def whole(self, tokens: tuple[int, ...]) -> float:
        chain = (0, *tokens)
        steps = [self.extend(a, b)[1] for a, b in itertools.pairwise(chain)]
        return sum(steps) + self.finish(chain[-1])


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "V"), [(1, 2), (1, 4), (3, 2), (4, 3), (5, 3), (4, 4), (6, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wide_beam_finds_every_text_with_its_probability(T: int, V: int, seed: int) -> None:
    grid = log_probs(T, V, seed)
    want = all_texts(grid)
    found = beam_search(grid, EXACT)
    assert {h.tokens for h in found} == set(want)
    for h in found:
        assert h.score == pytest.approx(math.log(want[h.tokens]), abs=1e-9)
    assert sum(math.exp(h.score) for h in found) == pytest.approx(1.0)


@pytest.mark.parametrize("blank_id", [1, 2])
def test_the_blank_may_be_any_token(blank_id: int) -> None:
    grid = log_probs(4, 3, seed=5)
    want = all_texts(grid, blank_id)
    found = beam_search(grid, EXACT, blank_id=blank_id)
    assert {h.tokens: pytest.approx(math.exp(h.score)) for h in found} == want


@pytest.mark.parametrize("seed", range(4))
def test_a_scorer_adds_its_score_of_the_text(seed: int) -> None:
    grid = log_probs(5, 3, seed)
    scorer = Bigrams(3, seed)
    want = {label: math.log(p) + scorer.whole(label) for label, p in all_texts(grid).items()}
    found = beam_search(grid, EXACT, scorer)
    assert {h.tokens: pytest.approx(h.score) for h in found} == want
    assert found[0].tokens == max(want, key=want.__getitem__)


def test_what_a_scorer_forbids_is_never_written() -> None:
    grid, scorer = log_probs(5, 3), Bigrams(3, 0, frozenset({(0, 1), (2, 2)}))
    want = {t for t in all_texts(grid) if scorer.whole(t) > -math.inf}
    found = beam_search(grid, EXACT, scorer)
    assert {h.tokens for h in found} == want
    assert () in want
    assert len(want) < len(all_texts(grid))


def test_a_scorer_that_allows_no_end_leaves_nothing() -> None:
    class Endless(Bigrams):
        def finish(self, state: int) -> float:
            return -math.inf

    assert beam_search(log_probs(4, 3), EXACT, Endless(3, 0)) == []


# -- every beam --------------------------------------------------------------------------------


@pytest.mark.parametrize("beam_size", [1, 2, 3, 8, 50])
def test_n_best_is_sorted_and_distinct_and_never_overrated(beam_size: int) -> None:
    for seed in range(4):
        grid = log_probs(6, 3, seed)
        want = all_texts(grid)
        found = beam_search(grid, BeamOptions(beam_size, n_best=5))
        assert 1 <= len(found) <= min(5, beam_size)
        scores = [h.score for h in found]
        assert scores == sorted(scores, reverse=True)
        assert len({h.tokens for h in found}) == len(found)
        for h in found:
            assert h.score <= math.log(want[h.tokens]) + 1e-9


def test_a_beam_of_one_reads_a_clear_recording() -> None:
    grid = log_probs(40, 6, sharpness=30.0)
    (by_beam,) = beam_search(grid, BeamOptions(beam_size=1))
    (by_frame,) = greedy(grid[None], torch.tensor([40]))
    assert len(by_beam.tokens) > 10
    assert (by_beam.tokens, by_beam.frames) == (by_frame.tokens, by_frame.frames)


def test_the_most_probable_text_is_not_that_of_the_best_path() -> None:
    """The example of Graves (2012): blank wins each frame, and yet the token wins the text."""
    grid = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    (by_frame,) = greedy(grid[None], torch.tensor([2]))
    (by_beam,) = beam_search(grid)
    assert by_frame.tokens == ()
    assert by_beam.tokens == (1,)
    assert math.exp(by_beam.score) == pytest.approx(0.64)


def test_a_prefix_that_left_the_beam_may_come_back() -> None:
    """Its old probability must not come back with it."""
    for seed in range(12):
        grid = log_probs(7, 3, seed, sharpness=2.5)
        want = all_texts(grid)
        for h in beam_search(grid, BeamOptions(beam_size=2, n_best=2)):
            assert h.score <= math.log(want[h.tokens]) + 1e-9


def test_frames_and_confidences_are_those_of_the_best_alignment() -> None:
    grid = log_probs(12, 4, seed=3)
    for h in beam_search(grid, BeamOptions(n_best=8)):
        assert h.frames == align(grid, h.tokens)
        ends = (*h.frames, 12)[1:]
        peaks = [
            max(math.exp(grid[t, token]) for t in range(start, end))
            for token, start, end in zip(h.tokens, h.frames, ends, strict=True)
        ]
        assert h.confidences == pytest.approx(peaks)


def test_no_frames_are_an_empty_text() -> None:
    (found,) = beam_search(torch.zeros(0, 4))
    assert (found.tokens, found.frames, found.score) == ((), (), 0.0)


# -- pruning -----------------------------------------------------------------------------------


def test_improbable_tokens_are_not_tried() -> None:
    grid = torch.tensor([[0.5, 0.49, 0.01], [0.5, 0.01, 0.49]]).log()
    every = {h.tokens for h in beam_search(grid, EXACT)}
    tried = {
        h.tokens for h in beam_search(grid, BeamOptions(n_best=99, min_log_prob=math.log(0.02)))
    }
    assert tried == {(), (1,), (2,), (1, 2)}
    assert tried < every


def test_a_skipped_frame_is_a_blank_and_nothing_else() -> None:
    """As if the frame's other tokens had no probability, so a blank still parts equal tokens."""
    grid = torch.tensor([[0.1, 0.9], [0.97, 0.03], [0.2, 0.8]]).log()
    only_blank = grid.clone()
    only_blank[1, 1] = -math.inf
    exact, skipping = EXACT, BeamOptions(10_000, 10_000, -math.inf, blank_skip=0.95)
    skipped = beam_search(grid, skipping)
    want = beam_search(only_blank, exact)
    assert [h.tokens for h in skipped] == [h.tokens for h in want]
    assert [h.score for h in skipped] == pytest.approx([h.score for h in want])
    assert skipped[0].tokens == (1, 1)
    assert sum(math.exp(h.score) for h in skipped) == pytest.approx(0.97)


def test_skipping_no_frame_changes_nothing() -> None:
    grid = log_probs(8, 4)
    highest = float(grid[:, 0].exp().max())
    for n_best in (1, 7):
        plain = BeamOptions(n_best=n_best)
        skipping = BeamOptions(n_best=n_best, blank_skip=min(1.0, highest + 1e-6))
        assert beam_search(grid, skipping) == beam_search(grid, plain)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"beam_size": 0}, ConfigError, "beam_size is 0"),
        ({"n_best": 0}, ConfigError, "n_best is 0"),
        ({"min_log_prob": 0.0}, InputError, "min_log_prob is 0.0; it must be less than 0"),
        ({"min_log_prob": math.nan}, InputError, "min_log_prob is nan"),
        ({"blank_skip": 0.0}, InputError, "blank_skip is 0.0; it must be greater than 0"),
        ({"blank_skip": 1.1}, InputError, "at most 1"),
    ],
)
def test_impossible_options_are_refused(
    settings: dict[str, float], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        BeamOptions(**settings)  # type: ignore[arg-type]
