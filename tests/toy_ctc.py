"""A toy CTC tower of the contract that early exit rests on; it remembers what it ran."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ToyState:
    h: Tensor
    lengths: Tensor
    layer: int

    def select(self, rows: Tensor) -> ToyState:
        lengths = self.lengths[rows]
        return ToyState(self.h[rows, : int(lengths.max())], lengths, self.layer)


class ToyTower:
    """Each layer mixes neighbouring frames; two features make one frame. Deeper exits are surer.

    runs: (start, stop, rows, frames of the padded batch) of each call of `run`. heads: the exits
    that were read.
    """

    exits = (2, 4, 6)

    def __init__(self, d_model: int = 12, vocab_size: int = 6, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(6, d_model, d_model, 3, generator=g) / math.sqrt(3 * d_model)
        self.head = torch.randn(vocab_size, d_model, generator=g)
        self.runs: list[tuple[int, int, int, int]] = []
        self.heads: list[int] = []

    def embed(self, features: Tensor, lengths: Tensor) -> ToyState:
        B, T, D = features.shape
        padded = F.pad(features * _mask(lengths, T), (0, 0, 0, T % 2))
        h = padded.view(B, -1, 2, D).sum(dim=2)
        return ToyState(h, (lengths + 1) // 2, 0)

    def run(self, state: ToyState, start: int, stop: int) -> ToyState:
        assert state.layer == start, "no layer twice, none left out"
        h = state.h
        self.runs.append((start, stop, h.shape[0], h.shape[1]))
        for weight in self.mix[start:stop]:
            h = h * _mask(state.lengths, h.shape[1])
            h = h + F.conv1d(h.transpose(1, 2), weight, padding=1).transpose(1, 2).tanh()
        return ToyState(h, state.lengths, stop)

    def log_probs(self, state: ToyState, exit_layer: int) -> Tensor:
        assert state.layer == exit_layer
        self.heads.append(exit_layer)
        return (F.linear(state.h, self.head) * exit_layer / 6).log_softmax(-1)


def _mask(lengths: Tensor, T: int) -> Tensor:
    return (torch.arange(T) < lengths[:, None])[..., None]


def batch(lengths: list[int], d_model: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features [B, T, F] that are louder, and so clearer, row by row, with garbage as padding."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lengths), max(lengths), d_model, generator=g)
    features *= torch.linspace(0.2, 3.0, len(lengths))[:, None, None]
    for row, length in zip(features, lengths, strict=True):
        row[length:] = 1e6
    return features, torch.tensor(lengths)
