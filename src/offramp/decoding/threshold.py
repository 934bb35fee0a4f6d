"""LOSSY: heads 2 to K are believed where they are certain enough, and nobody verifies them.

The faster and worse way to use multi-token prediction (arXiv 2409.08148, its second way of
decoding): the text may differ from the tower's own, which no other loop here allows. Each `Step`
says how many of its tokens were not verified. For the same text in few calls: `HeadsDraft`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decoding.heads_draft import future_logits
from offramp.decoding.ragged import at_columns, check_prefixes, embed_rows, upload_padded
from offramp.decoding.sampling import Chooser
from offramp.decoding.stopping import RowEnd
from offramp.errors import InputError
from offramp.nn.cache import KVCache
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower
from offramp.results import Step


@dataclass(frozen=True)
class Trust:
    """In `heads`: a head's token stays if it and those before it are at least so probable.

    min_confidence above 1 trusts no head, which is plain decoding; 0 trusts all of them.
    """

    heads: Heads
    min_confidence: float

    def __post_init__(self) -> None:
        if math.isnan(self.min_confidence) or self.min_confidence < 0.0:
            raise InputError(
                f"min_confidence is {self.min_confidence}; it must be 0 (trust every head) or "
                "more (above 1: none)"
            )


@torch.inference_mode()
def decode_unverified(
    tower: Tower,
    prompts: Sequence[Sequence[int]],
    trust: Trust,
    chooser: Chooser,
    ends: Sequence[RowEnd],
    prefixes: Sequence[Tensor] | None = None,
) -> Iterator[Step]:
    """Yields a `Step` per row and call of the tower until every row has ended.

    prompts: token ids of at least one token each. prefixes: per prompt the embeddings [m, D] that
    stand before it.
    """
    if prefixes is not None:
        check_prefixes(tower, prefixes, len(prompts))
    before = list(prefixes or ())
    rows, unread = list(range(len(prompts))), [list(p) for p in prompts]
    lengths = [len(p) for p in prompts]
    cache = _cache(tower, lengths, ends, before)
    while rows:
        h = _read(tower, unread, before, cache)
        before = []
        tokens, trusted = _choose(tower, h, trust, chooser, lengths)
        for b, row in enumerate(rows):
            taken, text = ends[row].push(tokens[b][: 1 + trusted[b]])
            unread[b] = tokens[b][:taken]
            lengths[b] += taken
            chooser.commit(b, unread[b], lengths[b])
            yield Step(
                row=row,
                tokens=tuple(unread[b]),
                text=text,
                drafted=(),
                accepted=0,
                exit_layer=None,
                finish_reason=ends[row].reason,
                unverified=taken - 1,
            )
        stay = [b for b, row in enumerate(rows) if ends[row].reason is None]
        if stay and len(stay) < len(rows):
            cache.keep(stay)
            chooser.keep(stay)
        rows, unread = [rows[b] for b in stay], [unread[b] for b in stay]
        lengths = [lengths[b] for b in stay]


def _cache(
    tower: Tower, lengths: Sequence[int], ends: Sequence[RowEnd], before: Sequence[Tensor]
) -> KVCache:
    """Room for the longest row and for padding it to what another emits at once."""
    prefixed = [p.shape[0] for p in before] or [0] * len(lengths)
    totals = zip(prefixed, lengths, ends, strict=True)
    longest = max(m + n + e.remaining for m, n, e in totals)
    capacity = longest + max(e.remaining for e in ends)
    return KVCache(tower.config, len(lengths), capacity, tower.device, tower.dtype)


def _read(
    tower: Tower, unread: Sequence[Sequence[int]], before: Sequence[Tensor], cache: KVCache
) -> Tensor:
    """One call for all that is unread; the state [B, D] after each row's newest token."""
    top, counts = tower.config.num_layers, [len(u) for u in unread]
    h = embed_rows(tower, upload_padded(unread, tower.device), counts, before)
    if before:
        counts = [p.shape[0] + n for p, n in zip(before, counts, strict=True)]
    held = [n + new for n, new in zip(cache.length(0), counts, strict=True)]
    h = tower.run(h, 0, top, cache)
    cache.truncate(held)
    return at_columns(h, [[n - 1] for n in counts])[:, 0]


def _choose(
    tower: Tower, h: Tensor, trust: Trust, chooser: Chooser, lengths: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """(the K tokens that the heads say come next, how many of heads 2 to K are trusted), by row."""
    own = tower.logits(h[:, None], tower.config.num_layers)
    later = future_logits(trust.heads, h, tower)
    tokens = chooser.choose(torch.cat((own, later), dim=1), lengths, None)
    # The model's own probability, before temperature and filters.
    p = later.float().softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    trusted = (p >= trust.min_confidence).cumprod(dim=1).sum(dim=1)
    *read, counts = torch.cat((tokens.T, trusted[None])).tolist()
    return [list(row) for row in zip(*read, strict=True)], counts
