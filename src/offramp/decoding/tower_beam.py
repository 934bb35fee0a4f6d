"""Beam search over a tower: the texts that it gives the most probability, and their scores.

The search is written once and asks only what may follow a text. Here every text is answered by one
call of the tower per token; verified_beam.py answers most of them from drafts and must find the
same. `TextRows` keeps the cache's rows by the texts they hold, so that no position is read twice
while one text grows out of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from offramp.config import check_counts
from offramp.decoding.ragged import upload_padded
from offramp.errors import InputError
from offramp.nn.cache import KVCache
from offramp.nn.device import upload
from offramp.nn.tower import Tower
from offramp.results import FinishReason

Tokens = tuple[int, ...]
Continuations = list[tuple[int, float]]  # tokens that may follow, best first, with log p


@dataclass(frozen=True)
class TowerBeam:
    """beam_size: open texts per length; n_best: texts returned; max_tokens: of a text at most.

    eos_ids: tokens that end a text; they count as its last token. A beam of 1 is greedy decoding.
    """

    max_tokens: int
    eos_ids: frozenset[int]
    beam_size: int = 4
    n_best: int = 1

    def __post_init__(self) -> None:
        check_counts(1, max_tokens=self.max_tokens, beam_size=self.beam_size, n_best=self.n_best)

    @property
    def width(self) -> int:
        """Continuations of one text that can matter: beam_size open ones, and the ends."""
        return self.beam_size + len(self.eos_ids)

    def ends(self, text: Tokens) -> bool:
        return bool(text) and text[-1] in self.eos_ids


@dataclass(frozen=True)
class TextHypothesis:
    """A text and its natural log probability; tokens: with the token that ended it, if one did."""

    tokens: Tokens
    score: float
    finish_reason: FinishReason


@torch.inference_mode()
def tower_beam(
    tower: Tower, prompt: Sequence[int], beam: TowerBeam, prefix: Tensor | None = None
) -> list[TextHypothesis]:
    """The `n_best` most probable texts that the beam meets, best first, one call per token.

    prompt: at least one token. prefix: embeddings [m, D] that stand before it.
    """
    rows = TextRows(tower, prompt, beam.max_tokens, prefix)

    def follow(texts: Sequence[Tokens]) -> list[Continuations]:
        last = torch.stack([states[-1] for states in rows.read(texts)])
        return best_tokens(tower, last, beam.width)

    return search(follow, beam)


def search(
    follow: Callable[[Sequence[Tokens]], list[Continuations]], beam: TowerBeam
) -> list[TextHypothesis]:
    """Beam search; `follow` gives the best `beam.width` continuations of each text.

    Of all texts one token longer, those that end count if they are among the first `beam_size`;
    of the others the first `beam_size` stay open. Scores only fall, so the search is over once
    `n_best` texts have ended that no open one can beat.
    """
    opened: list[tuple[Tokens, float]] = [((), 0.0)]
    done: list[TextHypothesis] = []
    for _ in range(beam.max_tokens):
        answers = follow([text for text, _ in opened])
        longer = ranked(
            ((*text, token), score + log_p)
            for (text, score), answer in zip(opened, answers, strict=True)
            for token, log_p in answer
        )
        opened = settle(longer, beam, done)
        if not opened or is_settled(done, opened[0][1], beam):
            break
    done += [TextHypothesis(text, score, "length") for text, score in opened]
    return best_texts(done, beam)


def ranked(texts: Iterable[tuple[Tokens, float]]) -> list[tuple[Tokens, float]]:
    """Best first; equal scores by their tokens, so that every search has one order."""
    return sorted(texts, key=lambda item: (-item[1], item[0]))


def settle(
    texts: Sequence[tuple[Tokens, float]], beam: TowerBeam, done: list[TextHypothesis]
) -> list[tuple[Tokens, float]]:
    """Adds the texts that end here to `done`; returns those that stay open. texts: best first."""
    firsts = texts[: beam.beam_size]
    done += [TextHypothesis(text, score, "stop") for text, score in firsts if beam.ends(text)]
    return [item for item in texts if not beam.ends(item[0])][: beam.beam_size]


def is_settled(done: Sequence[TextHypothesis], bound: float, beam: TowerBeam) -> bool:
    """Whether no text of at most `bound` can still become one of the `n_best`."""
    best = best_texts(done, beam)
    return len(best) == beam.n_best and bound <= best[-1].score


def best_texts(done: Iterable[TextHypothesis], beam: TowerBeam) -> list[TextHypothesis]:
    return sorted(done, key=lambda h: (-h.score, h.tokens))[: beam.n_best]


def best_tokens(tower: Tower, states: Tensor, count: int) -> list[Continuations]:
    """The `count` most probable next tokens after each of states [N, D] of the top layer."""
    logits = tower.logits(states[None], tower.config.num_layers)[0]
    return top_tokens(log_softmax(logits), count)


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def top_tokens(log_probs: Tensor, count: int) -> list[Continuations]:
    """The `count` best tokens of each row of log_probs [N, V]; fewer where V is smaller."""
    values, tokens = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [list(zip(ids, scores, strict=True)) for ids, scores in pairs]


class TextRows:
    """The rows of a cache by the text that each holds behind prefix and prompt."""

    def __init__(
        self,
        tower: Tower,
        prompt: Sequence[int],
        max_tokens: int,
        prefix: Tensor | None = None,
    ) -> None:
        """max_tokens: of a text at most. InputError: no prompt, or a prefix of another width."""
        if not prompt:
            raise InputError("the prompt is empty; give at least one token to start from")
        head = tower.embed(upload([list(prompt)], tower.device))
        if prefix is not None:
            if prefix.ndim != 2 or prefix.shape[1] != head.shape[2]:
                raise InputError(
                    f"the prefix has shape {list(prefix.shape)}; the decoder needs [m, "
                    f"{head.shape[2]}]"
                )
            head = torch.cat((prefix[None].to(head), head), dim=1)
        self._tower, self._head, self._start = tower, head, head.shape[1]
        # Twice the text: a short row is padded to what a long one reads.
        capacity = self._start + 2 * max_tokens
        self._cache = KVCache(tower.config, 1, capacity, tower.device, tower.dtype)
        self._texts: list[Tokens] | None = None  # None: not even the prompt has been read

    def read(self, texts: Sequence[Tokens]) -> list[Tensor]:
        """Read, in one call, what no row holds of `texts`, which the rows hold from now on.

        Returns for each text the top layer's states [n, D] at its last n positions, those read
        now; at first the state of the prompt's last token comes before those of the text. A row
        that none of `texts` goes on from is forgotten, and its text read again if it comes back.
        """
        sources = [self._source(text) for text in texts]
        order = [row for row, _ in sources]
        if order != list(range(self._cache.batch_size)):
            self._cache.keep(order)
        first = self._texts is None
        if not first:
            self._cache.truncate([self._start + common for _, common in sources])
        new = [text[common:] for text, (_, common) in zip(texts, sources, strict=True)]
        h = self._tower.embed(upload_padded(new, self._tower.device))
        if first:
            h = torch.cat((self._head.expand(len(texts), -1, -1), h), dim=1)
        h = self._tower.run(h, 0, self._tower.config.num_layers, self._cache)
        self._cache.truncate([self._start + len(text) for text in texts])
        self._texts = list(texts)
        at, more = (self._start - 1, 1) if first else (0, 0)
        return [row[at : at + more + len(n)] for row, n in zip(h, new, strict=True)]

    def _source(self, text: Tokens) -> tuple[int, int]:
        """(the row that holds most of `text`, how many tokens of it)."""
        if self._texts is None:
            return 0, 0
        common = [shared(text, held) for held in self._texts]
        longest = max(common)
        return common.index(longest), longest


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
