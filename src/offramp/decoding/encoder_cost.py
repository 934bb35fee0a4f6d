"""What an encoder costs from one tested exit to the next: counted, or measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.config import EncoderConfig
from offramp.decoding.early_exit_ctc import early_exit, stopwatch
from offramp.decoding.exit_policies import FixedExit, SegmentCost
from offramp.energy.cost import mac_cost, trail_macs
from offramp.energy.hf_cost import shape_mac_cost, shape_trail_macs
from offramp.models.hf_ctc import PretrainedConfig

_PROBE_S = (1, 8)  # what a run costs is measured on these


def tower_macs(
    config: EncoderConfig | PretrainedConfig, num_inputs: int, tested: Sequence[int]
) -> int:
    """MACs of an utterance of `num_inputs` up to the last of the exits `tested`."""
    if isinstance(config, PretrainedConfig):
        return shape_trail_macs(config.shape, num_inputs, tested)
    return trail_macs(config, num_inputs, tested)


def tower_cost(config: EncoderConfig | PretrainedConfig) -> SegmentCost:
    """(start, stop, frames of the tower) -> MACs from one tested exit to the next."""
    return (
        shape_mac_cost(config.shape) if isinstance(config, PretrainedConfig) else mac_cost(config)
    )


def measured_cost(encoder: Any) -> SegmentCost:
    """Milliseconds from one tested exit to the next, alone in its batch, as this machine is now.

    Two utterances of noise are timed through the whole tower; between and beyond them time is
    taken to rise evenly with the MACs, from a part that every layer costs however short its input.
    """
    config: EncoderConfig | PretrainedConfig = encoder.config
    macs = tower_cost(config)
    probes = [_probe(encoder, seconds) for seconds in _PROBE_S]
    times = [_milliseconds(encoder, probe) for probe in probes]
    sizes = [macs(0, config.num_layers, config.output_frames(p.shape[1])) for p in probes]
    rate = max(0.0, (times[1] - times[0]) / (sizes[1] - sizes[0]))
    each_layer = max(0.0, times[0] - rate * sizes[0]) / config.num_layers
    return lambda start, stop, n: each_layer * (stop - start) + rate * macs(start, stop, n)


def _probe(encoder: Any, seconds: int) -> Tensor:
    """An utterance of noise, [1, N] or [1, T, F]."""
    config, generator = encoder.config, torch.Generator().manual_seed(0)
    size = config.input_size if isinstance(config, PretrainedConfig) else config.num_mels
    shape = (SAMPLE_RATE * seconds,) if size is None else (100 * seconds, size)
    return torch.randn(1, *shape, generator=generator).to(encoder.device)


def _milliseconds(encoder: Any, features: Tensor) -> float:
    """The median of three runs to the last exit, after one to warm up."""
    lengths, taken = torch.tensor([features.shape[1]]), []
    for _ in range(4):
        elapsed = stopwatch()
        early_exit(encoder, encoder.config.exits, features, lengths.to(encoder.device), FixedExit())
        taken.append(elapsed())
    return statistics.median(taken[1:])
