"""When a row ends: token ids, stop strings, a number of tokens. Exactly where, too.

Tokens are pushed one by one, so a round that accepts past the end is cut at the token that
plain decoding would have stopped at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.errors import InputError
from offramp.results import FinishReason
from offramp.tokenizer import TextStream


@dataclass(frozen=True)
class Stop:
    """max_tokens: emitted at most; token_ids: end the row and stay in its tokens, not its text;
    strings: end the row, and the text ends before them."""

    max_tokens: int
    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if "" in self.strings:
            raise InputError("a stop string is empty; it would end every text at once")


class RowEnd:
    """One row's progress towards its end, and its text."""

    def __init__(self, stop: Stop, stream: TextStream | None) -> None:
        """Without `stream` there is no text, and `stop.strings` must be empty."""
        if stop.strings and stream is None:
            raise InputError("stop strings need a tokenizer; give token ids instead")
        self._stop, self._stream = stop, stream
        self._count = 0
        self._held = ""  # text not given out yet: it may be the start of a stop string
        self.reason: FinishReason | None = None

    @property
    def remaining(self) -> int:
        return self._stop.max_tokens - self._count

    def push(self, tokens: Sequence[int]) -> tuple[int, str]:
        """(how many of `tokens` the row takes, the text that is now certain)."""
        taken, text = 0, ""
        for token in tokens:
            if self.reason is not None:
                break
            taken, text = taken + 1, text + self._one(token)
        return taken, text

    def _one(self, token: int) -> str:
        self._count += 1
        ended = token in self._stop.token_ids
        if self._stream is not None and not ended:
            self._held += self._stream.push(token)
        if ended:
            self.reason = "stop"
        elif found := [at for s in self._stop.strings if (at := self._held.find(s)) >= 0]:
            self.reason, self._held = "stop", self._held[: min(found)]
            return self._release(all_of_it=True)
        elif self.remaining == 0:
            self.reason = "length"
        if self.reason is not None and self._stream is not None:
            self._held += self._stream.flush()
            if found := [at for s in self._stop.strings if (at := self._held.find(s)) >= 0]:
                self._held = self._held[: min(found)]
        return self._release(all_of_it=self.reason is not None)

    def _release(self, all_of_it: bool) -> str:
        keep = 0 if all_of_it else max((self._overlap(s) for s in self._stop.strings), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _overlap(self, string: str) -> int:
        """Length of the longest end of the held text that is a proper beginning of `string`."""
        longest = min(len(self._held), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
