"""Towers for beam search: small vocabularies in float64, a prefix, and what slow versions read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import toy
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.tower_beam import TextHypothesis
from offramp.energy.trace import Trace
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.cache import KVCache
from offramp.nn.heads import Heads, build_heads
from offramp.nn.tower import TracedTower

EOS = frozenset({0, 7})
PROMPT = [5, 3]


def small(seed: int = 0, **changes: Any) -> DecoderLM:
    """A decoder of 11 tokens whose distributions are neither flat nor certain."""
    model = toy.decoder(seed, **{"vocab_size": 11, "num_layers": 3, **changes}).double()
    assert model.unembedding is not None
    model.unembedding.weight.mul_(0.6)
    return model


def future_heads(model: DecoderLM, count: int = 4, seed: int = 0, **changes: Any) -> Heads:
    heads = build_heads(HeadsConfig(count, **changes), model.config)
    toy.randomize(heads, seed)
    return heads.requires_grad_(False).double()


def embeddings(count: int, seed: int = 0) -> Tensor:
    """A prefix [count, D]."""
    generator = torch.Generator().manual_seed(50 + seed)
    return torch.randn(count, 32, generator=generator, dtype=torch.float64)


def counted(model: DecoderLM) -> TracedTower:
    return TracedTower(model, Trace(model.config.num_layers))


def state_after(
    model: DecoderLM, prompt: list[int], text: tuple[int, ...], prefix: Tensor | None = None
) -> Tensor:
    """The top layer's state [D] at the last token of prefix, prompt and text, read at once."""
    h = model.embed(torch.tensor([[*prompt, *text]]))
    if prefix is not None:
        h = torch.cat((prefix[None], h), dim=1)
    cache = KVCache(model.config, 1, h.shape[1], dtype=model.dtype)
    return model.run(h, 0, model.config.num_layers, cache)[0, -1]


def assert_same(got: list[TextHypothesis], want: list[TextHypothesis]) -> None:
    """The same texts in the same order, and their scores but for rounding."""
    assert [(h.tokens, h.finish_reason) for h in got] == [(h.tokens, h.finish_reason) for h in want]
    for a, b in zip(got, want, strict=True):
        assert abs(a.score - b.score) < 1e-9


def spoken(frames: int, said: dict[int, int], vocab_size: int = 10) -> Tensor:
    """What a trained CTC head gives, log-probabilities [T, V]: tokens at their frames, and blank,
    the last id, at all others, nearly certain all of them."""
    grid = torch.zeros(frames, vocab_size, dtype=torch.float64)
    for frame in range(frames):
        grid[frame, said.get(frame, vocab_size - 1)] = 12.0
        grid[frame, vocab_size - 1] += 4.0
    return grid.log_softmax(-1)
