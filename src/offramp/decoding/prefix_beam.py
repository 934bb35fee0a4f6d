"""Beam search that grows texts by blocks of up to K tokens: fast N-best lists, for MWER training.

One call gives a text's K head distributions, which are taken for independent (arXiv 2409.08148);
the most probable blocks of them lengthen the text. The paper's search is not public; this is our
reconstruction. How many tokens a text's blocks have depends on that text alone, so each text is
met in one way, and no probabilities of different ways are to be added up. A score is that of the
blocks, not the tower's own: rescore with head 1. With K = 1 it is the plain beam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decoding.tower_beam import (
    Continuations,
    TextHypothesis,
    TextRows,
    Tokens,
    TowerBeam,
    best_texts,
    is_settled,
    log_softmax,
    ranked,
    settle,
    top_tokens,
)
from offramp.errors import InputError
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower


@dataclass(frozen=True)
class PrefixBeam(TowerBeam):
    """min_confidence: a block ends before the first of heads 2 to K whose most probable token is
    less probable than this; 0 never cuts, 1 leaves head 1 alone unless a head is certain."""

    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.min_confidence <= 1.0:
            raise InputError(
                f"min_confidence is {self.min_confidence}; it must lie between 0 and 1"
            )


@torch.inference_mode()
def prefix_beam(
    tower: Tower,
    heads: Heads | None,
    prompt: Sequence[int],
    beam: PrefixBeam,
    prefix: Tensor | None = None,
) -> list[TextHypothesis]:
    """The `n_best` texts with the largest scores, best first and never one twice.

    heads: 2 to K; None: K is 1. prompt: at least one token. prefix: embeddings [m, D] that stand
    before it. A call reads the `beam_size` best texts of one length.
    """
    rows = TextRows(tower, prompt, beam.max_tokens, prefix)
    waiting: dict[int, list[tuple[Tokens, float]]] = {0: [((), 0.0)]}
    done: list[TextHypothesis] = []
    while waiting:
        length = min(waiting)
        opened = settle(ranked(waiting.pop(length)), beam, done)
        if length == beam.max_tokens:
            done += [TextHypothesis(text, score, "length") for text, score in opened]
            break  # no text is longer
        left = [score for texts in (opened, *waiting.values()) for _, score in texts]
        if is_settled(done, max(left, default=-math.inf), beam):
            break
        if not opened:
            continue
        states = torch.stack([read[-1] for read in rows.read([text for text, _ in opened])])
        predicted = _predict(tower, heads, states, beam)
        for (text, score), future in zip(opened, predicted, strict=True):
            for block, gain in best_blocks(future[: beam.max_tokens - length], beam):
                longer = (*text, *block)
                waiting.setdefault(len(longer), []).append((longer, score + gain))
    return best_texts(done, beam)


def best_blocks(heads: Sequence[Continuations], beam: TowerBeam) -> list[tuple[Tokens, float]]:
    """The `beam.width` most probable blocks: a token of each head up to the first that ends a text.

    heads: what `candidates` finds for each; no other token stands in one of the best blocks, which
    begin with the best beginnings: to replace a token by a better one makes the block better.
    """
    ended: list[tuple[Tokens, float]] = []
    opened: list[tuple[Tokens, float]] = [((), 0.0)]
    for tokens in heads:
        longer = [
            ((*block, token), score + log_p) for block, score in opened for token, log_p in tokens
        ]
        ended += [item for item in longer if beam.ends(item[0])]
        opened = ranked(item for item in longer if not beam.ends(item[0]))[: beam.width]
    return ranked(ended + opened)[: beam.width]


def candidates(log_probs: Tensor, beam: TowerBeam) -> list[Continuations]:
    """For each row of log_probs [N, V] the `beam.width` best tokens, and all that end a text.

    An end spares its block what the heads behind it would cost, so it may be in a good block
    without being a good token.
    """
    found = top_tokens(log_probs, beam.width)
    V = log_probs.shape[-1]
    ends = [token for token in sorted(beam.eos_ids) if token < V]
    for best, scores in zip(found, log_probs[:, ends].tolist(), strict=True):
        have = {token for token, _ in best}
        best += [item for item in zip(ends, scores, strict=True) if item[0] not in have]
    return found


def _predict(
    tower: Tower, heads: Heads | None, states: Tensor, beam: PrefixBeam
) -> list[list[Continuations]]:
    """For each of states [N, D] the best tokens of the heads that its blocks may take from."""
    first = log_softmax(tower.logits(states[None], tower.config.num_layers)[0])
    found = [[tokens] for tokens in candidates(first, beam)]
    if heads is None:
        return found
    future = log_softmax(heads.logits(states, tower))  # [N, K - 1, V]
    limit = math.log(beam.min_confidence) if beam.min_confidence else -math.inf
    for mine, log_probs in zip(found, future, strict=True):
        for tokens in candidates(log_probs, beam):
            if tokens[0][1] < limit:
                break
            mine.append(tokens)
    return found
