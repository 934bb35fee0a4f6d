"""Drafts: where proposed tokens come from. One protocol, one loop (speculative.py) for all.

A draft proposes up to k tokens per row and is told what became of them. It never decides
whether a token is right: a bad draft costs time, not quality. `NoDraft` makes the loop plain
batched decoding; `EarlyExitDraft` and `AdaptiveExitDraft` read the lower layers of the tower
itself; `NGramDraft` looks in the text so far; `ModelDraft` asks a smaller model. Drafts for
speech have files of their own: ctc_draft.py, heads_draft.py, and first_of.py, which joins several.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from offramp.decoding.exits import ExitSelector, RoundCosts
from offramp.decoding.ragged import upload_padded
from offramp.decoding.sampling import Chooser
from offramp.errors import InputError
from offramp.nn.cache import KVCache
from offramp.nn.device import upload
from offramp.nn.tower import Tower


@dataclass
class DecodeState:
    """The rows still being decoded. The last token of each text has no keys in the cache yet."""

    tower: Tower
    cache: KVCache
    texts: list[list[int]]  # prompt and emitted tokens
    chooser: Chooser
    prefixes: Sequence[Tensor] = ()  # embeddings [m, D] before each text; none: texts stand first

    def newest(self) -> Tensor:
        """The last token of each row [B, 1]."""
        return upload([text[-1:] for text in self.texts], self.tower.device)

    def lengths(self) -> list[int]:
        """Tokens of each text, prefixes not counted."""
        return [len(text) for text in self.texts]

    def cached(self) -> list[int]:
        """What the cache holds of each row between rounds: its prefix, its text but the newest."""
        before = [p.shape[0] for p in self.prefixes] or [0] * len(self.texts)
        return [m + n - 1 for m, n in zip(before, self.lengths(), strict=True)]

    def unread(self) -> bool:
        """Whether the tower still has to read the prompts."""
        return self.cache.length(self.tower.config.num_layers - 1) != tuple(self.cached())

    def keep(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[r] for r in rows]
        self.prefixes = [self.prefixes[r] for r in rows] if self.prefixes else ()
        self.cache.keep(rows)
        self.chooser.keep(rows)


@dataclass(frozen=True)
class Proposal:
    """tokens [B, n]; of row b only the first `lengths[b]` count (None: all of them).

    hidden [B, m, D]: states after `exit_layer` layers of the first m of [newest, *tokens],
    whose keys below that layer are in the cache; None: nothing was computed. watch: exits whose
    own choices the draft wants to see beside the tower's. sources: per row the name of the draft
    that proposed, where several take turns.

    `hidden` must be what the tower itself computes there: verification goes on from it. InputError
    unless it comes with its exit layer.
    """

    tokens: Tensor
    lengths: Sequence[int] | None = None
    hidden: Tensor | None = None
    exit_layer: int = 0
    watch: tuple[int, ...] = ()
    sources: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        if (self.hidden is None) != (self.exit_layer == 0):
            raise InputError(
                f"the proposal has exit_layer {self.exit_layer} and "
                f"{'no' if self.hidden is None else 'its'} hidden states; give both or neither"
            )

    @staticmethod
    def ragged(state: DecodeState, rows: Sequence[Sequence[int]]) -> Proposal:
        """Row b drafts the tokens `rows[b]`."""
        return Proposal(upload_padded(rows, state.tower.device), [len(row) for row in rows])

    @staticmethod
    def empty(state: DecodeState, watch: tuple[int, ...] = ()) -> Proposal:
        none = torch.empty(len(state.texts), 0, dtype=torch.long, device=state.tower.device)
        return Proposal(none, watch=watch)

    def length(self, row: int) -> int:
        return self.tokens.shape[1] if self.lengths is None else self.lengths[row]


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal: per row, how many tokens were drafted and accepted.

    matches: exit of `watch` -> (agreements with the tower, positions compared), summed over
    rows and the positions that were read in the true context. hidden [B, D], if the draft wants
    it: each row's state after all layers, of which its newest token was chosen. beyond: per row
    what the tower chose behind its newest token, for each drafted token that it read there: a guess
    at what it will write, for what it read holds the token that it did not want.
    """

    drafted: Sequence[int]
    accepted: Sequence[int]
    matches: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    hidden: Tensor | None = None
    beyond: Sequence[Sequence[int]] = ()


