"""Emformer layers: what a chunk sees, against a slow version that has no padding and no masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.config import Chunking, TransducerConfig
from offramp.models.transducer import EmformerEncoder
from offramp.nn import emformer
from offramp.nn.emformer import EmformerLayer, Gather, SegmentAttention, Segments
from thinned import thinned
from toy_encoder import features
from toy_transducer import CHUNKINGS, ENCODERS, KEPT, KEPT_CHUNKINGS, transducer

CPU = torch.device("cpu")
every_encoder = pytest.mark.parametrize("changes", thinned(ENCODERS, KEPT))
every_chunking = pytest.mark.parametrize("chunking", thinned(CHUNKINGS, KEPT_CHUNKINGS))


def turn(x: Tensor, at: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + Dh/2) of x [n, Dh] by at [n] / 10000^(2i / Dh), as complex."""
    half = x.shape[1] // 2
    angles = at[:, None] * 10_000.0 ** (-torch.arange(half) / half).double()
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=1)


def attend_slowly(
    attention: SegmentAttention, query: Tensor, keys: Tensor, at: Tensor, keys_at: Tensor | None
) -> Tensor:
    """query [n, D] at positions [n] over keys [m, D]; keys_at None: no rotary positions."""
    size, heads = attention.head_dim, []
    q, (k, v) = attention.query(query), attention.key_value(keys).chunk(2, dim=1)
    for h in range(attention.num_heads):
        mine = slice(h * size, (h + 1) * size)
        a, b = q[:, mine], k[:, mine]
        if keys_at is not None:
            a, b = turn(a, at), turn(b, keys_at)
        heads.append((a @ b.T / size**0.5).softmax(dim=1) @ v[:, mine])
    return attention.output(torch.cat(heads, dim=1))


