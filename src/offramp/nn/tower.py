"""The tower: a stack of layers that can be stopped and resumed at any exit.

Everything in Offramp that leaves early rests on these three calls. Running `[0, E)` and then
`[E, L)` equals running `[0, L)` bit for bit, and no layer is computed twice for one position.
Eager PyTorch is the reference; a faster engine implements the same protocol.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from offramp.config import DecoderConfig
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.nn.cache import KVCache


class Tower(Protocol):
    """A stack of `config.num_layers` layers with one shared un-embedding for every exit."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, D]."""
        ...

    def run(self, h: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        """Layers `start` to `stop` - 1 over [B, T, D], appending to `cache`; same shape out.

        The T tokens of row b stand at positions `cache.length(start)[b]` onwards.
        """
        ...

    def logits(self, h: Tensor, exit_layer: int) -> Tensor:
        """Hidden states after `exit_layer` layers [B, T, D] -> logits [B, T, V]."""
        ...


class TracedTower:
    """A tower that writes what it ran into a `Trace`, and is otherwise the tower it wraps."""

    def __init__(self, tower: Tower, trace: Trace) -> None:
        self._tower = tower
        self.trace = trace

    @property
    def config(self) -> DecoderConfig:
        return self._tower.config

    @property
    def device(self) -> torch.device:
        return self._tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tower.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        return self._tower.embed(tokens)

    def run(self, h: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        self.trace.layers(start, stop, positions=h.shape[0] * h.shape[1])
        return self._tower.run(h, start, stop, cache)

    def logits(self, h: Tensor, exit_layer: int) -> Tensor:
        self.trace.head(positions=h.shape[0] * h.shape[1])
        return self._tower.logits(h, exit_layer)


class TruncatedTower:
    """The first `exit_layer` layers of a tower as a tower: plain early exit for every token.

    LayerSkip (arXiv 2404.16710), section 4.3. Whatever decodes with a tower decodes with this,
    faster, and writes another text.
    """

    def __init__(self, tower: Tower, exit_layer: int) -> None:
        if not 1 <= exit_layer <= tower.config.num_layers:
            raise InputError(
                f"exit layer is {exit_layer}; it must lie between 1 and "
                f"{tower.config.num_layers}, the number of layers"
            )
        self._tower = tower
        self.config = replace(tower.config, num_layers=exit_layer)

    @property
    def device(self) -> torch.device:
        return self._tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tower.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        return self._tower.embed(tokens)

    def run(self, h: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        assert stop <= self.config.num_layers, "a truncated tower ends at its exit"
        return self._tower.run(h, start, stop, cache)

    def logits(self, h: Tensor, exit_layer: int) -> Tensor:
        return self._tower.logits(h, exit_layer)
