"""Emformer layers (arXiv 2010.10759): attention by chunks with left and right context.

A batch is held as N chunks [B, N, S + R, D], each with its own copies of the R frames after it,
so no layer looks further ahead than these. A chunk attends to itself, to its copies, to the keys
and values of the L frames before it and to M summaries of earlier chunks. A stream is the same
computation with N = 1, the keys and values of before kept from the last call; training runs all
chunks of an utterance at once, without a loop and without a mask that grows with its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import Chunking, TransducerConfig
from offramp.nn.conformer import Dropout, FeedForward, attend
from offramp.nn.rotary import rotate

_FEW_ROWS = 32  # up to so many a product and a sum are quicker than a convolution (4 times at 5)
_SUMMARY_LIMIT = 10.0  # summaries feed on summaries: a bound keeps them from growing


@dataclass(frozen=True)
class LayerCache:
    """What a layer keeps of a stream; `Gather` reads and rewrites it.

    keys, values: [B, M + L, D], of summaries and left context. frames: [B, K - 1, D], what the
    convolution still reads.
    """

    keys: Tensor
    values: Tensor
    frames: Tensor


@dataclass(frozen=True)
class Gather:
    """Brings to every chunk the rows of earlier chunks that it reads.

    past: rows kept from the last call, first the summaries, then the frames. read: int64
    [N (past + S + R)], places in (past rows, new rows); None: all of them in order, as for
    one chunk without summaries. keep: int64 [past], those that the chunk after the last will read.
    """

    past: int
    read: Tensor | None
    keep: Tensor

    @classmethod
    def of(
        cls, chunking: Chunking, count: int, left: int, memory: int, device: torch.device
    ) -> Gather:
        """For `count` chunks that read `left` frames and `memory` summaries before them.

        A chunk brings S + R rows and, where there is a memory, one more: its summary.
        """
        own, past = chunking.frames, memory + left
        width = own + (memory > 0)
        chunk = torch.arange(count + 1, device=device)[:, None]  # the last: the one after these

        def before(size: int) -> Tensor:
            return torch.arange(-size, 0, device=device)

        frame = chunk * chunking.chunk + before(left)  # 0: the first of the first chunk
        place = frame // chunking.chunk * width + frame % chunking.chunk
        frames = torch.where(frame < 0, frame, place) + past
        summary = chunk + before(memory)
        summaries = torch.where(summary < 0, summary + memory, past + summary * width + own)
        here = past + chunk * width + torch.arange(own, device=device)
        read = torch.cat((summaries, frames, here), dim=1)
        alone = count == 1 and memory == 0
        return cls(past, None if alone else read[:count].flatten(), read[count, :past])

    def __call__(self, new: Tensor, cache: Tensor | None) -> Tensor:
        """new [B, N (S + R or one more), D], cache [B, past, D] -> [B, N (past + S + R), D].

        cache: rewritten for the next call; None: nothing came before.
        """
        if self.past == 0:
            return new
        old = new.new_zeros(len(new), self.past, new.shape[2]) if cache is None else cache
        rows = torch.cat((old, new), dim=1)
        if cache is not None:
            cache.copy_(rows.index_select(1, self.keep))
        return rows if self.read is None else rows.index_select(1, self.read)


@dataclass(frozen=True)
class Segments:
    """What the frames of N chunks see and where they stand; made once, for all layers.

    mask: bool [B N, 1, 1 or S + R + 1, keys], None where all see all. turns: (cos, signed sin),
    each [1, N (S + R or one more), 1, Dh], None without rotary positions. frames: of the
    convolution, None without one.
    """

    chunking: Chunking
    keys: Gather
    frames: Gather | None
    mask: Tensor | None
    turns: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        config: TransducerConfig,
        chunking: Chunking,
        lengths: Tensor,
        chunks: range,
        dtype: torch.dtype,
    ) -> Segments:
        """Chunks of these numbers, counted from 0, of utterances of `lengths` [B] frames."""
        device, count = lengths.device, len(chunks)
        keys = Gather.of(chunking, count, chunking.left_context, chunking.memory, device)
        frames = None
        if config.kernel_size:
            frames = Gather.of(chunking, count, config.kernel_size - 1, 0, device)
        numbers = torch.arange(chunks.start, chunks.stop, device=device)
        mask = _mask(chunking, lengths, numbers)
        turns = None
        if config.positions == "rotary":
            turns = _turns(config, chunking, numbers, dtype)
        return cls(chunking, keys, frames, mask, turns)


def _mask(chunking: Chunking, lengths: Tensor, chunks: Tensor) -> Tensor | None:
    """Which keys there are: those of frames inside the utterance, and of summaries of chunks.

    A chunk that lies wholly in the padding sees all: seeing nothing would be a division 0 / 0.
    """
    S, M = chunking.chunk, chunking.memory
    start = chunks[:, None] * S
    window = torch.arange(-chunking.left_context, chunking.frames, device=lengths.device)
    ends = lengths[:, None, None]
    seen = (start + window >= 0) & ((start + window < ends) | (start >= ends))  # [B, N, keys]
    if M == 0:
        return None if bool(seen.all()) else seen.flatten(0, 1)[:, None, None]
    earlier = chunks[:, None] + torch.arange(-M, 0, device=lengths.device) >= 0
    seen = torch.cat((earlier.expand(len(lengths), -1, -1), seen), dim=2).flatten(0, 1)
    summary = seen.clone()
    summary[:, :M] = False  # a summary is of its own chunk
    frames = seen[:, None].expand(-1, chunking.frames, -1)
    return torch.cat((frames, summary[:, None]), dim=1)[:, None]


def _turns(
    config: TransducerConfig, chunking: Chunking, chunks: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rotary angles of every row; a summary stands where its chunk begins.

    In double precision up to the cosine: after hours of a stream the positions are large.
    """
    within = torch.arange(chunking.frames, device=chunks.device)
    if chunking.memory:
        within = torch.cat((within, within[:1]))
    at = (chunks[:, None] * chunking.chunk + within).flatten()
    exponent = torch.arange(0, config.head_dim, 2, device=chunks.device) / config.head_dim
    angles = torch.outer(at.double(), 10_000.0 ** -exponent.double())
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos.to(dtype)[None, :, None], sin.to(dtype)[None, :, None]


