"""Log-mel features equal Kaldi's and the slow definition; chunks equal the whole, batches singles.

Tolerances are on natural logarithms. Kaldi too works in float32, so a filter that holds almost
nothing beside a loud tone differs: both are then equally far (0.008) from what float64 gives.
"""

from __future__ import annotations

import cmath
import math
import random

import kaldi_native_fbank
import numpy as np
import pytest
import torch

from offramp.audio.features import (
    FeatureConfig,
    StreamingLogMel,
    log_mel,
    log_mel_batch,
    normalize,
)
from offramp.audio.io import read_audio
from offramp.data.corpora import data_root
from offramp.errors import ConfigError

SPEECH = data_root() / "librispeech_test_other_100" / "flac" / "1688-142285-0000.flac"


def noise(count: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def chirp(count: int = 16_000) -> torch.Tensor:
    """From 100 Hz to 7 kHz: every filter has its turn."""
    t = torch.arange(count) / 16_000
    return 0.5 * torch.sin(2 * math.pi * (100 * t + 6_900 / 2 * t * t * 16_000 / count))


def kaldi(samples: torch.Tensor, num_mels: int = 80, scale: float = 1.0) -> torch.Tensor:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = num_mels
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16_000, (scale * samples).tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]))


def assert_like_kaldis(samples: torch.Tensor, num_mels: int) -> None:
    """To 5e-4 where a filter is within 70 dB of its frame's loudest, to 0.02 everywhere."""
    ours, theirs = log_mel(samples, FeatureConfig(num_mels=num_mels)), kaldi(samples, num_mels)
    away = (ours - theirs).abs()
    near = theirs > theirs.amax(dim=1, keepdim=True) - math.log(1e7)
    assert away[near].max() < 5e-4
    assert away.max() < 0.02
    assert away.mean() < 3e-4


def slow(samples: list[float], config: FeatureConfig) -> list[list[float]]:
    """The definition, a frame and a bin at a time, in float64."""

    def mel(hz: float) -> float:
        return 1127 * math.log(1 + hz / 700)

    high_hz = config.high_hz or config.sample_rate / 2
    step = (mel(high_hz) - mel(config.low_hz)) / (config.num_mels + 1)
    rows = []
    for start in range(0, len(samples) - config.window + 1, config.hop):
        frame = samples[start : start + config.window]
        mean = sum(frame) / len(frame)
        frame = [x - mean for x in frame]
        frame = [x - config.preemphasis * (frame[i - 1] if i else x) for i, x in enumerate(frame)]
        for i in range(len(frame)):
            hann = 0.5 - 0.5 * math.cos(2 * math.pi * i / (len(frame) - 1))
            frame[i] *= hann**0.85
        power = []
        for k in range(config.num_fft // 2):  # the bin at half the rate is left out
            turn = -2j * math.pi * k / config.num_fft
            power.append(abs(sum(x * cmath.exp(turn * i) for i, x in enumerate(frame))) ** 2)
        row = []
        for m in range(config.num_mels):
            centre, energy = mel(config.low_hz) + (m + 1) * step, 0.0
            for k, p in enumerate(power):
                away = abs(mel(k * config.sample_rate / config.num_fft) - centre) / step
                energy += p * max(0.0, 1 - away)
            row.append(math.log(max(energy, 2.0**-23)))
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    "config",
    [
        FeatureConfig(num_mels=12),
        FeatureConfig(sample_rate=8_000, num_mels=20, num_fft=256, low_hz=100, high_hz=3_800),
        FeatureConfig(num_mels=10, window_ms=20, hop_ms=12.5, num_fft=321, preemphasis=0),
    ],
)
def test_features_equal_their_slow_definition(config: FeatureConfig) -> None:
    samples = noise(700) + 0.3 + 0.2 * torch.sin(torch.arange(700) * 0.2)
    expected = torch.tensor(slow(samples.tolist(), config))
    torch.testing.assert_close(log_mel(samples, config), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_mels", [40, 80])
@pytest.mark.parametrize("kind", ["noise", "quiet", "chirp", "silence"])
def test_features_equal_kaldis(kind: str, num_mels: int) -> None:
    samples = {
        "noise": noise(20_000),
        "quiet": noise(20_000, level=1e-3),
        "chirp": chirp(),
        "silence": torch.zeros(8_000),
    }[kind]
    assert_like_kaldis(samples, num_mels)


@pytest.mark.skipif(not SPEECH.is_file(), reason=f"no recording at {SPEECH}: set OFFRAMP_DATA")
def test_features_of_real_speech_equal_kaldis() -> None:
    assert_like_kaldis(read_audio(SPEECH)[: 16_000 * 6], 80)


def test_kaldis_scale_of_samples_only_adds_a_constant_above_the_floor() -> None:
    samples = noise(8_000)
    shift = kaldi(samples, 40, scale=32768) - log_mel(samples, FeatureConfig(num_mels=40))
    assert (shift - 2 * math.log(32768)).abs().max() < 1e-3


@pytest.mark.parametrize("hop_ms", [10.0, 25.0, 40.0])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_give_what_the_whole_gives_however_they_are_cut(hop_ms: float, seed: int) -> None:
    config, samples, draw = FeatureConfig(hop_ms=hop_ms), noise(4_777), random.Random(seed)
    stream, found, at, ready = StreamingLogMel(config), [], 0, 0
    while at < len(samples):
        chunk = samples[at : at + draw.randint(0, [9, 100, 700, 4_000][seed])]
        at += len(chunk)
        found.append(stream.push(chunk))
        ready += len(found[-1])
        assert ready == config.num_frames(at), "no frame waits longer than it must"
    torch.testing.assert_close(torch.cat(found), log_mel(samples, config), atol=1e-5, rtol=0)


def test_a_long_recording_is_worked_off_in_parts_that_do_not_show() -> None:
    samples = noise(16_000 * 31)
    found = log_mel(samples)
    assert len(found) == FeatureConfig().num_frames(len(samples)) > 3_000
    for start in (0, 2_990, 2_999, 3_000, 3_050):
        alone = log_mel(samples[start * 160 : start * 160 + 400 + 160 * 9])
        torch.testing.assert_close(found[start : start + 10], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)]
)
def test_frames_lie_wholly_inside_the_recording(samples: int, frames: int) -> None:
    assert log_mel(noise(samples)).shape == (frames, 80)
    assert FeatureConfig().num_frames(samples) == frames


