"""SpecAugment (arXiv 1904.08779): bands of channels and spans of time are hidden in training.

Without time warping, which gains little; time masks are a share of the utterance
(arXiv 1912.05533, section 3.2), so that short ones are not wiped out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.config import check_counts, check_range


@dataclass(frozen=True)
class SpecAugment:
    """Masks over features that are normalised to mean 0, which is what hidden places become.

    freq_masks: bands per utterance, each of 0 to `max_channels` channels. time_masks: spans per
    utterance, each of 0 to `max_time` of its frames.
    """

    freq_masks: int = 2
    max_channels: int = 27
    time_masks: int = 10
    max_time: float = 0.05

    def __post_init__(self) -> None:
        names = ("freq_masks", "max_channels", "time_masks")
        check_counts(0, **{name: getattr(self, name) for name in names})
        check_range(0, 1, max_time=self.max_time)

    def __call__(self, features: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """A masked copy of `features` [B, T, F]; `generator` lives on the CPU."""
        B, T, F = features.shape
        channels = torch.full((B,), float(F))
        width = torch.full((B,), float(min(self.max_channels, F)))
        hidden = _spans(channels, width, self.freq_masks, F, generator)[:, None, :]
        frames = lengths.to("cpu", torch.float32)
        in_time = _spans(frames, frames * self.max_time, self.time_masks, T, generator)
        hidden = hidden | in_time[:, :, None]
        return features.masked_fill(hidden.to(features.device), 0.0)


def _spans(
    extent: Tensor, longest: Tensor, count: int, size: int, generator: torch.Generator
) -> Tensor:
    """bool [B, size]: `count` spans per row, of 0 to `longest` [B] places, within `extent` [B]."""
    draws = torch.rand(2, len(extent), count, generator=generator)
    width = (draws[0] * (longest[:, None].floor() + 1)).floor()
    start = (draws[1] * (extent[:, None] - width + 1)).floor()
    at = torch.arange(size)
    inside = (at >= start[:, :, None]) & (at < (start + width)[:, :, None])
    return inside.any(dim=1)
