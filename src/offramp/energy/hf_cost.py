"""How many multiply-accumulates (MACs) a transformers CTC encoder takes, from its shape alone.

Counted as in `cost.py`: matrix products and convolutions over all frames of one utterance, with the
head of every exit that was tested. The families are those of `models/hf_ctc.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class TowerShape(Protocol):
    """Sizes of an encoder; `num_inputs` are samples or feature frames, whichever it reads."""

    def frames(self, num_inputs: int) -> int:
        """Frames of the tower; 0: too short for one."""
        ...

    def most_inputs(self, frames: int) -> int:
        """The longest input that gives so many frames."""
        ...

    def front_macs(self, num_inputs: int) -> int:
        """All that comes before the first layer."""
        ...

    def layer_macs(self, frames: int) -> int: ...

    def head_macs(self, frames: int) -> int: ...


@dataclass(frozen=True)
class WaveformShape:
    """Wav2Vec2, HuBERT and WavLM: convolutions over samples, then Transformer layers.

    channels, kernels, strides: of the convolutions. position_kernel, position_groups: of the one
    that stands for positions. adapter: width of an adapter in every layer, 0 without. gated: the
    layers gate their positions (WavLM).
    """

    d_model: int
    d_ff: int
    vocab_size: int
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    position_kernel: int
    position_groups: int
    adapter: int = 0
    gated: bool = False

    def frames(self, num_inputs: int) -> int:
        return self._lengths(num_inputs)[-1]

    def most_inputs(self, frames: int) -> int:
        for kernel, stride in zip(self.kernels[::-1], self.strides[::-1], strict=True):
            frames = stride * frames + kernel - 1
        return frames

    def front_macs(self, num_inputs: int) -> int:
        D, lengths = self.d_model, self._lengths(num_inputs)
        sizes = zip(lengths, (1, *self.channels), self.channels, self.kernels, strict=False)
        convolutions = sum(T * C_in * C_out * kernel for T, C_in, C_out, kernel in sizes)
        # An even kernel makes a frame too many, which is then cut off.
        T = lengths[-1] + (self.position_kernel % 2 == 0)
        positions = T * D * (D // self.position_groups) * self.position_kernel
        return convolutions + lengths[-1] * self.channels[-1] * D + positions

    def layer_macs(self, frames: int) -> int:
        D = self.d_model
        weights = 4 * D * D + 2 * D * self.d_ff + 2 * D * self.adapter + 8 * D * self.gated
        return frames * weights + 2 * frames**2 * D

    def head_macs(self, frames: int) -> int:
        return frames * self.d_model * self.vocab_size

    def _lengths(self, num_inputs: int) -> list[int]:
        """Frames behind each convolution."""
        found = []
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            num_inputs = max(0, (num_inputs - kernel) // stride + 1)
            found.append(num_inputs)
        return found


@dataclass(frozen=True)
class ParakeetShape:
    """FastConformer (arXiv 2305.05084): 2-D convolutions over features, then Conformer layers.

    attention, key_values: widths of all heads together, of queries and of keys. channels, kernel,
    stride, stages: of the subsampling. conv_kernel: of the layers' own convolution.
    """

    d_model: int
    d_ff: int
    vocab_size: int
    attention: int
    key_values: int
    conv_kernel: int
    num_mels: int
    channels: int
    kernel: int
    stride: int
    stages: int

    def frames(self, num_inputs: int) -> int:
        return self._lengths(num_inputs)[-1]

    def most_inputs(self, frames: int) -> int:
        for _ in range(self.stages):
            frames = self.stride * frames + self.kernel - 1 - self._padding
        return frames

    def front_macs(self, num_inputs: int) -> int:
        C, area = self.channels, self.kernel**2
        places = [
            T * F
            for T, F in zip(self._lengths(num_inputs), self._lengths(self.num_mels), strict=True)
        ]
        later = sum(places[1:]) * C * (area + C)  # depthwise, then pointwise
        width: int = C * (self.num_mels // self.stride**self.stages)
        return places[0] * C * area + later + self.frames(num_inputs) * width * self.d_model

    def layer_macs(self, frames: int) -> int:
        D, A, distances = self.d_model, self.attention, 2 * frames - 1
        feed_forwards, projections = 4 * D * self.d_ff, 2 * D * (A + self.key_values)
        convolution = 3 * D * D + self.conv_kernel * D
        positions = distances * A * (D + frames)
        pairs = 2 * frames**2 * A
        return frames * (feed_forwards + projections + convolution) + positions + pairs

    def head_macs(self, frames: int) -> int:
        return frames * self.d_model * self.vocab_size

    @property
    def _padding(self) -> int:
        """At both ends together."""
        return 2 * ((self.kernel - 1) // 2)

    def _lengths(self, size: int) -> list[int]:
        """Frames (or features) behind each stage."""
        found = []
        for _ in range(self.stages):
            size = max(0, (size + self._padding - self.kernel) // self.stride + 1)
            found.append(size)
        return found


def shape_trail_macs(shape: TowerShape, num_inputs: int, tested: Sequence[int]) -> int:
    """MACs of an utterance up to the last of the exits `tested`, with the head of each."""
    frames = shape.frames(num_inputs)
    layers, heads = tested[-1] * shape.layer_macs(frames), len(tested) * shape.head_macs(frames)
    return shape.front_macs(num_inputs) + layers + heads


def shape_mac_cost(shape: TowerShape) -> Callable[[int, int, int], float]:
    """(start, stop, frames of the tower) -> MACs from one tested exit to the next.

    What frames do not tell of the input's length, the most counts.
    """

    def cost(start: int, stop: int, frames: int) -> float:
        layers = (stop - start) * shape.layer_macs(frames) + shape.head_macs(frames)
        return layers if start else layers + shape.front_macs(shape.most_inputs(frames))

    return cost
