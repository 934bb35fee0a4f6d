"""From samples to what an encoder reads, and when each of its frames is heard.

Our encoders read log-mel features; a transformers model brings a reader of its own
(`models/hf_checkpoint.py`). Whoever transcribes, evaluates or trains holds one and asks no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from offramp.audio.features import FeatureConfig, encoder_input
from offramp.audio.io import SAMPLE_RATE
from offramp.config import EncoderConfig


class Reader(Protocol):
    """What an encoder reads. Holds no weights, so it pickles."""

    @property
    def frame_s(self) -> float:
        """Seconds from one frame of the tower to the next."""
        ...

    @property
    def first_frame_s(self) -> float:
        """Seconds from the start of the samples to what the first frame of the tower hears."""
        ...

    def num_inputs(self, num_samples: int) -> int:
        """How long so many samples are to the encoder; 0: too short for a frame of the tower."""
        ...

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each, at 16 kHz -> padded input [B, ...] and true lengths int64 [B]."""
        ...


@dataclass(frozen=True)
class LogMelReader:
    """Our encoders': normalised log-mel features."""

    config: EncoderConfig

    @property
    def features(self) -> FeatureConfig:
        return FeatureConfig(num_mels=self.config.num_mels)

    @property
    def frame_s(self) -> float:
        return self.config.subsampling * self.features.hop / SAMPLE_RATE

    @property
    def first_frame_s(self) -> float:
        """Frame t is centred on feature frame subsampling * t where the edges are padded; where
        they are not, the convolutions begin inside the features, and it is `subsampling` - 1 later.
        """
        lost = self.config.subsampling - 1 - self.config.edge_frames
        return lost * self.features.hop / SAMPLE_RATE

    def num_inputs(self, num_samples: int) -> int:
        frames = self.features.num_frames(num_samples)
        return frames if self.config.output_frames(frames) else 0

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return encoder_input(samples, self.features)
