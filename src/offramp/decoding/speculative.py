"""The one draft-verify loop: the only place that accepts tokens.

Each round a draft proposes tokens, one pass of the tower reads them all, and a row keeps those
that the tower itself would have chosen, plus the tower's next choice (speculative decoding:
arXiv 2211.17192; with early exit as the draft: LayerSkip, arXiv 2404.16710, section 4.3). What
is emitted is therefore what plain decoding emits, for every draft and in sampling too, because
a choice is a function of the logits (see sampling.py). Rows of a batch accept unevenly: the
cache keeps a length per row, and a row that has ended leaves the batch.

The newest token of a row has no keys yet; it heads the next round. Hidden states that the draft
computed on the way are handed over in its proposal, and verification resumes from them, so no
layer sees a position twice. The host waits for the device once a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.decoding.drafts import DecodeState, Draft, Outcome, Proposal
from offramp.decoding.sampling import Chooser
from offramp.decoding.stopping import RowEnd
from offramp.nn.cache import KVCache
from offramp.nn.device import upload
from offramp.nn.tower import Tower
from offramp.results import Step


@torch.inference_mode()
def speculate(
    tower: Tower,
    prompts: Sequence[Sequence[int]],
    draft: Draft,
    num_draft_tokens: int,
    chooser: Chooser,
    ends: Sequence[RowEnd],
) -> Iterator[Step]:
    """Yields a `Step` per row and round until every row has ended.

    prompts: token ids of at least one token each. num_draft_tokens: drafted per round at most.
    """
    longest = max(len(p) + e.remaining for p, e in zip(prompts, ends, strict=True))
    capacity = longest + min(num_draft_tokens, max(e.remaining for e in ends)) + 1
    cache = KVCache(tower.config, len(prompts), capacity, tower.device, tower.dtype)
    rows = list(range(len(prompts)))
    state = DecodeState(tower, cache, [list(p) for p in prompts], chooser)
    _prefill(state)
    draft.begin(state)
    while rows:
        room = max(ends[row].remaining for row in rows) - 1
        limit = min(num_draft_tokens, room)
        proposal = draft.propose(state, limit) if limit > 0 else Proposal.empty(state)
        drafted, chosen, watched = _verify(state, proposal)
        agreed = [_agreement(d, c) for d, c in zip(drafted, chosen, strict=True)]
        matches = {e: _matches(w, chosen, agreed) for e, w in watched.items()}
        accepted = []
        for b, row in enumerate(rows):
            taken, text = ends[row].push(chosen[b][: agreed[b] + 1])
            tokens = chosen[b][:taken]
            state.texts[b] += tokens
            chooser.commit(b, tokens, len(state.texts[b]))
            accepted.append(min(agreed[b], taken))
            yield Step(
                row=row,
                tokens=tuple(tokens),
                text=text,
                drafted=tuple(drafted[b]),
                accepted=accepted[b],
                exit_layer=proposal.exit_layer if proposal.exit_layer and drafted[b] else None,
                finish_reason=ends[row].reason,
            )
        cache.truncate([n - 1 for n in state.lengths()])
        draft.observe(state, Outcome([len(d) for d in drafted], accepted, matches))
        stay = [b for b, row in enumerate(rows) if ends[row].reason is None]
        if stay and len(stay) < len(rows):
            state.keep(stay)
            draft.keep(stay)
        rows = [rows[b] for b in stay]


def _prefill(state: DecodeState) -> None:
    """Run all but the last token of each prompt."""
    before = [n - 1 for n in state.lengths()]
    longest = max(before)
    if longest == 0:
        return
    # Shorter prompts are padded on the right: padding stands after all that could see it, and
    # its keys are forgotten at once.
    padded = [(text[:-1] + [0] * longest)[:longest] for text in state.texts]
    h = state.tower.embed(upload(padded, state.tower.device))
    state.tower.run(h, 0, state.tower.config.num_layers, state.cache)
    state.cache.truncate(before)


def _verify(
    state: DecodeState, proposal: Proposal
) -> tuple[list[list[int]], list[list[int]], dict[int, list[list[int]]]]:
    """Per row: what was drafted, what the tower chose, what each watched exit would have chosen.

    The choices are those after the newest token and after each of the n drafted ones.
    """
    tower, exit_layer = state.tower, proposal.exit_layer
    if proposal.tokens.shape[1] == 0 and proposal.hidden is None and not proposal.watch:
        # A plain step, without what would cost adaptive drafting where it never drafts.
        h = tower.run(tower.embed(state.newest()), 0, tower.config.num_layers, state.cache)
        logits = tower.logits(h, tower.config.num_layers)
        chosen_alone = state.chooser.choose(logits, state.lengths(), None).tolist()
        return [[] for _ in state.texts], chosen_alone, {}
    tokens = torch.cat((state.newest(), proposal.tokens), dim=1)
    if proposal.hidden is None:
        h = tower.embed(tokens)
    else:
        rest = tower.embed(tokens[:, proposal.hidden.shape[1] :])
        rest = tower.run(rest, 0, exit_layer, state.cache)
        h = torch.cat((proposal.hidden, rest), dim=1)
    hidden = _run_watched(state, h, exit_layer, proposal.watch)
    choices = {
        e: state.chooser.choose(tower.logits(x, e), state.lengths(), proposal.tokens)
        for e, x in hidden.items()
    }
    # One transfer for all of it: the only time in a round that the host waits for the device.
    read = torch.stack([F.pad(proposal.tokens, (0, 1)), *choices.values()]).tolist()
    drafted = [row[: proposal.length(b)] for b, row in enumerate(read[0])]
    chosen = dict(zip(choices, read[1:], strict=True))
    return drafted, chosen.pop(tower.config.num_layers), chosen


def _run_watched(
    state: DecodeState, h: Tensor, start: int, watch: tuple[int, ...]
) -> dict[int, Tensor]:
    """From layer `start` to the top: hidden states after each layer of `watch` above it, and at
    the top."""
    hidden = {}
    for stop in sorted({e for e in watch if e > start} | {state.tower.config.num_layers}):
        h = state.tower.run(h, start, stop, state.cache)
        hidden[stop], start = h, stop
    return hidden


def _agreement(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafted tokens, from the first on, the tower would have chosen."""
    for i, token in enumerate(drafted):
        if token != chosen[i]:
            return i
    return len(drafted)


def _matches(
    watched: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]], agreed: Sequence[int]
) -> tuple[int, int]:
    """(agreements, positions) of a watched exit where its context was the accepted text."""
    pairs = [
        (w, c)
        for ws, cs, a in zip(watched, chosen, agreed, strict=True)
        for w, c in zip(ws[: a + 1], cs[: a + 1], strict=True)
    ]
    return sum(w == c for w, c in pairs), len(pairs)
