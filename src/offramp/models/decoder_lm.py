"""The decoder language model of the Llama family as a tower with an exit after every layer.

Every exit reads through the one final norm and the one un-embedding (LayerSkip, arXiv
2404.16710, section 4.2): exits add no parameters. Inference runs over a `KVCache`, training
over whole sequences layer by layer; both use the same layers.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import DecoderConfig
from offramp.errors import InputError
from offramp.nn.cache import KVCache
from offramp.nn.layers import DecoderLayer, RMSNorm, View
from offramp.nn.rotary import RotaryTable


class TokenEmbedding(nn.Embedding):
    """Rows for tokens; where the un-embedding is tied to it, scores of tokens too."""

    def scores(self, h: Tensor) -> Tensor:
        """h [..., D] -> [..., V]"""
        return F.linear(h, self.weight)


class DecoderLM(nn.Module):
    """Implements `nn.tower.Tower`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = (
            None
            if config.tied_embeddings
            else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        self._rotary = RotaryTable(config)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device  # compression leaves norms alone

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def init_weights(self, seed: int) -> None:
        """Normal(0, 0.02); the matrices that write into the residual stream by sqrt(2L) less."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim < 2:
                    p.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                into_residual = name.endswith(("output.weight", "down.weight"))
                scale = (2 * self.config.num_layers) ** -0.5 if into_residual else 1.0
                p.normal_(0.0, 0.02 * scale, generator=generator)

    # -- the tower ---------------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        h: Tensor = self.embedding(tokens)
        return h

    def run(self, h: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        if not 0 <= start <= stop <= self.config.num_layers:
            raise InputError(
                f"layers {start} to {stop} were asked for; allowed: 0 <= start <= stop <= "
                f"{self.config.num_layers}"
            )
        if start == stop:
            return h
        span = cache.span(start, h.shape[1])
        cos, sin = self._rotary.upto(span.total, h)
        if span.positions is None:
            cos, sin = cos[None, span.start[0] :, None], sin[None, span.start[0] :, None]
        else:
            cos, sin = cos[span.positions][:, :, None], sin[span.positions][:, :, None]
        causal = span.mask is None and h.shape[1] > 1
        view = View(cos, sin, span.mask, causal)
        for i in range(start, stop):
            h = self.layers[i](h, view, partial(cache.append, i, span=span))
        return h

    def logits(self, h: Tensor, exit_layer: int) -> Tensor:
        """`exit_layer` is ignored: all exits share one norm and one un-embedding."""
        scores = self.embedding.scores if self.unembedding is None else self.unembedding
        logits: Tensor = scores(self.norm(h))
        return logits

    # -- training ----------------------------------------------------------------------------

    def view(self, num_tokens: int, segments: Tensor | None = None) -> View:
        """The view of whole sequences [B, T], without a cache.

        `segments` [B, T] numbers the documents packed into a row: tokens see and count
        positions within their own document only.
        """
        like = self.norm.weight
        cos, sin = self._rotary.upto(num_tokens, like)
        if segments is None and self.config.sliding_window is None:
            return View(cos[None, :, None], sin[None, :, None], None, causal=True)
        at = torch.arange(num_tokens, device=like.device)
        mask = (at <= at[:, None])[None, None]
        if self.config.sliding_window is not None:
            mask = mask & (at > at[:, None] - self.config.sliding_window)
        if segments is None:
            return View(cos[None, :, None], sin[None, :, None], mask, causal=False)
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        positions = at - torch.where(starts, at, 0).cummax(dim=1).values
        return View(cos[positions][:, :, None], sin[positions][:, :, None], mask, causal=False)

    def layer(self, index: int, h: Tensor, view: View) -> Tensor:
        """One layer over whole sequences h [B, T, D]."""
        h = self.layers[index](h, view)
        return h
