"""A guard against text that the audio does not hold, by the encoder's CTC head.

A decoder that has lost its place goes on: it makes up words, or says its last ones again and again.
Both show as a run of tokens that no frame supports (alignment.py). A long run is flagged anywhere;
a repetition sooner, but only where nothing is left to be heard, as people do repeat themselves.
What is flagged follows from the tokens alone, so a guarded text is the same for every draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from offramp.config import check_counts, check_positive, check_range
from offramp.decoding.alignment import TextAligner
from offramp.decoding.stopping import RowEnd, Stop
from offramp.results import TextFlag
from offramp.tokenizer import TextStream


@dataclass(frozen=True)
class GuardOptions:
    """max_unheard: unheard tokens in a row that are still let pass. repeats: times that the same
    tokens, the last time unheard, may not stand in a row once the audio is exhausted. min_odds:
    see `alignment.align_text`."""

    max_unheard: int = 8
    repeats: int = 3
    min_odds: float = 1e-3

    def __post_init__(self) -> None:
        check_counts(1, max_unheard=self.max_unheard)
        check_counts(2, repeats=self.repeats)
        check_positive(min_odds=self.min_odds)
        check_range(0.0, 1.0, min_odds=self.min_odds)


@dataclass(frozen=True)
class Flag:
    """Tokens [start, stop) of the text are not in the audio; `stop` as far as was read."""

    kind: Literal["unheard", "repetition"]
    start: int
    stop: int


class Guard:
    """Follows one text as it grows."""

    def __init__(
        self, log_probs: Tensor, blank_id: int, options: GuardOptions = GuardOptions()
    ) -> None:
        """log_probs: [T, V] of one utterance's CTC head, without padding, in the text's tokens."""
        self._aligner = TextAligner(log_probs, blank_id, options.min_odds)
        self._options = options
        self._tokens: list[int] = []
        self._last_emission = _last_emission(log_probs, blank_id)
        self.flags: list[Flag] = []

    def push(self, token: int) -> Flag | None:
        """The text goes on with `token`: the flag that it raises or lengthens, if any."""
        self._aligner.push(token)
        self._tokens.append(token)
        found = self._look()
        if found is None:
            return None
        self.flags = joined([*self.flags, found])
        return self.flags[-1]

    def _look(self) -> Flag | None:
        """What is wrong with the end of the text."""
        unheard, passed = self._aligner.tail()
        length = len(self._tokens)
        if unheard > self._options.max_unheard:
            return Flag("unheard", length - unheard, length)
        if passed <= self._last_emission:
            return None
        for period in range(1, unheard + 1):
            span = period * self._options.repeats
            if repeats(self._tokens[-span:], period) and span <= length:
                return Flag("repetition", length - span, length)
        return None


class GuardedEnd(RowEnd):
    """A row's end that shows its tokens to a guard, and may end the row at the first flag.

    The flagged tokens stay in the text; `guard.flags` says which they are.
    """

    def __init__(
        self, stop: Stop, stream: TextStream | None, guard: Guard, stops: bool = True
    ) -> None:
        super().__init__(stop, stream)
        self.guard, self._stops = guard, stops

    def _one(self, token: int) -> str:
        text = super()._one(token)
        if token in self._stop.token_ids:
            return text
        flag = self.guard.push(token)
        if flag is not None and self._stops and self.reason is None:
            self.reason = "stop"
            if self._stream is not None:
                self._held += self._stream.flush()
            text += self._release(all_of_it=True)
        return text


F = TypeVar("F", Flag, TextFlag)


def joined(flags: Sequence[F]) -> list[F]:
    """Flags in the order of their ends, those that touch as one, of the kind that came first."""
    made: list[F] = []
    for flag in flags:
        start = flag.start
        while made and start <= made[-1].stop:
            flag = replace(made.pop(), stop=flag.stop)
            start = min(start, flag.start)
        made.append(replace(flag, start=start))
    return made


def repeats(tokens: Sequence[int], period: int) -> bool:
    """Whether `tokens` are their first `period` over and over."""
    return all(a == b for a, b in zip(tokens, tokens[period:], strict=False))


def _last_emission(log_probs: Tensor, blank_id: int) -> int:
    """The last frame at which the greedy path starts a token; -1: it writes nothing."""
    best = log_probs.argmax(-1)
    before = torch.cat((best.new_tensor([blank_id]), best[:-1]))
    frames = ((best != blank_id) & (best != before)).nonzero()
    return int(frames[-1]) if len(frames) else -1
