"""Log-mel filterbank features in Kaldi's definition, whole and streaming, and their normalising.

Frames that lie wholly inside the recording; mean removed, pre-emphasis, Povey window, power
spectrum, triangles that are linear in mel, natural logarithm. Samples stay on a scale of 1, not
Kaldi's 32768 (that only adds a constant, 20.8), so the floor of the logarithm lies near the
rounding of 16-bit audio and digital silence is no outlier. No dither: results repeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from offramp.config import check_counts, check_positive, check_range
from offramp.errors import ConfigError

_FLOOR = torch.finfo(torch.float32).eps  # Kaldi's floor below the logarithm
_FRAMES_AT_ONCE = 3_000  # 30 s: bounds memory on hours of audio, large enough to be fast
_VARIANCE_FLOOR = 1e-5  # features that never vary become 0, not noise


@dataclass(frozen=True)
class FeatureConfig:
    """sample_rate, low_hz, high_hz in Hz; high_hz None: half the rate. num_fft: at least a window.

    The defaults are those of Kaldi's fbank with 80 filters.
    """

    sample_rate: int = 16_000
    num_mels: int = 80
    window_ms: float = 25.0
    hop_ms: float = 10.0
    num_fft: int = 512
    low_hz: float = 20.0
    high_hz: float | None = None
    preemphasis: float = 0.97

    def __post_init__(self) -> None:
        check_counts(1, sample_rate=self.sample_rate, num_mels=self.num_mels, num_fft=self.num_fft)
        check_positive(window_ms=self.window_ms, hop_ms=self.hop_ms)
        check_range(0.0, 1.0, preemphasis=self.preemphasis)
        nyquist = self.sample_rate / 2
        check_range(0.0, nyquist, low_hz=self.low_hz)
        if self.high_hz is not None:
            check_positive(high_hz=self.high_hz)
            if not self.low_hz < self.high_hz <= nyquist:
                raise ConfigError(
                    f"high_hz is {self.high_hz}; it must be above low_hz, {self.low_hz}, and at "
                    f"most half of sample_rate, {nyquist:g}"
                )
        if self.window < 2 or self.hop < 1 or self.num_fft < self.window:
            raise ConfigError(
                f"the window has {self.window} samples, the hop {self.hop} and the transform "
                f"num_fft {self.num_fft}; they must be at least 2, 1 and the window"
            )

    @property
    def window(self) -> int:
        """Samples in a frame."""
        return int(self.sample_rate * self.window_ms / 1000)

    @property
    def hop(self) -> int:
        """Samples from a frame to the next."""
        return int(self.sample_rate * self.hop_ms / 1000)

    def num_frames(self, num_samples: int) -> int:
        """Frames that lie wholly inside so many samples."""
        return max(0, 1 + (num_samples - self.window) // self.hop)


def log_mel(samples: Tensor, config: FeatureConfig | None = None) -> Tensor:
    """samples [N] -> float32 [T, num_mels], T = `config.num_frames(N)`; 0 frames if N is short."""
    config = config or FeatureConfig()
    samples = samples.float()
    if config.num_frames(len(samples)) == 0:
        return samples.new_zeros(0, config.num_mels)
    frames = samples.unfold(0, config.window, config.hop)  # a view [T, window]
    return torch.cat([_log_mel(part, config) for part in torch.split(frames, _FRAMES_AT_ONCE)])


def log_mel_batch(
    utterances: Sequence[Tensor], config: FeatureConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Samples [N_b] each -> features [B, T, num_mels], zero beyond lengths [B] (true frames)."""
    features = [log_mel(samples, config) for samples in utterances]
    lengths = torch.tensor([len(f) for f in features], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths


class StreamingLogMel:
    """The features of `log_mel`, given out as samples come in, however they are cut."""

    def __init__(self, config: FeatureConfig | None = None) -> None:
        self.config = config or FeatureConfig()
        self._rest = torch.zeros(0)  # samples that later frames need
        self._skip = 0  # samples to drop before the next frame: where the hop exceeds the window

    def push(self, samples: Tensor) -> Tensor:
        """samples [n] -> the frames they complete, [t, num_mels]; t may be 0.

        What is left at the end of a recording completes no frame, so there is nothing to flush.
        """
        samples = torch.cat([self._rest.to(samples.device), samples.float()])
        dropped = min(self._skip, len(samples))
        samples, self._skip = samples[dropped:], self._skip - dropped
        features = log_mel(samples, self.config)
        used = len(features) * self.config.hop
        self._skip += max(0, used - len(samples))
        self._rest = samples[used:].clone()
        return features


def normalize(features: Tensor, lengths: Tensor) -> Tensor:
    """Each utterance to mean 0 and variance 1 per filter, over its true frames only.

    features [B, T, F], lengths [B] -> [B, T, F], zero beyond the lengths whatever was there.
    """
    inside = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    inside = inside[..., None]
    count = lengths.clamp(min=1)[:, None, None]
    mean = features.masked_fill(~inside, 0).sum(dim=1, keepdim=True) / count
    centred = (features - mean).masked_fill(~inside, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + _VARIANCE_FLOOR).sqrt()


def encoder_input(
    utterances: Sequence[Tensor], config: FeatureConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Samples [N_b] each -> normalised features [B, T, num_mels] and lengths [B] (true frames).

    What our recognisers read, in training as in use.
    """
    features, lengths = log_mel_batch(utterances, config)
    return normalize(features, lengths), lengths


def _log_mel(frames: Tensor, config: FeatureConfig) -> Tensor:
    """frames [T, window] -> [T, num_mels]."""
    window, filters = _constants(config, frames.device)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)  # the first sample is its own past
    spectrum = torch.fft.rfft((frames - config.preemphasis * before) * window, config.num_fft)
    power = spectrum.real.square() + spectrum.imag.square()
    energy: Tensor = power @ filters
    return energy.clamp(min=_FLOOR).log()


@lru_cache(maxsize=8)
def _constants(config: FeatureConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The Povey window [window] and the filters [num_fft // 2 + 1, num_mels]."""
    with torch.inference_mode(False):  # else a later training run could not use what is cached
        steps = torch.arange(config.window, dtype=torch.float64)
        hann = 0.5 - 0.5 * torch.cos(2 * math.pi * steps / (config.window - 1))
        return hann.pow(0.85).float().to(device), _filters(config).to(device)


def _filters(config: FeatureConfig) -> Tensor:
    """Triangles whose corners are spaced evenly in mel, on the bins of the transform."""
    hz = torch.arange(config.num_fft // 2 + 1, dtype=torch.float64)
    bins = _mel(hz * config.sample_rate / config.num_fft)
    high_hz = config.sample_rate / 2 if config.high_hz is None else config.high_hz
    low, high = _mel(torch.tensor([config.low_hz, high_hz], dtype=torch.float64)).tolist()
    corners = torch.linspace(low, high, config.num_mels + 2, dtype=torch.float64)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    if config.num_fft % 2 == 0:
        filters[-1] = 0  # Kaldi leaves the bin at half the rate out
    return filters.float()


def _mel(hz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hz / 700.0)
