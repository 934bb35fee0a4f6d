"""Where a decoder's text stands in the audio, by the encoder's CTC head: times and confidence.

`ctc.align` forces every token onto the frames. A decoder may write what was never said, so here a
token may also be left out, wherever nothing comes near to it: what the audio does not hold has no
time, and spoils no other token's. The most probable path is found token by token, not frame by
frame, so that a text can be followed while it is still growing (guard.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from torch import Tensor

from offramp.decoding.ctc import Hypothesis, words
from offramp.errors import InputError
from offramp.results import Word

_LEAST = -60.0  # log probabilities below count as this, so that sums of them stay finite
_NEVER = -1e9
_LATER = 1e-6  # of equal tokens of which one was said, the first is heard: a later one costs less


@dataclass(frozen=True)
class TokenSpan:
    """One token of a text; it is emitted in frames [start, end), or unheard where they are equal.

    confidence: its largest posterior from its own start to the next heard token's, 0 if unheard.
    An unheard token stands where the heard one before it starts, or else the one after it.
    """

    token: int
    start: int
    end: int
    confidence: float

    @property
    def heard(self) -> bool:
        return self.end > self.start


def align_text(
    log_probs: Tensor, tokens: Sequence[int], blank_id: int, min_odds: float = 1e-3
) -> list[TokenSpan]:
    """Each token's place on the most probable path that writes `tokens` and leaves some out.

    log_probs: [T, V] of one utterance, without padding. min_odds: what a token that is left out
    costs; so a token that stands alone is heard if some frame of its place has it at least so
    much as probable as the blank. Any text fits any number of frames. InputError: a token is the
    blank or not in V.
    """
    log_probs = log_probs.detach().cpu()
    aligner = TextAligner(log_probs, blank_id, min_odds)
    for token in tokens:
        aligner.push(token)
    places = aligner.places()
    heard = [place for place in places if place is not None]
    starts = iter([*(start for start, _ in heard[1:]), len(log_probs)])
    at = heard[0][0] if heard else 0
    spans = []
    for token, place in zip(tokens, places, strict=True):
        if place is None:
            spans.append(TokenSpan(token, at, at, 0.0))
            continue
        at, end = place
        peak = math.exp(float(log_probs[at : next(starts), token].max()))
        spans.append(TokenSpan(token, at, end, min(1.0, peak)))
    return spans


def text_words(
    spans: Sequence[TokenSpan],
    parts: Sequence[str],
    frame_s: float,
    duration_s: float = math.inf,
) -> list[Word]:
    """Words as `ctc.words` gives them; the confidence of one with an unheard token is 0.

    parts: what each token of `spans` adds to the text (`tokenizer.TextStream`). frame_s: seconds
    per frame of the CTC head.
    """
    frames, confidences = (tuple(s.start for s in spans), tuple(s.confidence for s in spans))
    numbered = Hypothesis(tuple(range(len(spans))), frames, 0.0, confidences)
    return words(numbered, parts, frame_s, duration_s)


@dataclass(frozen=True)
class _Column:
    """One token's share of the table, by the number of frames passed, t = 0..T + 1.

    label, blank: the best score of the text so far that ends in this token's frame t - 1, or in a
    blank there. The rest says how: the frame at which the token of `label` starts, whether it
    starts right after the token before; the frame after the token of `blank`, -1: it was left out.
    """

    label: np.ndarray
    blank: np.ndarray
    start: np.ndarray
    joined: np.ndarray
    end: np.ndarray


class TextAligner:
    """The best paths of a growing text through one utterance; a blank stands in place of the
    tokens that they leave out."""

    def __init__(self, log_probs: Tensor, blank_id: int, min_odds: float = 1e-3) -> None:
        """log_probs: [T, V]; min_odds: see `align_text`."""
        if not 0.0 < min_odds < 1.0:
            raise InputError(f"min_odds is {min_odds}; it must be greater than 0 and less than 1")
        grid = log_probs.detach().cpu().double().numpy()
        # A blank that costs nothing stands behind the last frame, for what is left out there.
        self._grid = np.full((len(grid) + 1, grid.shape[1]), _NEVER)
        self._grid[:-1] = np.maximum(grid, _LEAST)
        self._grid[-1, blank_id] = 0.0
        self._blank_id, self._skip = blank_id, math.log(min_odds)
        self._blanks = _sums(self._grid[:, blank_id])
        self._tokens: list[int] = []
        none = np.full(len(self._blanks), -np.inf)
        index = np.zeros(len(self._blanks), int)
        self._columns = [_Column(none, self._blanks, index, index > 0, index)]
        best = self._grid.max(axis=1)
        self._rest = best.sum() - _sums(best)  # of the best path through the frames not passed yet

    def push(self, token: int) -> None:
        """The text goes on with `token`."""
        V = self._grid.shape[1]
        if not 0 <= token < V or token == self._blank_id:
            raise InputError(
                f"token {token} cannot be aligned; the CTC head has {V} tokens, of which "
                f"{self._blank_id} is the blank"
            )
        before = self._columns[-1]
        # The same token twice in a row needs a blank in between.
        again = bool(self._tokens) and self._tokens[-1] == token
        joined = (before.label > before.blank) & (not again)
        enter = np.where(joined, before.label, before.blank)
        label, start = _held(enter, _sums(self._grid[:, token]))
        kept, end = _held(label, self._blanks)
        left_out = before.blank + self._skip + _LATER * len(self._tokens)
        skipped = left_out > kept
        blank = np.where(skipped, left_out, kept)
        self._columns.append(_Column(label, blank, start, joined, np.where(skipped, -1, end)))
        self._tokens.append(token)

    def places(self) -> list[tuple[int, int] | None]:
        """Frames [start, end) of each token where the text is all that was said; None: left out."""
        return [*self._trace(len(self._blanks) - 1, in_label=False)][::-1]

    def tail(self) -> tuple[int, int]:
        """(how many tokens at the end are left out, the frame that the text has got to), where
        anything may still follow."""
        last = self._columns[-1]
        passed = int((np.maximum(last.label, last.blank) + self._rest).argmax())
        places = self._trace(passed, bool(last.label[passed] > last.blank[passed]))
        return sum(1 for _ in takewhile(lambda place: place is None, places)), passed

    def _trace(self, at: int, in_label: bool) -> Iterator[tuple[int, int] | None]:
        """Places from the last token to the first, on the best path that is at `at` after it."""
        for column in reversed(self._columns[1:]):
            if not in_label:
                if column.end[at] < 0:
                    yield None
                    continue
                at = int(column.end[at])
            start = int(column.start[at])
            yield start, at
            at, in_label = start, bool(column.joined[start])


def _sums(x: np.ndarray) -> np.ndarray:
    """Of the first t numbers, for t = 0..len(x)."""
    return np.concatenate(([0.0], np.cumsum(x)))


def _held(enter: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the best score of entering a symbol at a frame s < t and holding it up to t; that s).

    enter: the score of being about to read frame s; sums: of the symbol's log probabilities.
    """
    gain = enter - sums
    best = np.maximum.accumulate(gain)
    rises = np.concatenate(([False], gain[1:] > best[:-1]))
    since = np.maximum.accumulate(np.where(rises, np.arange(len(gain)), 0))
    score, start = np.full(len(gain), -np.inf), np.zeros(len(gain), int)
    score[1:], start[1:] = sums[1:] + best[:-1], since[:-1]
    return score, start
