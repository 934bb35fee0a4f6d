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

Where the prompt is known to be followed by something (a transcript of the audio that the prompt
holds), the draft rides along: prompt and draft are read in one call (`Draft.open`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.decoding.drafts import DecodeState, Draft, Outcome, Proposal
from offramp.decoding.ragged import at_columns, check_prefixes, embed_rows, upload_padded
from offramp.decoding.sampling import Chooser
from offramp.decoding.stopping import RowEnd
from offramp.errors import InputError
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
    prefixes: Sequence[Tensor] | None = None,
) -> Iterator[Step]:
    """Yields a `Step` per row and round until every row has ended.

    prompts: token ids of at least one token each. num_draft_tokens: drafted per round at most.
    prefixes: per prompt the embeddings [m, D] that stand before it, such as what was heard.
    """
    state = _begin(tower, prompts, num_draft_tokens, chooser, ends, prefixes)
    rows = list(range(len(prompts)))
    draft.begin(state)
    proposal = draft.open(state, min(num_draft_tokens, _room(ends, rows)))
    if proposal is None:
        _prefill(state)
    while rows:
        if proposal is None:
            limit = min(num_draft_tokens, _room(ends, rows))
            proposal = draft.propose(state, limit) if limit > 0 else Proposal.empty(state)
        seen = _verify(state, proposal)
        agreed = [_agreement(d, c) for d, c in zip(seen.drafted, seen.chosen, strict=True)]
        emitted = []
        for b, row in enumerate(rows):
            taken, text = ends[row].push(seen.chosen[b][: agreed[b] + 1])
            tokens, drafted = seen.chosen[b][:taken], tuple(seen.drafted[b])
            state.texts[b] += tokens
            chooser.commit(b, tokens, len(state.texts[b]))
            emitted.append(taken)
            yield Step(
                row=row,
                tokens=tuple(tokens),
                text=text,
                drafted=drafted,
                accepted=min(agreed[b], taken),
                exit_layer=proposal.exit_layer if proposal.exit_layer and drafted else None,
                finish_reason=ends[row].reason,
                source=proposal.sources[b] if proposal.sources else None,
            )
        state.cache.truncate(state.cached())
        draft.observe(state, _outcome(seen, agreed, emitted, draft.wants_hidden))
        stay = [b for b, row in enumerate(rows) if ends[row].reason is None]
        if stay and len(stay) < len(rows):
            state.keep(stay)
            draft.keep(stay)
        rows, proposal = [rows[b] for b in stay], None


def _begin(
    tower: Tower,
    prompts: Sequence[Sequence[int]],
    num_draft_tokens: int,
    chooser: Chooser,
    ends: Sequence[RowEnd],
    prefixes: Sequence[Tensor] | None,
) -> DecodeState:
    """Nothing read yet, and a cache that holds all that will be."""
    if prefixes is not None:
        check_prefixes(tower, prefixes, len(prompts))
    before = [0] * len(prompts) if prefixes is None else [p.shape[0] for p in prefixes]
    totals = zip(before, prompts, ends, strict=True)
    longest = max(m + len(p) + e.remaining for m, p, e in totals)
    capacity = longest + min(num_draft_tokens, max(e.remaining for e in ends)) + 1
    cache = KVCache(tower.config, len(prompts), capacity, tower.device, tower.dtype)
    return DecodeState(tower, cache, [list(p) for p in prompts], chooser, prefixes or ())


def _room(ends: Sequence[RowEnd], rows: Sequence[int]) -> int:
    """Tokens worth drafting: each round emits one that nobody drafted."""
    return max(ends[row].remaining for row in rows) - 1


def _prefill(state: DecodeState) -> None:
    """Run all but the last token of each prompt."""
    if max(state.cached()) == 0:
        return
    ids = upload_padded([text[:-1] for text in state.texts], state.tower.device)
    h = embed_rows(state.tower, ids, [n - 1 for n in state.lengths()], state.prefixes)
    state.tower.run(h, 0, state.tower.config.num_layers, state.cache)
    state.cache.truncate(state.cached())


