"""Words and hotwords in beam search: each counts once, however it is split into pieces."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from extras import needs_kenlm
from offramp.decoding.beam import BeamOptions, beam_search
from offramp.decoding.ctc import text
from offramp.decoding.lm import LanguageModel, WordScorer, WordScorerOptions, hotword_spelling
from offramp.decoding.ngram import train_ngram
from offramp.errors import DataError, InputError

TEXTS = ["the cat sat on the mat", "the cat ate the rat", "a rat sat on a cat", "rat rat rat"] * 2

PIECES = ["", " the", " ca", "t", " ma", " ra", " s", "a", " rat", " on", " "]


# -- the model ---------------------------------------------------------------------------------


def language_model(folder: Path, order: int = 3, texts: list[str] = TEXTS) -> LanguageModel:
    train_ngram(texts, order, folder / "lm.arpa")
    return LanguageModel(folder / "lm.arpa")


def sentence_score(model: LanguageModel, sentence: str) -> float:
    state, total = model.start(), 0.0
    for word in sentence.split():
        state, log_p = model.score(state, word)
        total += log_p
    return total + model.finish(state)


@needs_kenlm
def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.arpa is missing; give an ARPA file"):
        LanguageModel(tmp_path / "none.arpa")
    path = tmp_path / "lm.arpa"
    path.write_text("a plain text\n")
    with pytest.raises(DataError, match=r"has no .*-grams: section"):
        LanguageModel(path)
    with pytest.raises(DataError, match="no language model that KenLM reads") as caught:
        LanguageModel(path, words=["a"])
    assert "\n" not in str(caught.value)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flashlight", None)
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    with pytest.raises(InputError, match=r"needs flashlight-text: pip install 'offramp\[lm\]'$"):
        LanguageModel(tmp_path / "lm.arpa")


# -- words in beam search ----------------------------------------------------------------------


def tokens_of(spelled: str) -> list[int]:
    """Piece ids, written with | between pieces: " ca|t"."""
    return [PIECES.index(p) for p in spelled.split("|")]


def total(scorer: WordScorer, tokens: list[int]) -> float:
    state, score = scorer.start(), 0.0
    for token in tokens:
        state, gain = scorer.extend(state, token)
        score += gain
    return score + scorer.finish(state)


@needs_kenlm
def test_a_text_scores_by_its_words_however_it_is_split(tmp_path: Path) -> None:
    model = language_model(tmp_path)
    options = WordScorerOptions(lm_weight=0.7, word_score=0.3, oov_score=-4.0)
    scorer = WordScorer(PIECES, model, options=options)
    want = 0.7 * sentence_score(model, "the rat") + 2 * 0.3
    for spelled in (" the| rat", " the| ra|t", " the| | ra|t", " | the| rat| "):
        assert total(scorer, tokens_of(spelled)) == pytest.approx(want)


@needs_kenlm
@pytest.mark.parametrize("spelled", [" s|t|t", " the|a", " ca", " ra|a|t"])
def test_an_unknown_word_pays_once(tmp_path: Path, spelled: str) -> None:
    """Whether it leaves the known beginnings early, at once, or ends too soon."""
    model = language_model(tmp_path)
    free, paid = (
        WordScorer(PIECES, model, options=WordScorerOptions(oov_score=s)) for s in (0.0, -4.0)
    )
    tokens = tokens_of(spelled)
    assert total(paid, tokens) == pytest.approx(total(free, tokens) - 4.0)
    known = tokens_of(" ca|t")
    assert total(paid, known) == total(free, known)


@needs_kenlm
def test_a_closed_lexicon_writes_nothing_but_its_words(tmp_path: Path) -> None:
    model = language_model(tmp_path)
    closed = WordScorer(PIECES, model, options=WordScorerOptions(oov_score=-math.inf))
    opened = WordScorer(PIECES, model, options=WordScorerOptions(lm_weight=0.0, oov_score=0.0))
    outside = 0
    for seed in range(6):
        grid = random_grid(8, seed)
        options = BeamOptions(beam_size=32, n_best=8)
        for h in beam_search(grid, options, closed):
            assert set(text(h.tokens, PIECES).split()) <= model.words
        written = {
            w for h in beam_search(grid, options, opened) for w in text(h.tokens, PIECES).split()
        }
        outside += len(written - model.words)
    assert outside > 10, "and without it, it would have"


def random_grid(T: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(T, len(PIECES), generator=generator)).log_softmax(-1)


@needs_kenlm
def test_a_wide_beam_with_a_model_is_the_best_of_all_texts(tmp_path: Path) -> None:
    scorer = WordScorer(PIECES[:5], language_model(tmp_path), ["mat"])
    wide = BeamOptions(10_000, 10_000, -math.inf)
    for seed in range(3):
        grid = random_grid(4, seed)[:, :5].log_softmax(-1)
        want = {h.tokens: h.score + total(scorer, list(h.tokens)) for h in beam_search(grid, wide)}
        found = beam_search(grid, wide, scorer)
        assert {h.tokens: pytest.approx(h.score) for h in found} == want


@needs_kenlm
def test_a_last_piece_held_for_many_frames_ends_its_word_once(tmp_path: Path) -> None:
    """And a word said twice is written twice: what flashlight's lexicon decoder gets wrong."""
    path = [0, 1, 1, 1, 2, 3, 3, 3, 3, 0, 8, 8, 0, 8, 8]
    grid = torch.full((len(path), len(PIECES)), 1e-4).log()
    grid[range(len(path)), path] = math.log(0.99)
    scorer = WordScorer(PIECES, language_model(tmp_path))
    (best,) = beam_search(grid, scorer=scorer)
    assert text(best.tokens, PIECES) == "the cat rat rat"


