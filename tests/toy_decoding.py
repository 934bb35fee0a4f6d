"""Decoding with toy models: weights whose text is varied, and whole runs as plain values.

`plain` is the reference (one row at a time, one token at a time); `drafted` runs the one loop.
Both give each row the same number, so that in sampling both see the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import toy
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.autoregressive import autoregress
from offramp.decoding.drafts import (
    AdaptiveExitDraft,
    DecodeState,
    Draft,
    EarlyExitDraft,
    ModelDraft,
    NGramDraft,
    NoDraft,
    Proposal,
)
from offramp.decoding.exits import RoundCosts
from offramp.decoding.first_of import FirstOf
from offramp.decoding.heads_draft import HeadsDraft
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import RowEnd, Stop
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.heads import Heads, build_heads
from offramp.nn.tower import Tower
from offramp.results import FinishReason, Step
from offramp.tokenizer import TextStream, TextTokenizer

GREEDY = Sampling()
LAYERS = 6


@torch.no_grad()
def model(seed: int = 0, late: float = 0.2, early_layers: int = 2, **changes: Any) -> DecoderLM:
    """A decoder whose exits agree with its top now and then.

    The first `early_layers` layers are strong enough that the text does not settle on one token;
    what the later ones add is scaled by `late` (0: every exit above agrees, 1: few do).
    """
    made = toy.decoder(seed, **{"num_layers": LAYERS, **changes})
    for index, layer in enumerate(made.layers):
        for p in layer.parameters():
            if p.ndim >= 2:
                p.mul_(3.0)
        if index >= early_layers:
            for p in (*layer.attention.output.parameters(), *layer.feed_forward.down.parameters()):
                p.mul_(late)
    return made


def prompt(length: int, seed: int = 0, vocab_size: int = 61) -> list[int]:
    """Random token ids."""
    ids: list[int] = toy.tokens(1, length, vocab_size, seed)[0].tolist()
    return ids


@dataclass(frozen=True)
class Row:
    """What one row came to."""

    tokens: tuple[int, ...]
    text: str
    reason: FinishReason | None

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Row:
        tokens = tuple(t for s in steps for t in s.tokens)
        return cls(tokens, "".join(s.text for s in steps), steps[-1].finish_reason)


@dataclass(frozen=True)
class Run:
    rows: list[Row]
    steps: list[Step]

    @property
    def drafted(self) -> int:
        return sum(len(s.drafted) for s in self.steps)

    @property
    def accepted(self) -> int:
        return sum(s.accepted for s in self.steps)


def make_ends(
    num_rows: int, stop: Stop | Sequence[Stop], tokenizer: TextTokenizer | None = None
) -> list[RowEnd]:
    stops = [stop] * num_rows if isinstance(stop, Stop) else stop
    return [RowEnd(s, None if tokenizer is None else TextStream(tokenizer)) for s in stops]


def plain(
    tower: Tower,
    prompts: Sequence[list[int]],
    stop: Stop | Sequence[Stop],
    sampling: Sampling = GREEDY,
    tokenizer: TextTokenizer | None = None,
    prefixes: Sequence[torch.Tensor] | None = None,
) -> list[Row]:
    """Every prompt on its own, token by token."""
    size, ends = tower.config.vocab_size, make_ends(len(prompts), stop, tokenizer)
    rows = []
    for row, (ids, end) in enumerate(zip(prompts, ends, strict=True)):
        chooser = Chooser(sampling, [ids], [row], size, tower.device)
        prefix = None if prefixes is None else prefixes[row]
        rows.append(Row.of(list(autoregress(tower, ids, chooser, end, prefix))))
    return rows


def drafted(
    tower: Tower,
    prompts: Sequence[list[int]],
    draft: Draft,
    num_draft_tokens: int,
    stop: Stop | Sequence[Stop],
    sampling: Sampling = GREEDY,
    tokenizer: TextTokenizer | None = None,
    prefixes: Sequence[torch.Tensor] | None = None,
) -> Run:
    """The same prompts as one batch through the draft-verify loop."""
    numbers, ends = range(len(prompts)), make_ends(len(prompts), stop, tokenizer)
    chooser = Chooser(sampling, prompts, numbers, tower.config.vocab_size, tower.device)
    steps = list(speculate(tower, prompts, draft, num_draft_tokens, chooser, ends, prefixes))
    return Run([Row.of([s for s in steps if s.row == row]) for row in numbers], steps)


class GarbageDraft(Draft):
    """Random tokens, a random number of them per row: what no model would write."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        shape, size = (len(state.texts), k), state.tower.config.vocab_size
        tokens = torch.randint(size, shape, generator=self._generator)
        lengths = torch.randint(k + 1, shape[:1], generator=self._generator).tolist()
        return Proposal(tokens[:, : max(lengths)], lengths)


class AbstainingDraft(NoDraft):
    """Runs lower layers on the newest token, and every other time proposes nothing after all."""

    def __init__(self, exit_layer: int, num_layers: int) -> None:
        self._draft, self._rounds = EarlyExitDraft(exit_layer, num_layers), 0

    def propose(self, state: DecodeState, k: int) -> Proposal:
        made, self._rounds = self._draft.propose(state, 1), self._rounds + 1
        kept = made.tokens[:, : self._rounds % 2]
        return Proposal(kept, None, made.hidden, made.exit_layer)


@torch.no_grad()
def random_heads(model: DecoderLM, count: int = 4, draft_vocab: int | None = None) -> Heads:
    """Heads that are close enough to the tower's own to be right now and then."""
    heads = build_heads(HeadsConfig(count, "latent", draft_vocab), model.config)
    toy.randomize(heads, seed=1)
    for p in heads.parameters():
        p.mul_(0.1)
    return heads.to(model.dtype).requires_grad_(False)


# Every draft there is, for a model of `model` above; what was heard is in toy_listening.py.
DRAFTS: dict[str, Callable[[DecoderLM], Draft]] = {
    "none": lambda m: NoDraft(),
    "exit": lambda m: EarlyExitDraft(3, m.config.num_layers),
    "confident exit": lambda m: EarlyExitDraft(3, m.config.num_layers, min_confidence=0.5),
    "adaptive exit": lambda m: AdaptiveExitDraft(
        [1, 3, 5], m.config.num_layers, RoundCosts(1.0, 0.1, 0.02)
    ),
    "confident adaptive exit": lambda m: AdaptiveExitDraft(
        [1, 3, 5], m.config.num_layers, RoundCosts(1.0, 0.1, 0.02), min_confidence=0.3
    ),
    "n-gram": lambda m: NGramDraft(),
    "another model": lambda m: ModelDraft(
        model(seed=9, num_layers=2, vocab_size=m.config.vocab_size)
    ),
    "the same model": ModelDraft,
    "abstaining exit": lambda m: AbstainingDraft(3, m.config.num_layers),
    "garbage": lambda m: GarbageDraft(),
    "heads": lambda m: HeadsDraft(random_heads(m)),
    "n-gram or heads": lambda m: FirstOf(
        {"n-gram": NGramDraft(1), "mtp": HeadsDraft(random_heads(m))}
    ),
}
# By the default suite, of large matrices: the published one, ours, the worst, and two together.
KEPT = ("exit", "confident adaptive exit", "garbage", "n-gram or heads")
