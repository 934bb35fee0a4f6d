"""Heads that predict the tokens after the next one from the same hidden state (arXiv 2409.08148).

Head 1 is the tower's own path, which nothing here touches: with or without heads 2 to K the tower
writes the same, bit for bit. They read h, the tower's top layer before its final norm. `latent`
moves h by a D x D matrix and reads it through the tower's own norm and un-embedding; `independent`
gives each head an un-embedding of its own (arXiv 2401.10774). Both begin at zero: latent heads
as copies of head 1, independent ones with all tokens alike.

A head is for drafts, so it may know only the first `draft_vocab` tokens (a tokenizer's merges
come in order of frequency; after FR-Spec, arXiv 2502.14856): what it cannot propose costs a draft,
never a word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import DecoderConfig
from offramp.config_speech_lm import HeadsConfig
from offramp.nn.layers import RMSNorm
from offramp.nn.tower import Tower


class Heads(nn.Module, ABC):
    """Heads 2 to K; `future` counts them from 0, so that head k is `future` k - 2."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def num_future_tokens(self) -> int:
        """K - 1: tokens after head 1's that are predicted."""
        return self.config.count - 1

    @abstractmethod
    def logits(self, h: Tensor, tower: Tower) -> Tensor:
        """h [..., D], of `tower`'s top layer -> [..., K-1, V], V `draft_vocab` if there is one."""

    @abstractmethod
    def head_logits(self, future: int, h: Tensor, tower: Tower) -> Tensor:
        """Those of one head, [..., V], without the memory of the others."""


class LatentHeads(Heads):
    """h + SiLU(W h) for each head, W [D, D], read by the tower; (K - 1) D^2 weights."""

    def __init__(self, config: HeadsConfig, d_model: int) -> None:
        super().__init__(config)
        # All of them are one matrix: at batch 1 the time goes into starting operations.
        self.expansion = nn.Linear(d_model, self.num_future_tokens * d_model, bias=False)
        nn.init.zeros_(self.expansion.weight)

    def latents(self, h: Tensor) -> Tensor:
        """h [..., D] -> [..., K-1, D]"""
        moved = F.silu(self.expansion(h)).view(*h.shape[:-1], self.num_future_tokens, h.shape[-1])
        latents: Tensor = h[..., None, :] + moved
        return latents

    def logits(self, h: Tensor, tower: Tower) -> Tensor:
        return self._read(self.latents(h), tower)

    def head_logits(self, future: int, h: Tensor, tower: Tower) -> Tensor:
        D = h.shape[-1]
        rows = self.expansion.weight[future * D : (future + 1) * D]
        return self._read(h + F.silu(F.linear(h, rows)), tower)

    def _read(self, latents: Tensor, tower: Tower) -> Tensor:
        """latents [..., D] -> [..., V], in one product."""
        rows = latents.reshape(1, -1, latents.shape[-1])  # a tower reads [B, T, D]
        scores = _first_logits(tower, rows, self.config.draft_vocab)
        return scores.view(*latents.shape[:-1], scores.shape[-1])


class IndependentHeads(Heads):
    """A norm and then D x V for each head; (K - 1) D V weights."""

    def __init__(self, config: HeadsConfig, decoder: DecoderConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.draft_vocab or decoder.vocab_size
        rows = self.num_future_tokens * self.vocab_size
        self.norm = RMSNorm(decoder.d_model, decoder.norm_eps)
        self.unembedding = nn.Linear(decoder.d_model, rows, bias=False)
        nn.init.zeros_(self.unembedding.weight)

    def logits(self, h: Tensor, tower: Tower) -> Tensor:
        scores: Tensor = self.unembedding(self.norm(h))
        return scores.view(*h.shape[:-1], self.num_future_tokens, self.vocab_size)

    def head_logits(self, future: int, h: Tensor, tower: Tower) -> Tensor:
        V = self.vocab_size
        rows = self.unembedding.weight[future * V : (future + 1) * V]
        return F.linear(self.norm(h), rows)


def build_heads(config: HeadsConfig, decoder: DecoderConfig) -> Heads:
    """Heads for a decoder of that shape, which `SpeechLMConfig` has checked against it."""
    if config.kind == "latent":
        return LatentHeads(config, decoder.d_model)
    return IndependentHeads(config, decoder)


@runtime_checkable
class _OpenTower(Protocol):
    """A tower that shows what it reads its top layer with; `unembedding` None: the embedding."""

    norm: Any
    embedding: Any
    unembedding: Any


def _first_logits(tower: Tower, h: Tensor, num_tokens: int | None) -> Tensor:
    """Logits of the first `num_tokens` of the vocabulary, None: of all.

    A tower whose parts are out of sight, or not floats, scores all tokens, and the rest is cut off.
    """
    if num_tokens is not None and isinstance(tower, _OpenTower):
        head = tower.embedding if tower.unembedding is None else tower.unembedding
        if isinstance(head, nn.Embedding | nn.Linear):
            return F.linear(tower.norm(h), head.weight[:num_tokens])
    logits = tower.logits(h, tower.config.num_layers)
    return logits if num_tokens is None else logits[..., :num_tokens]