@dataclass(frozen=True)
class _Seen:
    """Per row: what was drafted, what the tower chose, what each watched exit would have chosen.

    The choices are those after the newest token and after each of the n drafted ones; hidden
    [B, n + 1, D] is what the tower's were made of.
    """

    drafted: list[list[int]]
    chosen: list[list[int]]
    watched: dict[int, list[list[int]]]
    hidden: Tensor


def _verify(state: DecodeState, proposal: Proposal) -> _Seen:
    """Read what was proposed, after the prompts if they are still unread."""
    tower, top = state.tower, state.tower.config.num_layers
    if state.unread():
        hidden = _read_prompts(state, proposal)
    elif proposal.tokens.shape[1] == 0 and proposal.hidden is None and not proposal.watch:
        # A plain step, without what would cost adaptive drafting where it never drafts.
        h = tower.run(tower.embed(state.newest()), 0, top, state.cache)
        chosen_alone = state.chooser.choose(tower.logits(h, top), state.lengths(), None).tolist()
        return _Seen([[] for _ in state.texts], chosen_alone, {}, h)
    else:
        hidden = _read_proposal(state, proposal)
    choices = {
        e: state.chooser.choose(tower.logits(x, e), state.lengths(), proposal.tokens)
        for e, x in hidden.items()
    }
    # One transfer for all of it: the only time in a round that the host waits for the device.
    read = torch.stack([F.pad(proposal.tokens, (0, 1)), *choices.values()]).tolist()
    drafted = [row[: proposal.length(b)] for b, row in enumerate(read[0])]
    chosen = dict(zip(choices, read[1:], strict=True))
    return _Seen(drafted, chosen.pop(top), chosen, hidden[top])


def _read_prompts(state: DecodeState, proposal: Proposal) -> dict[int, Tensor]:
    """One call for prompts and proposal, each row's draft straight after its own prompt; states as
    `_read_proposal` has them."""
    if proposal.hidden is not None:
        raise InputError(
            f"a proposal to open with has hidden states of layer {proposal.exit_layer}, and no "
            "layer has read the prompt yet; give tokens alone, or None from `open`"
        )
    width, prompt = proposal.tokens.shape[1], state.lengths()
    ids = F.pad(upload_padded(state.texts, state.tower.device), (0, width))
    columns = [[n + i for i in range(width)] for n in prompt]
    ids.scatter_(1, upload(columns, ids.device).view(len(prompt), width), proposal.tokens)
    lengths = [n + proposal.length(b) for b, n in enumerate(prompt)]
    h = embed_rows(state.tower, ids, lengths, state.prefixes)
    # A row that drafts less than `width` repeats its last state, which nobody looks at.
    at = [
        [min(m + i, m + proposal.length(b)) for i in range(width + 1)]
        for b, m in enumerate(state.cached())
    ]
    hidden = _run_watched(state, h, 0, proposal.watch)
    return {e: at_columns(x, at) for e, x in hidden.items()}


def _read_proposal(state: DecodeState, proposal: Proposal) -> dict[int, Tensor]:
    """States [B, n + 1, D] at the newest token and the n drafted ones, after each watched layer and
    the top one."""
    tower = state.tower
    tokens = torch.cat((state.newest(), proposal.tokens), dim=1)
    if proposal.hidden is None:
        return _run_watched(state, tower.embed(tokens), 0, proposal.watch)
    rest = tower.embed(tokens[:, proposal.hidden.shape[1] :])
    rest = tower.run(rest, 0, proposal.exit_layer, state.cache)
    h = torch.cat((proposal.hidden, rest), dim=1)
    return _run_watched(state, h, proposal.exit_layer, proposal.watch)


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


def _outcome(
    seen: _Seen, agreed: Sequence[int], emitted: Sequence[int], wants_hidden: bool
) -> Outcome:
    """What the draft is told: `emitted` tokens of each row stay, `agreed` of them were drafted."""
    drafted = [len(d) for d in seen.drafted]
    accepted = [min(a, n) for a, n in zip(agreed, emitted, strict=True)]
    matches = {e: _matches(w, seen.chosen, agreed) for e, w in seen.watched.items()}
    hidden = at_columns(seen.hidden, [[n - 1] for n in emitted])[:, 0] if wants_hidden else None
    beyond = [c[e : n + 1] for c, e, n in zip(seen.chosen, emitted, drafted, strict=True)]
    return Outcome(drafted, accepted, matches, hidden, beyond)


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
