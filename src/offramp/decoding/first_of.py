"""Several drafts as one: each row takes the first that has something for it.

Those that had nothing may go on from there. So what was heard and multi-token heads bridge an
error in one call: the heads say what comes next, and what was heard says what comes after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F

from offramp.decoding.drafts import DecodeState, Draft, Outcome, Proposal
from offramp.errors import InputError
from offramp.nn.device import upload


class FirstOf(Draft):
    """drafts, by name, in order of preference: {"ctc": ..., "mtp": ...}.

    A draft is asked only if those before it leave a row empty-handed. All of them follow the text.
    Each `Step` names its source: "mtp", or "mtp+ctc" where another went on. InputError for a draft
    that runs the tower's own layers (early exit): a row that takes another would have to forget
    them.
    """

    def __init__(self, drafts: Mapping[str, Draft]) -> None:
        if not drafts:
            raise InputError("there is no draft to choose from; give at least one")
        self._drafts = dict(drafts)
        self.wants_hidden = any(draft.wants_hidden for draft in drafts.values())
        self._taken: list[tuple[str | None, int]] = []  # per row: from whom, how many tokens

    def begin(self, state: DecodeState) -> None:
        self._taken = [(None, 0)] * len(state.texts)
        for draft in self._drafts.values():
            draft.begin(state)

    def open(self, state: DecodeState, k: int) -> Proposal | None:
        """None only if no draft opens; one that does not is asked from the second round on."""
        return self._join(state, lambda draft: draft.open(state, k))

    def propose(self, state: DecodeState, k: int) -> Proposal:
        joined = self._join(state, lambda draft: draft.propose(state, k))
        assert joined is not None, "every draft proposes"
        return self._extend(state, joined, k)

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        """Each draft is told of its own tokens, not of those that another went on with."""
        for name, draft in self._drafts.items():
            own = [n if source == name else 0 for source, n in self._taken]
            drafted = list(map(min, own, outcome.drafted))
            accepted = list(map(min, own, outcome.accepted))
            draft.observe(state, replace(outcome, drafted=drafted, accepted=accepted))

    def keep(self, rows: Sequence[int]) -> None:
        for draft in self._drafts.values():
            draft.keep(rows)

    def _join(self, state: DecodeState, ask: Callable[[Draft], Proposal | None]) -> Proposal | None:
        """What each row takes; None if every draft said None."""
        tokens, lengths = Proposal.empty(state).tokens, [0] * len(state.texts)
        sources: list[str | None] = [None] * len(lengths)
        watch: set[int] = set()
        answered = False
        for name, draft in self._drafts.items():
            if all(lengths):
                break
            made = ask(draft)
            if made is None:
                continue
            if made.hidden is not None:
                raise InputError(
                    f"draft {name!r} runs the tower's own layers, which no other draft can follow; "
                    "use it alone"
                )
            answered, watch = True, watch | set(made.watch)
            rows = [b for b, n in enumerate(lengths) if n == 0 and made.length(b) > 0]
            if rows:
                width = max(tokens.shape[1], made.tokens.shape[1])
                tokens, theirs = (F.pad(t, (0, width - t.shape[1])) for t in (tokens, made.tokens))
                index = upload(rows, tokens.device)
                tokens[index] = theirs[index]
            for b in rows:
                lengths[b], sources[b] = made.length(b), name
        self._taken = list(zip(sources, lengths, strict=True))
        if not answered:
            return None
        return Proposal(tokens, lengths, watch=tuple(sorted(watch)), sources=sources)

    def _extend(self, state: DecodeState, made: Proposal, k: int) -> Proposal:
        """`made`, each row with what the drafts before its source say comes after it."""
        names = list(self._drafts)
        if all(source == names[0] for source, _ in self._taken):
            return made
        rows, sources = [], []
        for b, (tokens, (source, n)) in enumerate(
            zip(made.tokens.tolist(), self._taken, strict=True)
        ):
            row, before = tokens[:n], names if source is None else names[: names.index(source)]
            for name in before:
                if more := self._drafts[name].extend(state, b, row)[: k - n]:
                    row, source = row + more, f"{source}+{name}" if source else name
                    break
            rows.append(row)
            sources.append(source)
        full = Proposal.ragged(state, rows)
        return replace(full, watch=made.watch, sources=sources)