class Draft(Protocol):
    """One source of drafts, for one batch at a time.

    To subclass; but for `propose`, what is here suits a draft without memory of its own.
    """

    wants_hidden: bool = False  # whether `observe` is to be given hidden states

    def begin(self, state: DecodeState) -> None:
        """A new batch, of which nothing is read yet."""
        return

    def open(self, state: DecodeState, k: int) -> Proposal | None:
        """At most `k` >= 0 tokens for every row, read in one call together with the prompts.

        They carry no hidden states. None: the prompts are read before anything is drafted.
        """
        return None

    def propose(self, state: DecodeState, k: int) -> Proposal:
        """At most `k` >= 1 tokens for every row."""
        ...

    def extend(self, state: DecodeState, row: int, tokens: Sequence[int]) -> list[int]:
        """What follows if row `row` writes `tokens` next; asked where another draft has them."""
        return []

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        """After verification; `state` already holds the emitted tokens."""
        return

    def keep(self, rows: Sequence[int]) -> None:
        """Only `rows` go on."""
        return


class NoDraft(Draft):
    """Proposes nothing: every round is one plain decode step."""

    def propose(self, state: DecodeState, k: int) -> Proposal:
        return Proposal.empty(state)


class EarlyExitDraft(Draft):
    """The first `exit_layer` layers of the tower draft (LayerSkip, arXiv 2404.16710, 4.3).

    min_confidence: stop drafting once the drafted token of every row is less probable than
    this; 0 never stops early. On a GPU each check waits for the device.
    """

    def __init__(
        self,
        exit_layer: int,
        num_layers: int,
        min_confidence: float = 0.0,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        check_exit_layer(exit_layer, num_layers)
        if not 0.0 <= min_confidence < 1.0:
            raise InputError(
                f"min_confidence is {min_confidence}; it must be at least 0 and less than 1"
            )
        self.exit_layer, self.min_confidence, self._eos_ids = exit_layer, min_confidence, eos_ids

    def propose(self, state: DecodeState, k: int) -> Proposal:
        tower, token = state.tower, state.newest()
        eos = upload(sorted(self._eos_ids), tower.device)
        tokens: list[Tensor] = []
        hidden: list[Tensor] = []
        while len(tokens) < k:
            h = tower.run(tower.embed(token), 0, self.exit_layer, state.cache)
            logits = tower.logits(h, self.exit_layer)
            before = torch.cat(tokens, dim=1) if tokens else None
            positions = [n + len(tokens) for n in state.lengths()]
            token = state.chooser.choose(logits, positions, before)
            hidden.append(h)
            tokens.append(token)
            if len(tokens) < k and self._should_stop(logits, token, eos):
                break
        return Proposal(torch.cat(tokens, dim=1), None, torch.cat(hidden, dim=1), self.exit_layer)

    def _should_stop(self, logits: Tensor, token: Tensor, eos: Tensor) -> bool:
        # Looking at a token needs no waiting on a CPU; on a GPU the end of text is left to the
        # loop. The probability is the model's own, before temperature and filters.
        on_cpu = token.device.type == "cpu"
        if on_cpu and len(eos) and bool(torch.isin(token, eos).all()):
            return True
        if self.min_confidence == 0.0:
            return False
        p = logits.float().softmax(-1).gather(-1, token[..., None])
        return bool((p < self.min_confidence).all())


class AdaptiveExitDraft(Draft):
    """Early exit with the exit layer and draft length chosen anew for every round.

    Exits are judged by what they would have drafted in the answer: every few rounds, where the
    tower runs anyway, their choices are read out. Not by the prompt, unlike DEL: after
    fine-tuning, exits know the answer and not the prompt (docs/log.md has figures).
    """

    def __init__(
        self,
        exits: Sequence[int],
        num_layers: int,
        costs: RoundCosts,
        min_confidence: float = 0.0,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        if not exits:
            raise InputError("there is no exit to choose from; give at least one exit layer")
        self._drafts = {e: EarlyExitDraft(e, num_layers, min_confidence, eos_ids) for e in exits}
        self._num_layers, self._costs = num_layers, costs
        self._round = 0
        self._used = 0
        self._selector = self._new_selector()

    # A look reads one more set of logits. The first round looks at every exit, since answers may
    # be short; later plain rounds look ever less often, and at one exit only: where drafting does
    # not pay, looking is all that is lost.
    _LOOK_WHILE_DRAFTING = 4
    _LOOK_WHILE_PLAIN = 16
    _FIRST_LOOKS = (2, 4, 8)

    def begin(self, state: DecodeState) -> None:
        self._selector = self._new_selector()
        self._round = self._used = 0

    def propose(self, state: DecodeState, k: int) -> Proposal:
        self._round += 1
        self._used, count = self._selector.plan(k)
        if count == 0:
            return Proposal.empty(state, self._looks_while_plain())
        look = self._round % self._LOOK_WHILE_DRAFTING == 0
        made = self._drafts[self._used].propose(state, count)
        # Layers below the exit ran one token at a time, before there was anything to compare.
        higher = tuple(e for e in self._drafts if e > self._used) if look else ()
        return Proposal(made.tokens, None, made.hidden, made.exit_layer, higher)

    def _looks_while_plain(self) -> tuple[int, ...]:
        if self._round == 1:
            return tuple(self._drafts)
        if self._round in self._FIRST_LOOKS or self._round % self._LOOK_WHILE_PLAIN == 0:
            return (self._selector.most_promising(),)
        return ()

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        for exit_layer, (matches, trials) in outcome.matches.items():
            self._selector.record(exit_layer, matches, trials)
        if self._used and any(outcome.drafted):
            matches = sum(outcome.accepted)
            # The first refusal of a row was tried; what it drafted after that was not.
            tried = sum(
                min(a + 1, n) for a, n in zip(outcome.accepted, outcome.drafted, strict=True)
            )
            self._selector.record(self._used, matches, tried)

    def _new_selector(self) -> ExitSelector:
        return ExitSelector(self._num_layers, list(self._drafts), self._costs)


class NGramDraft(Draft):
    """What followed the last time these words stood in the text (prompt lookup decoding).

    Takes the latest earlier occurrence of the longest end of the text, `max_ngram` tokens or
    fewer, and proposes what came after it. Free, and good where output repeats the prompt.
    """

    def __init__(self, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise InputError(f"max_ngram is {max_ngram}; it must be at least 1")
        self._max_ngram = max_ngram

    def propose(self, state: DecodeState, k: int) -> Proposal:
        return Proposal.ragged(state, [self._continuation(text, k) for text in state.texts])

    def _continuation(self, text: list[int], k: int) -> list[int]:
        # As bytes, because their search runs in C: 8,000 tokens take 0.2 ms and not 35.
        codes = array("q", text)
        earlier = codes[:-1].tobytes()
        for n in range(min(self._max_ngram, len(text) - 1), 0, -1):
            at = _rfind_aligned(earlier, codes[-n:].tobytes(), codes.itemsize)
            if at >= 0:
                return text[at + n : at + n + k]
        return []


def _rfind_aligned(data: bytes, item: bytes, size: int) -> int:
    """Index, in units of `size` bytes, of the last place where `item` stands in `data`; or -1."""
    at = data.rfind(item)
    while at % size:  # -1 % size is not 0 either
        if at < 0:
            return -1
        at = data.rfind(item, 0, at + len(item) - 1)
    return at // size


class ModelDraft(Draft):
    """A smaller tower with the same vocabulary drafts (speculative decoding, arXiv 2211.17192).

    It reads the text alone: what stands before a prompt as embeddings is the target's.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower
        self._cache: KVCache | None = None

    def begin(self, state: DecodeState) -> None:
        ours, theirs = self._tower.config.vocab_size, state.tower.config.vocab_size
        if ours != theirs:
            raise InputError(
                f"the draft model has {ours} tokens and the target {theirs}; "
                "they must share one tokenizer"
            )
        t = self._tower
        self._cache = KVCache(t.config, len(state.texts), state.cache.capacity, t.device, t.dtype)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        assert self._cache is not None, "begin comes first"
        tokens: list[Tensor] = []
        logits = self._read_new(state)
        while True:
            before = torch.cat(tokens, dim=1) if tokens else None
            positions = [n + len(tokens) for n in state.lengths()]
            tokens.append(state.chooser.choose(logits, positions, before))
            if len(tokens) == k:
                return Proposal(torch.cat(tokens, dim=1))
            logits = self._run(tokens[-1])

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        assert self._cache is not None, "begin comes first"
        self._cache.truncate([len(text) - 1 for text in state.texts])

    def keep(self, rows: Sequence[int]) -> None:
        assert self._cache is not None, "begin comes first"
        self._cache.keep(rows)

    def _read_new(self, state: DecodeState) -> Tensor:
        """Read the tokens that each row has and this model has not; logits [B, 1, V] after them."""
        assert self._cache is not None
        known = self._cache.length(0)
        new = [text[n:] for text, n in zip(state.texts, known, strict=True)]
        padded = upload_padded(new, self._tower.device)
        L = self._tower.config.num_layers
        h = self._tower.run(self._tower.embed(padded), 0, L, self._cache)
        self._cache.truncate(state.lengths())
        last = upload([len(n) - 1 for n in new], h.device)
        return self._tower.logits(h[torch.arange(len(new), device=h.device), last][:, None], L)

    def _run(self, token: Tensor) -> Tensor:
        assert self._cache is not None
        L = self._tower.config.num_layers
        return self._tower.logits(self._tower.run(self._tower.embed(token), 0, L, self._cache), L)


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """A draft must leave before the top: InputError unless 1 <= exit_layer < num_layers."""
    if not 1 <= exit_layer < num_layers:
        raise InputError(
            f"exit layer is {exit_layer}; to draft it must lie between 1 and {num_layers - 1} "
            f"(the model has {num_layers} layers)"
        )
