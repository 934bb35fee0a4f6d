"""Words that a language model expects, and hotwords that the user does, inside CTC beam search.

`WordScorer` is a `Scorer` for beam.py: whenever a word is complete, KenLM (inside the
flashlight-text wheel, the extra `lm`) scores it. Whether a word can still become a known one is
asked letter by letter, so any split of a word into pieces will do. flashlight's own lexicon
decoder is not used: it goes back to the root of its trie with the first frame of a word's last
piece, so it cannot hold that piece for two frames unless a separator follows, and our pieces
carry their space in front.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from offramp.data.speech import normalize_text
from offramp.decoding.ctc import piece_text
from offramp.decoding.ngram import UNK, arpa_words
from offramp.errors import DataError, InputError
from offramp.tokenizer import BLANK

_LN10 = math.log(10.0)


class LanguageModel:
    """A word n-gram model in KenLM's memory."""

    def __init__(self, path: Path, words: Iterable[str] | None = None) -> None:
        """path: an ARPA or KenLM binary file of order 2 or more. words: its words; None: read
        them from the ARPA file. InputError: the extra is missing; DataError: no such model."""
        try:
            kenlm = importlib.import_module("flashlight.lib.text.decoder.kenlm")
            dictionary = importlib.import_module("flashlight.lib.text.dictionary")
        except ImportError as error:
            raise InputError(
                "a language model needs flashlight-text: pip install 'offramp[lm]'"
            ) from error
        if not path.is_file():
            raise DataError(f"{path} is missing; give an ARPA file, such as train_ngram writes")
        self.words = frozenset(arpa_words(path) if words is None else words)
        listed = [*sorted(self.words), UNK]
        self._ids = {word: i for i, word in enumerate(listed)}
        self._words = dictionary.Dictionary(listed)  # the model refers to it
        try:
            with _quiet():
                self._model = kenlm.KenLM(str(path), self._words)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise DataError(f"{path} is no language model that KenLM reads: {reason}") from error

    def start(self) -> Any:
        """The state at the beginning of a sentence."""
        return self._model.start(False)

    def score(self, state: Any, word: str) -> tuple[Any, float]:
        """(state after `word`, its natural log probability); an unknown word scores as <unk>."""
        after, log10 = self._model.score(state, self._ids.get(word, self._ids[UNK]))
        return after, log10 * _LN10

    def finish(self, state: Any) -> float:
        """Natural log probability that the sentence ends here."""
        return float(self._model.finish(state)[1]) * _LN10


