"""How many multiply-accumulates (MACs) a run takes, from the shape of the tower alone.

Counted: matrix products, convolutions, attention and pooling, over all frames of one utterance.
Not counted, as usual: norms, activations, residual sums and other work per element. For the
published encoders this is the closed form of the project's reference on early-exit recognition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from offramp.config import EncoderConfig
from offramp.errors import InputError


@dataclass(frozen=True)
class EncoderMacs:
    """MACs of one utterance by part. heads: the tested one, and those that feedback reads."""

    subsampling: int
    layers: int
    branches: int
    pooling: int
    heads: int
    feedback: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def encoder_macs(config: EncoderConfig, num_frames: int, exit_layer: int) -> int:
    """MACs from `num_frames` feature frames to the log-probabilities of `exit_layer`."""
    return encoder_mac_parts(config, num_frames, exit_layer).total


def encoder_mac_parts(config: EncoderConfig, num_frames: int, exit_layer: int) -> EncoderMacs:
    """`encoder_macs` by part; only what runs before leaving at `exit_layer` is counted.

    InputError: no such exit, or too few frames for one frame of the tower.
    """
    if exit_layer not in config.exits:
        raise InputError(
            f"exit layer is {exit_layer}; allowed: {', '.join(map(str, config.exits))}"
        )
    T = config.output_frames(num_frames)
    if T == 0:
        raise InputError(
            f"{num_frames} feature frames are too few; the tower needs at least "
            f"{config.least_frames}"
        )
    D, V = config.d_model, config.vocab_size
    branches = sum(layer <= exit_layer for layer in config.branches)
    passed = sum(layer < exit_layer for layer in config.exits) if config.feedback else 0
    h = -(-T // config.branch_factor)
    pooled = h * config.branch_factor * D if config.branch_pool == "learned" else 0
    return EncoderMacs(
        subsampling=_subsampling(config, num_frames),
        layers=exit_layer * _layer(config, T),
        branches=branches * _layer(config, h),
        pooling=branches * pooled,
        heads=(1 + passed) * T * D * V,
        feedback=passed * T * V * D,
    )


def trail_macs(config: EncoderConfig, num_frames: int, tested: Sequence[int]) -> int:
    """MACs of an utterance of `num_frames` feature frames up to the last of the exits `tested`,
    with the head of each. Feedback reads the heads on the way anyway; they count once."""
    parts = encoder_mac_parts(config, num_frames, tested[-1])
    if config.feedback:
        return parts.total
    head = config.output_frames(num_frames) * config.d_model * config.vocab_size
    return parts.total + (len(tested) - 1) * head


def mac_cost(config: EncoderConfig) -> Callable[[int, int, int], float]:
    """(start, stop, frames of the tower) -> MACs from one tested exit to the next.

    How many feature frames there were the tower's frames do not quite tell; the most count.
    """

    def cost(start: int, stop: int, frames: int) -> float:
        num_frames = frames
        for _ in range(config.subsampling_layers):
            num_frames = 2 * num_frames + 2  # the most that give so many
        num_frames -= 2 * config.edge_frames
        if start == 0:
            return trail_macs(config, num_frames, (stop,))
        whole = trail_macs(config, num_frames, (start, stop))
        return whole - trail_macs(config, num_frames, (start,))

    return cost


def _subsampling(config: EncoderConfig, num_frames: int) -> int:
    total, channels = 0, config.num_mels
    num_frames += 2 * config.edge_frames
    for _ in range(config.subsampling_layers):
        num_frames = (num_frames - 1) // 2
        total += num_frames * channels * config.d_model * 3
        channels = config.d_model
    return total


def _layer(config: EncoderConfig, num_frames: int) -> int:
    """One Conformer layer: its weights once per frame, and every frame's view of every other."""
    D = config.d_model
    feed_forwards, attention = 4 * D * config.d_ff, 4 * D * D
    convolution = 3 * D * D + config.kernel_size * D
    return num_frames * (feed_forwards + attention + convolution) + 2 * num_frames**2 * D
