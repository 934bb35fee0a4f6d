"""Toy decoders that listen: random audio before the prompt, what a CTC head made of it, and heads
that know what comes. In float64, so that equality is not a matter of luck.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import toy
import toy_decoding as run
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.drafts import Draft
from offramp.decoding.sampling import Sampling
from offramp.decoding.stopping import Stop
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.cache import KVCache
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower
from toy_decoding import GREEDY, LAYERS

BOS = 1
MAX_TOKENS = 16
VOCAB = 61


@dataclass(frozen=True)
class Scene:
    """A decoder, what each row of a batch hears, and what plain decoding writes."""

    model: DecoderLM
    prefixes: list[Tensor]
    stop: Stop
    sampling: Sampling
    written: list[run.Row]

    @property
    def prompts(self) -> list[list[int]]:
        return [[BOS] for _ in self.prefixes]

    @property
    def eos_id(self) -> int:
        (eos_id,) = self.stop.token_ids
        return eos_id

    @property
    def texts(self) -> list[list[int]]:
        """What is written, without the end of text."""
        return [[t for t in row.tokens if t != self.eos_id] for row in self.written]

    def drafted(self, draft: Draft, num_draft_tokens: int = MAX_TOKENS) -> run.Run:
        return run.drafted(
            self.model, self.prompts, draft, num_draft_tokens, self.stop, self.sampling,
            prefixes=self.prefixes,
        )  # fmt: skip


def scene(num_rows: int = 8, seed: int = 0, sampling: Sampling = GREEDY) -> Scene:
    """Audio of uneven lengths (one row has none); about half of the texts end before the limit."""
    model = run.model(seed).double()
    generator = torch.Generator().manual_seed(seed)
    sizes = [(7 * b + seed) % 11 + 2 for b in range(num_rows)]
    if num_rows > 1:
        sizes[1] = 0
    prefixes = [torch.randn(m, 32, generator=generator).double() for m in sizes]
    prompts = [[BOS]] * num_rows
    free = run.plain(model, prompts, Stop(MAX_TOKENS), sampling, prefixes=prefixes)
    late = Counter(t for row in free for t in set(row.tokens[5:]) - set(row.tokens[:5]))
    stop = Stop(MAX_TOKENS, frozenset({late.most_common(1)[0][0]}))
    return Scene(model, prefixes, stop, sampling,
                 run.plain(model, prompts, stop, sampling, prefixes=prefixes))  # fmt: skip


def mishear(text: Sequence[int], rng: random.Random, rate: float) -> list[int]:
    """`text` with tokens replaced, dropped and put in, each about equally often."""
    heard: list[int] = []
    for token in text:
        kind = rng.choice("rdi") if rng.random() < rate else "-"
        heard += {"-": [token], "r": [rng.randrange(VOCAB)], "d": [],
                  "i": [rng.randrange(VOCAB), token]}[kind]  # fmt: skip
    return heard


class KnowingHeads(Heads):
    """Looks up the state it is given among all that a scene's texts lead through, and says what
    came next there; each answer is wrong with probability `error_rate`."""

    def __init__(self, scene: Scene, count: int, error_rate: float = 0.0) -> None:
        super().__init__(HeadsConfig(count))
        rng = random.Random(count)
        self._states = torch.cat([states(scene, row) for row in range(len(scene.written))])
        self._next = torch.tensor(
            [
                [
                    token if rng.random() >= error_rate else rng.randrange(VOCAB)
                    for token in (*row.tokens[at + 1 :], *[0] * count)[: count - 1]
                ]
                for row in scene.written
                for at in range(len(row.tokens))
            ]
        )

    def logits(self, h: Tensor, tower: Tower) -> Tensor:
        distance, at = (h[:, None] - self._states).norm(dim=-1).min(dim=1)
        assert distance.max() < 1e-6, "a state that no accepted text leads to"
        return 40.0 * torch.nn.functional.one_hot(self._next[at], VOCAB).to(h.dtype)

    def head_logits(self, future: int, h: Tensor, tower: Tower) -> Tensor:
        return self.logits(h, tower)[:, future]


def states(scene: Scene, row: int) -> Tensor:
    """States after all layers of which each token of that row was chosen [U, D], in one go."""
    tokens = scene.written[row].tokens
    ids = torch.tensor([[BOS, *tokens[:-1]]])
    h = torch.cat((scene.prefixes[row][None], scene.model.embed(ids)), dim=1)
    cache = KVCache(scene.model.config, 1, h.shape[1], dtype=h.dtype)
    return scene.model.run(h, 0, LAYERS, cache)[0, -len(tokens) :]


def calls(result: run.Run, row: int) -> int:
    """Decoder calls that this row took part in."""
    return sum(step.row == row for step in result.steps)


def garbage(num_rows: int, seed: int, length: int = 30) -> list[list[int]]:
    """Tokens that have nothing to do with any audio."""
    return toy.tokens(num_rows, length, VOCAB, seed).tolist()