@contextmanager
def _quiet() -> Iterator[None]:
    """KenLM draws a progress bar on standard error, from C++, and has no switch for it."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@dataclass(frozen=True)
class WordScorerOptions:
    """All in natural log, against CTC's log probability of the text.

    lm_weight: what the language model's log probability is multiplied by. word_score: added per
    word, against the model's liking for few words. oov_score: added once per word that neither
    the model nor the hotwords know; -inf forbids such words (a closed lexicon). hotword_score:
    added per hotword found.
    """

    lm_weight: float = 0.4
    word_score: float = 1.5
    oov_score: float = -8.0
    hotword_score: float = 6.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.lm_weight < math.inf:
            raise InputError(f"lm_weight is {self.lm_weight}; it must be at least 0 and finite")
        if not math.isfinite(self.word_score):
            raise InputError(f"word_score is {self.word_score}; it must be finite")
        if not self.oov_score <= 0.0:  # not so for NaN
            raise InputError(f"oov_score is {self.oov_score}; it must be at most 0")
        if not 0.0 <= self.hotword_score < math.inf:
            raise InputError(
                f"hotword_score is {self.hotword_score}; it must be at least 0 and finite"
            )


class _State(NamedTuple):
    """word: the unfinished word; unknown: it has paid `oov_score`; hot: the end of the text that
    may become a hotword; credit: what was given for it in advance."""

    lm: Any
    word: str
    unknown: bool
    hot: str
    credit: float


class WordScorer:
    """Scores token sequences by the words they spell; see `WordScorerOptions`.

    A hotword is a word or several, spelled as recognised. Its score is given letter by letter,
    so that it helps while the beam still decides, and taken back where the text turns away. Of
    overlapping hotwords the one that began first counts.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        model: LanguageModel | None = None,
        hotwords: Sequence[str] = (),
        options: WordScorerOptions = WordScorerOptions(),
    ) -> None:
        """pieces: what each token id writes. model: None for hotwords alone."""
        self._parts = [piece_text(p).split(" ") for p in pieces]
        self._model, self._options = model, options
        phrases = [" ".join(phrase.split()) for phrase in hotwords]
        if "" in phrases:
            raise InputError("a hotword is empty; give words")
        self._hotwords = frozenset(phrases)
        self._credits = _credits(phrases, options.hotword_score)
        in_phrases = {word for phrase in phrases for word in phrase.split()}
        self._words = in_phrases | (set() if model is None else model.words)
        self._beginnings = {w[:n] for w in self._words for n in range(1, len(w) + 1)}

    def start(self) -> _State:
        return _State(None if self._model is None else self._model.start(), "", False, "", 0.0)

    def extend(self, state: _State, token: int) -> tuple[_State, float]:
        gain = 0.0
        for nth, part in enumerate(self._parts[token]):
            if nth:
                state, more = self._end_word(state)
                gain += more
            if part:
                state, more = self._spell(state, part)
                gain += more
        return state, gain

    def finish(self, state: _State) -> float:
        state, gain = self._end_word(state)
        gain -= state.credit  # a hotword of which the rest never came
        if self._model is not None:
            gain += self._options.lm_weight * self._model.finish(state.lm)
        return gain

    def _spell(self, state: _State, part: str) -> tuple[_State, float]:
        """More letters of the current word."""
        word, unknown, gain = state.word + part, state.unknown, 0.0
        if not unknown and self._model is not None and word not in self._beginnings:
            unknown, gain = True, self._options.oov_score
        hot = ""
        if state.hot or not state.word:  # a hotword begins where a word does
            hot = self._still_hot(state.hot + part)
        credit = self._credits.get(hot, 0.0)
        return _State(state.lm, word, unknown, hot, credit), gain + credit - state.credit

    def _end_word(self, state: _State) -> tuple[_State, float]:
        lm, word, unknown, hot, before = state
        if not word:
            return state, 0.0
        gain, credit = 0.0, 0.0
        if self._model is not None:
            lm, log_p = self._model.score(lm, word)
            gain = self._options.lm_weight * log_p + self._options.word_score
            if not unknown and word not in self._words:
                gain += self._options.oov_score
        if hot in self._hotwords:
            gain, hot = gain + self._options.hotword_score, ""
        else:
            hot = self._still_hot(hot + " ") if hot else ""
            credit = self._credits.get(hot, 0.0)
        return _State(lm, "", False, hot, credit), gain + credit - before

    def _still_hot(self, text: str) -> str:
        """The longest end of `text`, from the start of a word on, that begins a hotword."""
        while text and text not in self._credits:
            text = text.partition(" ")[2]
        return text


def hotword_spelling(phrase: str, pieces: Sequence[str]) -> str:
    """A hotword as the model would write it: as given, else normalised as transcripts are."""
    letters = set("".join(piece_text(piece) for piece in pieces if piece != BLANK)) | {" "}
    spelling = phrase
    if not set(phrase) <= letters:
        try:
            spelling = normalize_text(phrase)
        except DataError as error:
            raise InputError(f"hotword {phrase!r} cannot be recognised: {error}") from error
    if not spelling.strip() or not set(spelling) <= letters:
        raise InputError(
            f"hotword {phrase!r} cannot be recognised; this model writes words of the letters "
            f"{''.join(sorted(letters)).strip()}"
        )
    return spelling


def _credits(phrases: Iterable[str], score: float) -> dict[str, float]:
    """For each beginning of a phrase its share of the score; of several phrases the largest."""
    found: dict[str, float] = {}
    for phrase in phrases:
        for n in range(1, len(phrase) + 1):
            share = score * n / len(phrase)
            found[phrase[:n]] = max(found.get(phrase[:n], 0.0), share)
    return found