def test_a_batch_gives_what_single_utterances_give() -> None:
    utterances = [noise(count, seed=count) for count in (16_000, 400, 100, 12_345)]
    features, lengths = log_mel_batch(utterances)
    assert features.shape == (4, 98, 80)
    assert lengths.tolist() == [98, 1, 0, 75]
    assert lengths.dtype == torch.int64
    normal = normalize(features, lengths)
    for row, utterance in enumerate(utterances):
        single = log_mel(utterance)[None]
        length = int(lengths[row])
        assert torch.equal(features[row, :length], single[0])
        assert not features[row, length:].any()
        alone = normalize(single, torch.tensor([length]))
        torch.testing.assert_close(normal[row, :length], alone[0], atol=1e-5, rtol=0)


def test_normalized_features_have_mean_0_and_variance_1_in_true_frames() -> None:
    features = 5 + 3 * torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([50, 20, 7])
    for row, length in enumerate(lengths.tolist()):
        features[row, length:] = float("nan")  # whatever lies in the padding stays there
    normal = normalize(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        part = normal[row, :length].double()
        assert part.mean(dim=0).abs().max() < 1e-5
        assert (part.var(dim=0, correction=0) - 1).abs().max() < 1e-4
        assert not normal[row, length:].any()


def test_loudness_does_not_show_after_normalizing() -> None:
    samples = chirp() + noise(16_000, level=0.05)
    lengths = torch.tensor([98])
    loud, quiet = (normalize(log_mel(g * samples)[None], lengths) for g in (1.0, 0.1))
    assert (loud - quiet).abs().mean() < 0.02


def test_silence_is_finite_and_becomes_zero() -> None:
    features, lengths = log_mel_batch([torch.zeros(16_000), noise(16_000)])
    assert features.isfinite().all()
    assert normalize(features, lengths)[0].abs().max() < 0.01


def test_features_may_be_used_in_training_after_inference_mode() -> None:
    config = FeatureConfig(num_mels=13)
    with torch.inference_mode():
        log_mel(noise(800), config)
    samples = noise(800).requires_grad_()
    log_mel(samples, config).sum().backward()
    assert samples.grad is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_mels": 0}, "num_mels is 0"),
        ({"num_fft": 256}, "transform num_fft 256"),
        ({"high_hz": 9_000.0}, "high_hz is 9000.0; it must be above low_hz, 20.0, and at most"),
        ({"high_hz": 20.0}, "high_hz is 20.0"),
        ({"low_hz": 8_000.0}, "low_hz is 8000.0"),
        ({"hop_ms": 0.01}, "the hop 0"),
        ({"preemphasis": 1.0}, "preemphasis is 1.0"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    settings: dict[str, float], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        FeatureConfig(**settings)  # type: ignore[arg-type]