class SegmentAttention(nn.Module):
    """Norm, then attention of every chunk to itself and to what it may see around it."""

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        D = config.d_model
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.norm = nn.LayerNorm(D)
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.output = nn.Linear(D, D)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: Tensor | None, segments: Segments, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, S + R, D], memory [B, N, D] (None: no bank) -> the same of the next layer."""
        B, N, own, D = x.shape
        x = source = self.norm(x)
        if memory is not None:
            summary = x[:, :, : segments.chunking.chunk].mean(dim=2, keepdim=True)
            source = torch.cat((x, memory[:, :, None].to(x.dtype)), dim=2)
            x = torch.cat((x, summary), dim=2)
        q = self.query(x).flatten(1, 2)
        k, v = self.key_value(source).flatten(1, 2).chunk(2, dim=-1)
        q, k = self._turn(q, segments), self._turn(k, segments)
        k = segments.keys(k, None if cache is None else cache.keys)
        v = segments.keys(v, None if cache is None else cache.values)
        shape = (B * N, -1, self.num_heads, self.head_dim)
        q, k, v = (y.view(shape).transpose(1, 2) for y in (q, k, v))
        y = self.output(attend(q, k, v, segments.mask).transpose(1, 2).reshape(B, N, -1, D))
        if memory is not None:
            memory = y[:, :, own].clamp(-_SUMMARY_LIMIT, _SUMMARY_LIMIT)
        return self.dropout(y[:, :, :own]), memory

    def _turn(self, x: Tensor, segments: Segments) -> Tensor:
        if segments.turns is None:
            return x
        cos, sin = (turn.to(x.dtype) for turn in segments.turns)
        heads = x.view(*x.shape[:2], self.num_heads, self.head_dim)
        return rotate(heads, cos, sin).flatten(2)


class CausalConvolution(nn.Module):
    """Norm, gated pointwise, depthwise over this and earlier frames, norm, SiLU, pointwise.

    The Conformer's convolution (arXiv 2005.08100) without a look ahead: the copies of later
    frames follow their own chunk, as they do in attention.
    """

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        D, K = config.d_model, config.kernel_size
        self.norm = nn.LayerNorm(D)
        self.gated = nn.Linear(D, 2 * D)
        self.depthwise = nn.Conv2d(D, D, (1, K), groups=D)
        self.inner_norm = nn.LayerNorm(D)
        self.output = nn.Linear(D, D)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, segments: Segments, cache: LayerCache | None) -> Tensor:
        assert segments.frames is not None, "made for a model without a convolution"
        B, N, own, D = x.shape
        y = F.glu(self.gated(self.norm(x)), dim=-1).flatten(1, 2)
        y = segments.frames(y, None if cache is None else cache.frames).view(B * N, -1, D)
        y = F.silu(self.inner_norm(self._convolve(y, own))).view(B, N, own, D)
        output: Tensor = self.dropout(self.output(y))
        return output

    def _convolve(self, x: Tensor, own: int) -> Tensor:
        """[B N, K - 1 + S + R, D] -> [B N, S + R, D]."""
        conv = self.depthwise
        assert conv.bias is not None
        if len(x) * own <= _FEW_ROWS:
            windows = x.unfold(1, conv.kernel_size[1], 1)
            return (windows * conv.weight[:, 0, 0]).sum(-1) + conv.bias
        # As images of height 1 the rows already lie as the fast kernel wants them.
        rows: Tensor = conv(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        return rows


class EmformerLayer(nn.Module):
    """Attention, the convolution if there is one, feed-forward, a norm."""

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        self.attention = SegmentAttention(config)
        self.convolution = CausalConvolution(config) if config.kernel_size else None
        self.feed_forward = FeedForward(config, F.gelu)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, memory: Tensor | None, segments: Segments, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, S + R, D], memory [B, N, D] or None -> both as the next layer takes them.

        memory: a summary of each chunk, by the layer below. cache: of a stream, brought up to
        date; None: the first chunk has nothing before it.
        """
        y, memory = self.attention(x, memory, segments, cache)
        x = x + y
        if self.convolution is not None:
            x = x + self.convolution(x, segments, cache)
        return self.norm(x + self.feed_forward(x)), memory
