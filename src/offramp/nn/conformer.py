"""A Conformer layer (arXiv 2005.08100) that computes the same for a padded batch as for one.

Half a feed-forward, self-attention, a convolution module, half a feed-forward, a norm; without
relative position scores: positions are added to the input before, or rotate queries and keys.
Padding is kept out of attention by a mask and is zero before the depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import EncoderConfig, TransducerConfig
from offramp.nn.rotary import rotate


def _angles(num_frames: int, size: int, like: Tensor) -> Tensor:
    """Angles [T, size / 2] of frame t: t / 10000^(2i / size), float32."""
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=like.device) / size
    frames = torch.arange(num_frames, dtype=torch.float32, device=like.device)
    return torch.outer(frames, 10_000.0**-exponent)


def sinusoids(num_frames: int, size: int, like: Tensor) -> Tensor:
    """Absolute positions [T, size]: sine and cosine in turns (arXiv 1706.03762, section 3.5)."""
    angles = _angles(num_frames, size, like)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(like)


@dataclass(frozen=True)
class Frames:
    """Which frames of a batch [B, T] are real, and how attention turns them.

    lengths: int64 [B], real frames. real: bool [B, T, 1], None where all are. turns: (cos,
    signed sin), each [1, T, 1, Dh], None without rotary positions.
    """

    lengths: Tensor
    real: Tensor | None
    turns: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, lengths: Tensor, num_frames: int, head_dim: int | None, like: Tensor) -> Frames:
        """For a batch of `num_frames` frames; head_dim None: no rotary positions."""
        at = torch.arange(num_frames, device=lengths.device)
        real = (at < lengths[:, None])[:, :, None]
        turns = None
        if head_dim is not None:
            angles = _angles(num_frames, head_dim, like)
            cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
            sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
            turns = (cos.to(like)[None, :, None], sin.to(like)[None, :, None])
        return cls(lengths, None if bool(real.all()) else real, turns)

    def every(self, factor: int, head_dim: int | None, like: Tensor) -> Frames:
        """The frames of a branch at a lower rate: ceil(length / factor) are real."""
        num_frames = -(-like.shape[1] // factor)
        lengths = torch.div(self.lengths + factor - 1, factor, rounding_mode="floor")
        return Frames.of(lengths, num_frames, head_dim, like)

    def select(self, rows: Tensor) -> Frames:
        """Those of `rows` [K], as many frames as before."""
        real = None if self.real is None else self.real.index_select(0, rows)
        return Frames(self.lengths.index_select(0, rows), real, self.turns)

    def trim(self, num_frames: int) -> Frames:
        """The first `num_frames` frames; those cut off must be padding."""
        real = None if self.real is None else self.real[:, :num_frames]
        turns = self.turns and (self.turns[0][:, :num_frames], self.turns[1][:, :num_frames])
        return Frames(self.lengths, None if real is None or bool(real.all()) else real, turns)


class Dropout(nn.Module):
    """Drops a share `p` of the elements in training and scales up the others, as nn.Dropout does.

    On a CPU it draws a byte for each element, so `p` counts in steps of 1/256; nn.Dropout draws
    a float, takes three times as long, and would take as long as the matrices around it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._dropped = min(255, max(1, round(256 * p))) if p > 0 else 0  # of 256 byte values

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self._dropped == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self._dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - self._dropped))


class FeedForward(nn.Module):
    """Norm, an activation between two matrices; Emformer layers have it too."""

    def __init__(
        self,
        config: EncoderConfig | TransducerConfig,
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.activation(self.up(self.norm(x))))
        output: Tensor = self.dropout(self.down(y))
        return output


class SelfAttention(nn.Module):
    """Norm, then every real frame sees every real frame."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.norm = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(self.norm(x)).view(B, T, 3 * self.num_heads, self.head_dim)
        qk, v = torch.split(qkv, [2 * self.num_heads, self.num_heads], dim=2)
        if frames.turns is not None:
            cos, sin = frames.turns
            qk = rotate(qk, cos.to(qk.dtype), sin.to(qk.dtype))
        q, k = qk.transpose(1, 2).chunk(2, dim=1)
        mask = None if frames.real is None else frames.real.transpose(1, 2)[:, None]
        y = attend(q, k, v.transpose(1, 2), mask)
        output: Tensor = self.dropout(self.output(y.transpose(1, 2).reshape(B, T, D)))
        return output


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v over keys where `mask` [B, 1, 1, T] is True; [B, H, T, Dh].

    Fused, except in bf16 training on a CPU over up to 20 s of audio. There [16, 4, 250, 36]
    takes 55 ms fused and 28 ms plain, forward and backward (Zen 4, one thread); in float32 the
    fused one is the faster at any length.
    """
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    plain = on_cpu and q.requires_grad and q.shape[2] <= 512
    return (attend_plainly if plain else attend_fused)(q, k, v, mask)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1), v)


class ConvModule(nn.Module):
    """Norm, gated pointwise, depthwise over time, norm, SiLU, pointwise.

    The inner norm is the published BatchNorm, whose training statistics here are those of the
    real frames, or LayerNorm. LayerNorm computes the same in training as after it, depends on
    neither batch-mates nor shards nor processes, and has no state beside its weights.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        D, K = config.d_model, config.kernel_size
        self.norm = nn.LayerNorm(D)
        self.gated = nn.Linear(D, 2 * D)
        self.depthwise = nn.Conv1d(D, D, K, padding=K // 2, groups=D)
        self.inner_norm = nn.BatchNorm1d(D) if config.conv_norm == "batch" else nn.LayerNorm(D)
        self.output = nn.Linear(D, D)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        y = F.glu(self.gated(self.norm(x)), dim=-1)
        if frames.real is not None:
            y = y.masked_fill(~frames.real, 0.0)
        y = F.silu(self._normalise(self._convolve(y), frames.real))
        output: Tensor = self.dropout(self.output(y))
        return output

    def _convolve(self, x: Tensor) -> Tensor:
        """The depthwise convolution over [B, T, D], as one over images of height 1.

        Read that way, [B, T, D] is already laid out as the fast kernel wants it (channels last);
        the one-dimensional call would copy it there and back, and takes three times as long.
        """
        conv = self.depthwise
        y = F.conv2d(
            x.transpose(1, 2)[:, :, None],
            conv.weight[:, :, None],
            conv.bias,
            padding=(0, conv.kernel_size[0] // 2),
            groups=conv.groups,
        )
        return y[:, :, 0].transpose(1, 2)

    def _normalise(self, x: Tensor, real: Tensor | None) -> Tensor:
        if isinstance(self.inner_norm, nn.LayerNorm) or real is None or not self.training:
            flat: Tensor = self.inner_norm(x.flatten(0, 1))
            return flat.view_as(x)
        flat, kept = x.flatten(0, 1), real.flatten().nonzero().flatten()
        normed = self.inner_norm(flat.index_select(0, kept))
        return torch.zeros_like(flat, dtype=normed.dtype).index_copy(0, kept, normed).view_as(x)


class ConformerLayer(nn.Module):
    """[B, T, D] -> [B, T, D]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.first_feed_forward = FeedForward(config)
        self.attention = SelfAttention(config)
        self.convolution = ConvModule(config)
        self.second_feed_forward = FeedForward(config)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = x + 0.5 * self.first_feed_forward(x)
        x = x + self.attention(x, frames)
        x = x + self.convolution(x, frames)
        x = x + 0.5 * self.second_feed_forward(x)
        output: Tensor = self.norm(x)
        return output