@needs_kenlm
def test_the_model_decides_what_sounds_alike(tmp_path: Path) -> None:
    """Between "cat" and "mat" the sound is a draw; the text before tells."""
    model = language_model(tmp_path, 3, ["the cat"] * 9 + ["on mat"] * 9 + ["the mat", "on cat"])
    for first, want in (("the", "the cat"), ("on", "on mat")):
        grid = torch.full((3, len(PIECES)), 1e-3)
        grid[0, PIECES.index(f" {first}")] = 0.9
        grid[1, [PIECES.index(" ca"), PIECES.index(" ma")]] = 0.45
        grid[2, PIECES.index("t")] = 0.9
        (best,) = beam_search(grid.log(), scorer=WordScorer(PIECES, model))
        assert text(best.tokens, PIECES) == want


# -- hotwords ----------------------------------------------------------------------------------

HOT = WordScorerOptions(hotword_score=5.0)


@pytest.mark.parametrize(
    ("spelled", "count"),
    [
        (" the| ca|t", 1),
        (" ca|t| ca|t", 2),
        (" ca", 0),
        (" ca|t|t", 0),
        (" s|ca|t", 0),
        (" the| ma|t", 1),
        (" the| the| ma|t", 1),
        (" the| ma|t|a", 0),
        (" the| | ma|t| | s", 1),
        (" the| ma", 0),
        (" the", 0),
        (" ma|t", 0),
    ],
)
def test_a_hotword_counts_once_where_it_is_whole(spelled: str, count: int) -> None:
    """Whatever was credited on the way is taken back; PIECES has " ca", so "sca" needs none."""
    pieces = [*PIECES, "ca"]
    tokens = [pieces.index(p) for p in spelled.split("|")]
    scorer = WordScorer(pieces, hotwords=["cat", "the  mat"], options=HOT)
    assert total(scorer, tokens) == pytest.approx(5.0 * count)


def test_credit_grows_with_each_letter() -> None:
    scorer = WordScorer(PIECES, hotwords=["cat"], options=HOT)
    state, first = scorer.extend(scorer.start(), PIECES.index(" ca"))
    _, second = scorer.extend(state, PIECES.index("t"))
    assert (first, second) == pytest.approx((5.0 * 2 / 3, 5.0 / 3))


def test_a_hotword_is_heard_where_it_nearly_was() -> None:
    grid = torch.full((2, len(PIECES)), 1e-3)
    grid[0, PIECES.index(" ma")], grid[0, PIECES.index(" ca")] = 0.8, 0.15
    grid[1, PIECES.index("t")] = 0.9
    for hotwords, want in (([], "mat"), (["cat"], "cat"), (["rat"], "mat")):
        scorer = WordScorer(PIECES, hotwords=hotwords, options=HOT)
        (best,) = beam_search(grid.log(), scorer=scorer)
        assert text(best.tokens, PIECES) == want


@needs_kenlm
def test_a_hotword_is_a_known_word(tmp_path: Path) -> None:
    """Even in a closed lexicon that lacks it."""
    model = language_model(tmp_path, 2, ["the cat"])
    options = WordScorerOptions(oov_score=-math.inf)
    tokens = tokens_of(" the| ma|t")
    assert total(WordScorer(PIECES, model, options=options), tokens) == -math.inf
    assert total(WordScorer(PIECES, model, ["mat"], options), tokens) > -math.inf


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lm_weight": -0.1}, "lm_weight is -0.1; it must be at least 0"),
        ({"lm_weight": math.inf}, "lm_weight is inf"),
        ({"word_score": math.nan}, "word_score is nan; it must be finite"),
        ({"oov_score": 0.5}, "oov_score is 0.5; it must be at most 0"),
        ({"hotword_score": math.nan}, "hotword_score is nan"),
    ],
)
def test_impossible_weights_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        WordScorerOptions(**settings)


def test_an_empty_hotword_is_refused() -> None:
    with pytest.raises(InputError, match="a hotword is empty"):
        WordScorer(PIECES, hotwords=["cat", " "])


def test_hotwords_are_spelled_as_the_model_writes() -> None:
    pieces = ["<|blank|>", " ab", "c", "'", "\N{LOWER ONE EIGHTH BLOCK}d"]
    for given, expected in (("ab c", "ab c"), ("Cab-D!", "cab d"), ("c'd", "c'd")):
        assert hotword_spelling(given, pieces) == expected
    for given in ("lank", "", "  ", "4"):
        with pytest.raises(InputError, match="cannot be recognised"):
            hotword_spelling(given, pieces)


def test_pieces_in_capitals_keep_capitals() -> None:
    assert hotword_spelling("AB", ["", " A", "B"]) == "AB"
    with pytest.raises(InputError, match="cannot be recognised"):
        hotword_spelling("ab", ["", " A", "B"])