class SlowLayer:
    """A layer that hears one utterance chunk by chunk and remembers all that it ever heard."""

    def __init__(self, layer: EmformerLayer, config: TransducerConfig, chunking: Chunking) -> None:
        self.layer, self.config, self.chunking = layer, config, chunking
        D = config.d_model
        self.heard = torch.zeros(0, D).double()  # normed frames, for attention
        self.gated = torch.zeros(max(0, config.kernel_size - 1), D).double()
        self.summaries = torch.zeros(0, D).double()  # one for each chunk

    def hear(self, x: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, D], a chunk and what follows it; summary [D], by the layer below."""
        S, L, M = self.chunking.chunk, self.chunking.left_context, self.chunking.memory
        attention, start, past = self.layer.attention, len(self.heard), len(self.summaries)
        y = attention.norm(x)
        left, bank = self.heard[max(0, start - L) :], self.summaries[max(0, past - M) :]
        at = torch.arange(start, start + len(x))
        frames_at = torch.arange(start - len(left), start + len(x))
        bank_at = torch.arange(past - len(bank), past) * S
        here = torch.cat((left, y))
        rotary = self.config.positions == "rotary"
        keys_at = torch.cat((bank_at, frames_at)) if rotary else None
        x = x + attend_slowly(attention, y, torch.cat((bank, here)), at, keys_at)
        if M:
            query, first = y[:S].mean(dim=0, keepdim=True), at[:1]
            own = attend_slowly(attention, query, here, first, frames_at if rotary else None)
            self.summaries = torch.cat((self.summaries, summary[None]))
            summary = own[0].clamp(-10, 10)
        self.heard = torch.cat((self.heard, y[:S]))
        if self.layer.convolution is not None:
            x = x + self._convolve(x)
        return self.layer.norm(x + self.layer.feed_forward(x)), summary

    def _convolve(self, x: Tensor) -> Tensor:
        module, K = self.layer.convolution, self.config.kernel_size
        assert module is not None
        frames = torch.cat((self.gated, F.glu(module.gated(module.norm(x)), dim=-1)))
        self.gated = frames[: len(self.gated) + self.chunking.chunk]
        recent = frames[len(frames) - len(x) - K + 1 :]
        mixed = module.depthwise(recent.T[None, :, None])[0, :, 0].T
        return module.output(F.silu(module.inner_norm(mixed)))


def slow(encoder: EmformerEncoder, x: Tensor, chunking: Chunking) -> Tensor:
    """Features [T, F] of one utterance -> [T', J]."""
    config = encoder.config
    r, S = config.time_reduction, chunking.chunk
    x = F.pad(encoder.feature_norm(x), (0, 0, config.history, -len(x) % r))
    frames = encoder.input(x[None])[0]
    layers = [SlowLayer(layer, config, chunking) for layer in encoder.layers]
    written = []
    for start in range(0, len(frames), S):
        h = frames[start : start + S + chunking.right_context]
        summary = h[:S].mean(dim=0)
        for layer in layers:
            h, summary = layer.hear(h, summary)
        written.append(h[:S])
    return encoder.output_norm(encoder.output_projection(torch.cat(written)))


@every_encoder
@every_chunking
def test_an_encoder_writes_what_its_slow_version_writes(changes: Any, chunking: Chunking) -> None:
    """The slow one hears one utterance at a time; the fast one a ragged batch with NaN padding."""
    encoder = transducer(**changes).double().encoder
    x, n = features([41, 3, 24])
    outputs, lengths = encoder(x, n, chunking)
    assert lengths.tolist() == [encoder.config.output_frames(length) for length in n.tolist()]
    assert outputs.shape[1] == max(lengths)
    for row, length in enumerate(n.tolist()):
        expected = slow(encoder, x[row, :length].double(), chunking)
        found = outputs[row, : lengths[row]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("left", "memory"), [(0, 0), (1, 0), (4, 0), (7, 0), (0, 1), (0, 3), (5, 2), (4, 9)]
)
@pytest.mark.parametrize("chunking", [Chunking(1, 0), Chunking(3, 0, 1), Chunking(2, 0, 5)])
def test_rows_are_gathered_from_chunks_and_from_the_call_before(
    chunking: Chunking, left: int, memory: int
) -> None:
    """Rows carry their own names; ten chunks in calls of any size bring the same to each."""
    S, own, count = chunking.chunk, chunking.frames, 10
    width = own + (memory > 0)
    # Frame t is named t, the summary of chunk i -1000 - i, a copy of frame t from chunk i t + 0.5.
    new = torch.empty(count, width)
    for i in range(count):
        at = torch.arange(i * S, i * S + own, dtype=torch.float32)
        new[i, :own] = at + 0.5 * (at >= (i + 1) * S)
        new[i, own:] = -1000.0 - i

    def expected(i: int) -> list[float]:
        summaries = [-1000.0 - j if j >= 0 else 0.0 for j in range(i - memory, i)]
        frames = [float(t) if t >= 0 else 0.0 for t in range(i * S - left, i * S)]
        return summaries + frames + new[i, :own].tolist()

    for sizes in ([10], [1] * 10, [3, 1, 4, 2]):
        cache, found, start = torch.zeros(1, memory + left, 1), [], 0
        for size in sizes:
            gather = Gather.of(chunking, size, left, memory, CPU)
            rows = new[start : start + size].reshape(1, -1, 1)
            found.append(gather(rows, cache).view(size, -1))
            start += size
        assert torch.cat(found).tolist() == [expected(i) for i in range(count)]
    whole = Gather.of(chunking, count, left, memory, CPU)(new.reshape(1, -1, 1), None)
    assert whole.view(count, -1).tolist() == [expected(i) for i in range(count)]


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_few_rows_are_convolved_as_many_are(
    kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = transducer(kernel_size=kernel_size).encoder.layers[0].convolution
    assert module is not None
    x = torch.randn(2, kernel_size + 4, 16, generator=torch.Generator().manual_seed(0))
    few = module._convolve(x, 5)
    monkeypatch.setattr(emformer, "_FEW_ROWS", 0)
    torch.testing.assert_close(few, module._convolve(x, 5), rtol=0, atol=1e-6)


def segments(chunking: Chunking, length: int, chunks: range, **changes: Any) -> Segments:
    return Segments.of(
        transducer(**changes).config, chunking, torch.tensor([length]), chunks, torch.float32
    )


def test_a_mask_is_made_only_where_something_is_hidden() -> None:
    chunking = Chunking(3, 4, 1)

    def mask(first: int, length: int, chunking: Chunking = chunking) -> Tensor | None:
        return segments(chunking, length, range(first, first + 1)).mask

    assert mask(2, 10) is None, "in the middle of a stream all is there"
    start, end = mask(1, 10), mask(2, 9)
    assert start is not None and end is not None
    assert start.flatten().tolist() == [False] + [True] * 7, "frame -1 is before the beginning"
    assert end.flatten().tolist() == [True] * 7 + [False], "frame 9 is beyond the end"
    padding = mask(3, 9)
    assert padding is None, "a chunk of padding sees all, for it must see something"
    remembering = mask(1, 10, Chunking(3, 2, 1, memory=2))
    assert remembering is not None and remembering.shape == (1, 1, 5, 8)
    frame, summary = remembering[0, 0, 0].tolist(), remembering[0, 0, 4].tolist()
    assert frame == [False] + [True] * 7, "one earlier chunk to remember"
    assert summary == [False] * 2 + [True] * 6, "a summary sees no summaries"


def test_summaries_stay_small() -> None:
    """A bank feeds on itself from layer to layer; loud summaries are cut off at 10."""
    layer = transducer(positions="rotary").encoder.layers[0]
    chunking = Chunking(3, 2, 1, memory=2)
    three = segments(chunking, 9, range(3))
    layer.attention.output.weight.mul_(1000)
    _, memory = layer(torch.randn(1, 3, 4, 16), torch.randn(1, 3, 16), three, None)
    assert memory.abs().max() == 10.0


def test_rotary_positions_hold_for_hours() -> None:
    """Only differences count: a day into a stream a chunk is heard as at its beginning."""
    chunking, day = Chunking(2, 0), 24 * 3600 * 25 // 2
    layer = transducer(positions="rotary").encoder.layers[0].attention
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    early, late = (
        segments(chunking, 2 * first + 2, range(first, first + 1), positions="rotary")
        for first in (0, day)
    )
    torch.testing.assert_close(
        layer(x, None, early, None)[0], layer(x, None, late, None)[0], rtol=0, atol=1e-5
    )
