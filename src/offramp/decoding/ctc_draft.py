"""What a CTC head heard as a draft of what the decoder will write, in the decoder's own tokens.

The whole of it rides the prompt's call, end of text included. Where the decoder writes something
else, it soon comes back to what was heard: a decoder that listens realigns by itself, unlike one
that invents. So the text is followed through what was heard (after Shallow Aggressive Decoding,
arXiv 2106.04970, which does this for text): the place is the one that takes the fewest edits. While
the newest token is not found there, another draft may fill the gap: see first_of.py.

A call that finds one mistake has read all that was heard behind it, and what the decoder chose
there corrects the next draft (Jacobi decoding, arXiv 2305.10427), so that a call can mend several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offramp.decoding.drafts import DecodeState, Draft, Outcome, Proposal
from offramp.errors import InputError

# Tokens of a draft that does not ride the prompt: each that is wrong costs time on a CPU, and where
# segments are long the whole rest of the text would cost more than it saves.
_MOST = 12
_BACK = 3  # tokens in a row that the decoder says as they were heard: it is back with what was


@dataclass(frozen=True)
class _Row:
    """Where one row stands in what was heard."""

    heard: list[int]
    known: int  # tokens of the row's text that were followed, prompt included
    distances: list[int]  # edits between what is written and each beginning of `heard`
    place: int = 0
    found: bool = True  # whether the newest token stands just before the place
    drafted_at: int = 0  # where in `heard` the last draft's first token stands, or would stand

    def after(self, tokens: Sequence[int]) -> _Row:
        """Where it stands once `tokens` are written too."""
        if not tokens:
            return self
        distances = self.distances
        for token in tokens:
            distances = edit_distances(self.heard, distances, token)
        expected = min(self.place + len(tokens), len(self.heard))
        place, found = find_place(self.heard, distances, tokens[-1], expected)
        known = self.known + len(tokens)
        return replace(self, known=known, distances=distances, place=place, found=found)

    def corrected(self, at: int, chosen: Sequence[int], eos_id: int) -> _Row:
        """With what the decoder chose at the places from `at` on, once it says what was heard.

        Before that it is still in the word that it changed; and it does not end the text there.
        """
        heard, distances, agreed = list(self.heard), self.distances, 0
        places = range(max(at, 0), len(heard) + 1)
        for i, token in zip(places, chosen[max(-at, 0) :], strict=False):
            if token == eos_id:
                break
            if agreed >= _BACK:
                if i == len(heard):  # more than was heard
                    distances = [*distances, distances[-1] + 1]
                heard[i : i + 1] = [token]
            agreed = agreed + 1 if heard[i : i + 1] == [token] else 0
        return replace(self, heard=heard, distances=distances)


class CTCDraft(Draft):
    """texts: per row of the batch the CTC head's tokens. eos_id: what ends the decoder's text.

    Proposes nothing for a row whose newest token was not heard; all that was heard with the prompt,
    and a stretch of it later on. InputError for a batch of other size.
    """

    def __init__(self, texts: Sequence[Sequence[int]], eos_id: int) -> None:
        self._texts, self._eos_id = [list(text) for text in texts], eos_id
        self._rows: list[_Row] = []

    def begin(self, state: DecodeState) -> None:
        if len(self._texts) != len(state.texts):
            raise InputError(
                f"the CTC draft has {len(self._texts)} texts and the batch {len(state.texts)} "
                "rows; give one text per row, in the same order"
            )
        pairs = zip(self._texts, state.lengths(), strict=True)
        self._rows = [_Row(heard, n, list(range(len(heard) + 1))) for heard, n in pairs]

    def open(self, state: DecodeState, k: int) -> Proposal:
        self._rows = [replace(row, drafted_at=row.place) for row in self._rows]
        rests = [self._rest(row) if row.found else [] for row in self._rows]
        return Proposal.ragged(state, [rest[:k] for rest in rests])

    def propose(self, state: DecodeState, k: int) -> Proposal:
        return self.open(state, min(k, _MOST))

    def extend(self, state: DecodeState, row: int, tokens: Sequence[int]) -> list[int]:
        after = self._rows[row].after(tokens)
        self._rows[row] = replace(self._rows[row], drafted_at=after.place - len(tokens))
        return self._rest(after)[: max(_MOST - len(tokens), 0)]

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        rows = []
        for row, text, beyond in zip(self._rows, state.texts, outcome.beyond, strict=True):
            new = text[row.known :]
            rows.append(row.after(new).corrected(row.drafted_at + len(new), beyond, self._eos_id))
        self._rows = rows

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[r] for r in rows]

    def _rest(self, row: _Row) -> list[int]:
        return [*row.heard[row.place :], self._eos_id]


def edit_distances(heard: Sequence[int], distances: Sequence[int], token: int) -> list[int]:
    """The next row of the edit-distance table: `distances` between a text and each beginning of
    `heard`, the empty one first, become those of the text with `token` after it."""
    made = [distances[0] + 1]
    for i, other in enumerate(heard):
        made.append(min(distances[i] + (other != token), distances[i + 1] + 1, made[i] + 1))
    return made


def find_place(
    heard: Sequence[int], distances: Sequence[int], newest: int, expected: int
) -> tuple[int, bool]:
    """(where in `heard` the text goes on, whether its newest token stands just before).

    Of the places with the fewest edits one that the newest token leads up to, if there is one, and
    of these the nearest to `expected`.
    """
    least = min(distances)
    places = [i for i, d in enumerate(distances) if d == least]
    led = [i for i in places if i > 0 and heard[i - 1] == newest]
    return min(led or places, key=lambda i: abs(i - expected)), bool(led)
