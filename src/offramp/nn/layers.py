"""One decoder layer: grouped-query attention and a SwiGLU feed-forward, both behind an RMS norm.

Query, key and value projections are one matrix, gate and up another: at batch 1 the time goes
into starting operations, so fewer of them is faster. `models/hub.py` splits them on saving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import DecoderConfig
from offramp.nn.rotary import rotate


class KVStore(Protocol):
    """Takes the new keys and values of a layer [B, H, T, Dh], returns all to attend to."""

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class View:
    """What the T tokens of each row see: their rotary angles and the mask of earlier tokens.

    cos, sin: [B or 1, T, 1, Dh]. mask: bool [B or 1, 1, T, S], True = may see, or None; then
    `causal` says whether token t sees tokens up to t or every token sees every other.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool

    def select(self, rows: Tensor) -> View:
        """The view of `rows` [K] alone: what belongs to a sample follows the sample."""

        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x.index_select(0, rows)

        mask = None if self.mask is None else pick(self.mask)
        return View(pick(self.cos), pick(self.sin), mask, self.causal)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (GQA: arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.d_model, width, bias=config.qkv_bias)
        self.output = nn.Linear(
            config.num_heads * config.head_dim, config.d_model, bias=config.output_bias
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, view: View, store: KVStore | None) -> Tensor:
        B, T, _ = x.shape
        Hq, Hkv, Dh = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv(x).view(B, T, Hq + 2 * Hkv, Dh)
        qk, v = torch.split(qkv, [Hq + Hkv, Hkv], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :Hq]), self.k_norm(qk[:, :, Hq:])), dim=2)
        qk = rotate(qk, view.cos, view.sin).transpose(1, 2)
        q, k = torch.split(qk, [Hq, Hkv], dim=1)
        v = v.transpose(1, 2)
        if store is not None:
            k, v = store(k, v)
        if T == 1 and Hq != Hkv:
            # One query per head: the heads that share a key become rows of one small product,
            # which spares copying the keys once per query head.
            q = q.reshape(B, Hkv, Hq // Hkv, Dh)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=view.mask, is_causal=view.causal, enable_gqa=Hq != Hkv
            )
            y = y.transpose(1, 2)
        output: Tensor = self.output(y.reshape(B, T, Hq * Dh))
        return output


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        output: Tensor = self.down(F.silu(gate) * up)
        return output


class DecoderLayer(nn.Module):
    """h + attention(norm(h)), then the same with the feed-forward."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, h: Tensor, view: View, store: KVStore | None = None) -> Tensor:
        h = h + self.attention(self.attention_norm(h), view, store)
        h = h + self.feed_forward(self.feed_forward_norm(h))
        return h
