"""Multi-token prediction as a draft: heads 2 to K say what comes after the newest token.

They read the state that the newest token was chosen from, so the call that verifies one draft
has already computed all that the next one needs: one decoder call per round (arXiv 2409.08148;
blockwise parallel decoding, arXiv 1811.03115).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from offramp.config import check_share
from offramp.decoding.drafts import DecodeState, Draft, Outcome, Proposal
from offramp.nn.device import upload
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower


class HeadsDraft(Draft):
    """Heads 2 to K of the tower, K - 1 tokens per round.

    It opens without tokens, so the prompt's call is the first that it drafts from. min_confidence:
    a row drafts up to the first head that is less certain of its token; 0: all of them.
    """

    wants_hidden = True

    def __init__(self, heads: Heads, min_confidence: float = 0.0) -> None:
        check_share(min_confidence=min_confidence)
        self._heads, self._min_confidence = heads, min_confidence
        self._hidden: Tensor | None = None  # [B, D]

    def begin(self, state: DecodeState) -> None:
        self._hidden = None

    def open(self, state: DecodeState, k: int) -> Proposal:
        return Proposal.empty(state)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        if self._hidden is None:  # no call of the tower has chosen anything yet
            return Proposal.empty(state)
        logits = future_logits(self._heads, self._hidden, state.tower)[:, :k]
        tokens = state.chooser.choose(logits, state.lengths(), None)
        if not self._min_confidence:
            return Proposal(tokens)
        certain = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0] >= self._min_confidence
        lengths: list[int] = certain.cumprod(1).sum(1).tolist()
        return Proposal.ragged(
            state, [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        )

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        assert outcome.hidden is not None, "wants_hidden says so"
        self._hidden = outcome.hidden

    def keep(self, rows: Sequence[int]) -> None:
        assert self._hidden is not None, "observe comes first"
        self._hidden = self._hidden[upload(rows, self._hidden.device)]


def future_logits(heads: Heads, h: Tensor, tower: Tower) -> Tensor:
    """States after all layers [B, D] -> logits [B, K-1, V] of heads 2 to K; tokens outside their
    vocabulary have -inf."""
    logits = heads.logits(h, tower)
    return F.pad(logits, (0, tower.config.vocab_size - logits.shape[-1]), value=-math.inf)
