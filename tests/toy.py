"""Toy models: random weights, and so small that a test takes milliseconds.

Unlike a fresh model's, the weights are large and the norms and biases random, so that every
layer matters and a wrong one shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.config import DecoderConfig
from offramp.data.batching import IGNORE, TokenBatch
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.cache import KVCache

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "max_positions": 128,
}

# What the families differ in, as changes to `config`.
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one kv head per head": {"num_kv_heads": 4},
    "sliding window": {"sliding_window": 5},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "q/k norm, wide heads": {"qk_norm": True, "head_dim": 16},
    "tied": {"tied_embeddings": True},
}
KEPT = ("grouped heads", "sliding window", "tied")  # by the default suite, of large matrices


def config(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**_SIZES, **changes})


def decoder(seed: int = 0, **changes: Any) -> DecoderLM:
    """A decoder with random weights, in eval mode, without gradients; `changes` to its config."""
    model = DecoderLM(config(**changes))
    randomize(model, seed)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices halve the size of their input, about; vectors are 1 (norms) or 0, and a bit."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.normal_(0.0, 0.7 * p.shape[-1] ** -0.5, generator=generator)
        else:
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2, generator=generator)


def tokens(batch_size: int, length: int, vocab_size: int = 61, seed: int = 0) -> Tensor:
    """Random token ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, length), generator=generator)


def run(model: DecoderLM, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """Hidden states [B, T, D] after the whole tower; without a cache, over one of its own."""
    cache = cache or KVCache(model.config, *ids.shape)
    return model.run(model.embed(ids), 0, model.config.num_layers, cache)


class Batches:
    """Random tokens as a pure function of the step, the first targets of each row ignored."""

    def __init__(self, batch_size: int = 4, length: int = 7, vocab_size: int = 61) -> None:
        self._shape, self._vocab_size = (batch_size, length), vocab_size

    def batch(self, step: int, shard: int, num_shards: int) -> TokenBatch:
        ids = tokens(self._shape[0], self._shape[1] + 1, self._vocab_size, seed=1000 + step)
        targets = ids[:, 1:].clone()
        targets[:, :2] = IGNORE
        mine = slice(shard, None, num_shards)
        return TokenBatch(ids[mine, :-1], targets[mine], int((targets != IGNORE).sum()))
