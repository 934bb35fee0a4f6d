"""Augmentation of recordings: noise, reverberation, speed, volume, narrow band.

Each is a small function of (samples, generator); samples are float32 [N], mono, 16 kHz, in
[-1, 1], and so is every result: what would exceed that is scaled down, not clipped, unless
clipping is asked for. `AudioAugmentation` applies a random selection, drawn from (seed, index).

Speed perturbation and reverberation follow the habits of Kaldi (Ko et al., Interspeech 2015 and
ICASSP 2017); impulse responses are not simulated rooms but decaying noise (Polack's model),
which takes a hundredth of the time of the image-source method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr  # type: ignore[import-untyped]
import torch
from torch import Generator, Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.config import check_counts, check_positive, check_share
from offramp.errors import ConfigError, InputError

# -- one at a time ---------------------------------------------------------------------------


def add_noise(samples: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """samples + noise, so that 10 log10(power of samples / power of noise) is `snr_db`.

    noise [M] is repeated or cut to the length of samples; power is the mean square over the
    whole recording. A silent recording stays silent, a silent noise adds nothing.
    """
    if len(noise) == 0:
        raise InputError("the noise has no samples; give at least one")
    noise = noise.repeat(math.ceil(len(samples) / len(noise)))[: len(samples)]
    signal_power, noise_power = _power(samples), _power(noise)
    if signal_power == 0.0 or noise_power == 0.0:
        return samples.clone()
    gain = math.sqrt(signal_power / (noise_power * 10 ** (snr_db / 10)))
    return _within_range(samples + gain * noise)


def white_noise(count: int, generator: Generator) -> Tensor:
    """[count], the same power at every frequency; standard deviation 0.1."""
    noise: Tensor = 0.1 * torch.randn(count, generator=generator)
    return noise


def pink_noise(count: int, generator: Generator) -> Tensor:
    """[count], power falling with 1 / frequency, as much of the noise of rooms and streets does."""
    spectrum = torch.fft.rfft(torch.randn(count, generator=generator))
    scale = torch.arange(len(spectrum)).float().clamp(min=1).rsqrt()
    scale[0] = 0.0
    noise: Tensor = torch.fft.irfft(spectrum * scale, n=count)
    return 0.1 * noise / noise.std(correction=0).clamp(min=1e-12)


def babble_noise(count: int, others: Sequence[Tensor], generator: Generator) -> Tensor:
    """[count], the recordings `others` at once, equally loud, each from a random place on."""
    total = torch.zeros(count)
    for other in others:
        power = _power(other)
        if power == 0.0:
            continue
        start = int(torch.randint(len(other), (), generator=generator))
        looped = other.roll(-start).repeat(math.ceil(count / len(other)))[:count]
        total += looped / math.sqrt(power)
    return 0.1 * total


def impulse_response(rt60_s: float, direct_db: float, generator: Generator) -> Tensor:
    """A room's response [M]: the direct sound, and noise that decays by 60 dB in `rt60_s`.

    direct_db: energy of the direct sound over the energy of all that follows (the nearer the
    microphone, the more).
    """
    check_positive(rt60_s=rt60_s)
    count = max(2, round(rt60_s * SAMPLE_RATE))
    decay = torch.exp(-math.log(1000.0) * torch.arange(count) / (rt60_s * SAMPLE_RATE))
    tail = decay * torch.randn(count, generator=generator)
    tail[0] = 0.0
    tail *= math.sqrt(10 ** (-direct_db / 10) / float(tail.square().sum()))
    tail[0] = 1.0
    return tail


def reverberate(samples: Tensor, response: Tensor) -> Tensor:
    """samples convolved with `response` [M] by FFT: as long, in time, and as loud as before."""
    if len(samples) == 0:
        return samples.clone()
    size = len(samples) + len(response) - 1
    spectrum = torch.fft.rfft(samples, n=size) * torch.fft.rfft(response, n=size)
    wet = torch.fft.irfft(spectrum, n=size)[: len(samples)]
    power = _power(wet)
    return _within_range(wet * math.sqrt(_power(samples) / power)) if power else wet


def change_speed(samples: Tensor, factor: float) -> Tensor:
    """Played `factor` times as fast, pitch included: round(N / factor) samples."""
    check_positive(factor=factor)
    count = round(len(samples) / factor)
    wave = soxr.resample(samples.numpy(), SAMPLE_RATE * factor, SAMPLE_RATE)[:count]
    return _within_range(torch.from_numpy(np.pad(wave, (0, count - len(wave)))))


def change_volume(samples: Tensor, gain_db: float, clip: bool = False) -> Tensor:
    """Louder by `gain_db`; clip: cut off beyond [-1, 1], as an overdriven microphone does."""
    louder = samples * 10 ** (gain_db / 20)
    return louder.clamp(-1.0, 1.0) if clip else _within_range(louder)


def limit_band(samples: Tensor, low_hz: float = 300.0, high_hz: float = 3400.0) -> Tensor:
    """Only what lies between `low_hz` and `high_hz`; the defaults are a telephone's (8 kHz)."""
    if not 0 <= low_hz < high_hz <= SAMPLE_RATE / 2:
        raise InputError(
            f"the band is {low_hz} to {high_hz} Hz; it must rise and lie within "
            f"0 to {SAMPLE_RATE // 2} Hz"
        )
    count = len(samples)
    padded = count + SAMPLE_RATE // 10  # so that the end does not ring into the beginning
    hz = torch.fft.rfftfreq(padded, 1 / SAMPLE_RATE)
    # Cosine edges 100 Hz wide, inside the band: a sharp one would ring for long.
    rise = ((hz - low_hz) / 100).clamp(0, 1) if low_hz > 0 else torch.ones_like(hz)
    fall = ((high_hz - hz) / 100).clamp(0, 1) if high_hz < SAMPLE_RATE / 2 else torch.ones_like(hz)
    gain = (0.5 - 0.5 * torch.cos(math.pi * rise)) * (0.5 - 0.5 * torch.cos(math.pi * fall))
    return _within_range(
        torch.fft.irfft(torch.fft.rfft(samples, n=padded) * gain, n=padded)[:count]
    )


