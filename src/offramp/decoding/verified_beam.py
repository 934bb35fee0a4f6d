"""Beam search with drafts: the texts and scores of the plain beam, in fewer calls of the tower.

What the tower said after a text is remembered. While all open texts have been read ahead, the
search goes on without it; where one has not, a single call reads every such text and, behind each,
a draft of what may follow. A wrong draft costs time: the search only ever uses what the tower said
after the very text it asks about. What pays is that texts which differ in one word soon go on
alike, so each draws its draft from the same tail, such as the encoder's CTC text (`CTCTails`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from offramp.decoding.ctc_draft import edit_distances
from offramp.decoding.tower_beam import (
    Continuations,
    TextHypothesis,
    TextRows,
    Tokens,
    TowerBeam,
    best_tokens,
    search,
)
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower


class TailDraft(Protocol):
    """Drafts for a beam: what may follow texts, whichever of them the search asks about."""

    def tails(self, texts: Sequence[Tokens], states: Sequence[Tensor | None]) -> list[Tokens]:
        """A draft, possibly empty, behind each of `texts`.

        states: [D] of the tower's top layer where it gave the text's last token; None: the text
        is empty.
        """
        ...


@torch.inference_mode()
def verified_beam(
    tower: Tower,
    prompt: Sequence[int],
    beam: TowerBeam,
    draft: TailDraft,
    prefix: Tensor | None = None,
) -> list[TextHypothesis]:
    """What `tower_beam` returns, in at most as many calls.

    prompt: at least one token. prefix: embeddings [m, D] that stand before it.
    """
    rows = TextRows(tower, prompt, beam.max_tokens, prefix)
    return search(_Memory(tower, rows, beam, draft).follow, beam)


class _Memory:
    """What the tower said after every text it has read."""

    def __init__(self, tower: Tower, rows: TextRows, beam: TowerBeam, draft: TailDraft) -> None:
        self._tower, self._rows, self._beam, self._draft = tower, rows, beam, draft
        self._known: dict[Tokens, Continuations] = {}
        self._states: dict[Tokens, Tensor] = {}
        self._held: list[Tokens] = []  # the texts that the rows hold

    def follow(self, texts: Sequence[Tokens]) -> list[Continuations]:
        missing = [text for text in texts if text not in self._known]
        if missing:
            self._read(texts, missing)
        return [self._known[text] for text in texts]

    def _read(self, texts: Sequence[Tokens], missing: Sequence[Tokens]) -> None:
        before = [self._states[text[:-1]] if text else None for text in missing]
        tails = self._draft.tails(missing, before)
        ahead = {
            text: (*text, *self._useful(text, tail))
            for text, tail in zip(missing, tails, strict=True)
        }
        # An open text that was read ahead keeps its row, so nothing of it is read again.
        wanted = [ahead[text] if text in ahead else self._holding(text) for text in texts]
        read = self._rows.read(wanted)
        self._held = wanted
        told = best_tokens(self._tower, torch.cat(read), self._beam.width)
        at = 0
        for text, states in zip(wanted, read, strict=True):
            for i, state in enumerate(states):
                known = text[: len(text) - len(states) + 1 + i]
                self._known[known], self._states[known] = told[at + i], state
            at += len(states)

    def _useful(self, text: Tokens, tail: Tokens) -> Tokens:
        """The part of a draft after which the search may still ask: no end, and not too long."""
        room = self._beam.max_tokens - 1 - len(text)
        ends = [i for i, token in enumerate(tail) if token in self._beam.eos_ids]
        return tail[: min([room, *ends])]

    def _holding(self, text: Tokens) -> Tokens:
        """The held text that begins with `text`."""
        return next(held for held in self._held if held[: len(text)] == text)


class CTCTails:
    """The rest of one text, CTC's, from where the beam's text has got to in it.

    That place is the one up to which the two differ by the fewest edits; of several the furthest,
    so a wrong word is taken for a substitution. One row of the edit distances is kept per text.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        """tokens: the drafted text, without the token that ends it."""
        self._tokens = tuple(tokens)
        self._distances: dict[Tokens, list[int]] = {(): list(range(len(self._tokens) + 1))}

    def tails(self, texts: Sequence[Tokens], states: Sequence[Tensor | None]) -> list[Tokens]:
        return [self._tokens[self._reached(text) :] for text in texts]

    def _reached(self, text: Tokens) -> int:
        if not text:
            return 0
        row = self._row(text)
        nearest = min(row)
        return max(i for i, distance in enumerate(row) if distance == nearest)

    def _row(self, text: Tokens) -> list[int]:
        """Edits between `text` and each beginning of the drafted one."""
        known = len(text)
        while text[:known] not in self._distances:
            known -= 1
        for n in range(known, len(text)):
            above = self._distances[text[:n]]
            self._distances[text[: n + 1]] = edit_distances(self._tokens, above, text[n])
        return self._distances[text]


class HeadTails:
    """The most probable tokens of heads 2 to K, read at the state that gave the last token.

    They are guesses from before that token was chosen: good behind the most probable one.
    """

    def __init__(self, heads: Heads, tower: Tower) -> None:
        self._heads, self._tower = heads, tower

    def tails(self, texts: Sequence[Tokens], states: Sequence[Tensor | None]) -> list[Tokens]:
        given = [state for state in states if state is not None]
        if not given:
            return [()] * len(texts)
        best = iter(self._heads.logits(torch.stack(given), self._tower).argmax(-1).tolist())
        return [() if state is None else tuple(next(best)) for state in states]