def _power(samples: Tensor) -> float:
    return float(samples.double().square().mean()) if len(samples) else 0.0


def _within_range(samples: Tensor) -> Tensor:
    """Scaled down to a peak of 1 if the peak is higher."""
    peak = float(samples.abs().max()) if len(samples) else 0.0
    return samples / peak if peak > 1.0 else samples


# -- a random selection ----------------------------------------------------------------------


@dataclass(frozen=True)
class AudioAugmentation:
    """How likely each kind is, and the range its strength is drawn from, evenly.

    Applied in the order in which they happen to a voice: speed, room, noise, telephone, volume.
    p_clip: of volume changes that clip. direct_db: see `impulse_response`. Babble is chosen only
    where other recordings are given.
    """

    p_speed: float = 0.7
    speed: tuple[float, float] = (0.9, 1.1)
    p_reverberation: float = 0.3
    rt60_s: tuple[float, float] = (0.1, 0.7)
    direct_db: tuple[float, float] = (-3.0, 12.0)
    p_noise: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    p_telephone: float = 0.1
    p_volume: float = 0.7
    gain_db: tuple[float, float] = (-15.0, 6.0)
    p_clip: float = 0.0

    def __post_init__(self) -> None:
        shares = ("p_speed", "p_reverberation", "p_noise", "p_telephone", "p_volume", "p_clip")
        check_share(**{name: getattr(self, name) for name in shares})
        for name in ("speed", "rt60_s", "direct_db", "snr_db", "gain_db"):
            value = getattr(self, name)
            if len(value) != 2 or not -math.inf < value[0] <= value[1] < math.inf:
                raise ConfigError(f"{name} is {value}; it must be two numbers that rise")
        check_positive(speed=self.speed[0], rt60_s=self.rt60_s[0])

    def apply(
        self, samples: Tensor, seed: int, index: int, others: Sequence[Tensor] = ()
    ) -> Tensor:
        """samples [N] -> [M], a function of the arguments; M differs where the speed does.

        others: recordings to make babble of, at most three of them.
        """
        check_counts(0, seed=seed, index=index)
        state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
        generator = Generator().manual_seed(int(state[0] >> 1))

        def chosen(probability: float) -> bool:
            return float(torch.rand((), generator=generator)) < probability

        def drawn(bounds: tuple[float, float]) -> float:
            low, high = bounds
            return low + (high - low) * float(torch.rand((), generator=generator))

        if chosen(self.p_speed):
            samples = change_speed(samples, drawn(self.speed))
        if chosen(self.p_reverberation):
            response = impulse_response(drawn(self.rt60_s), drawn(self.direct_db), generator)
            samples = reverberate(samples, response)
        if chosen(self.p_noise) and len(samples):
            samples = add_noise(samples, _noise(samples, others, generator), drawn(self.snr_db))
        if chosen(self.p_telephone):
            samples = limit_band(samples)
        if chosen(self.p_volume):
            samples = change_volume(samples, drawn(self.gain_db), chosen(self.p_clip))
        return samples


def _noise(samples: Tensor, others: Sequence[Tensor], generator: Generator) -> Tensor:
    """As many samples of one of the kinds of noise."""
    kind = int(torch.randint(3 if others else 2, (), generator=generator))
    if kind == 0:
        return white_noise(len(samples), generator)
    if kind == 1:
        return pink_noise(len(samples), generator)
    return babble_noise(len(samples), others[:3], generator)
