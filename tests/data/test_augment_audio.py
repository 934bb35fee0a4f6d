"""Augmentations do what they are asked for, in numbers, and depend on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from offramp.data.augment_audio import (
    SAMPLE_RATE,
    AudioAugmentation,
    add_noise,
    babble_noise,
    change_speed,
    change_volume,
    impulse_response,
    limit_band,
    pink_noise,
    reverberate,
    white_noise,
)
from offramp.errors import ConfigError, InputError

ALWAYS = AudioAugmentation(
    p_speed=1, p_reverberation=1, p_noise=1, p_telephone=1, p_volume=1, p_clip=0
)
NEVER = AudioAugmentation(
    p_speed=0, p_reverberation=0, p_noise=0, p_telephone=0, p_volume=0, p_clip=0
)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def voice(count: int = 12_000, seed: int = 0, level: float = 0.1) -> Tensor:
    """Noise in bursts: no speech, but as uneven as speech is."""
    bursts = torch.sin(torch.arange(count) / 700).clamp(min=0)
    return level * bursts * torch.randn(count, generator=seeded(seed)).clamp(-3, 3)


def tone(hz: float, count: int = 16_000) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(count) / SAMPLE_RATE)


def db(signal: Tensor, other: Tensor) -> float:
    return 10 * math.log10(float(signal.square().sum() / other.square().sum()))


def loudest_hz(samples: Tensor) -> float:
    return float(torch.fft.rfft(samples).abs().argmax()) * SAMPLE_RATE / len(samples)


# -- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5, 40.0])
@pytest.mark.parametrize("kind", ["white", "pink", "babble", "short"])
def test_the_snr_is_as_asked(kind: str, snr_db: float) -> None:
    clean = voice(level=0.02)  # quiet enough not to be scaled, so the noise is the difference
    noise = {
        "white": white_noise(len(clean), seeded()),
        "pink": pink_noise(len(clean), seeded()),
        "babble": babble_noise(len(clean), [voice(5000, s) for s in (1, 2)], seeded()),
        "short": voice(777, 3),
    }[kind]
    noisy = add_noise(clean, noise, snr_db)
    assert noisy.shape == clean.shape
    assert db(clean, noisy - clean) == pytest.approx(snr_db, abs=0.1)


def test_scaling_into_range_keeps_the_snr() -> None:
    clean, noise = voice(level=0.33), white_noise(12_000, seeded(4))
    noisy = add_noise(clean, noise, 0.0)
    assert float(noisy.abs().max()) == pytest.approx(1.0)
    # noisy = a * clean + b * noise: solve for both
    basis = torch.stack([clean, noise], 1)
    a, b = torch.linalg.lstsq(basis, noisy[:, None]).solution.flatten()
    assert db(a * clean, b * noise) == pytest.approx(0.0, abs=0.1)


def test_pink_noise_has_equal_power_per_octave_and_white_has_not() -> None:
    def octave(noise: Tensor, low: int) -> float:
        power = torch.fft.rfft(noise).abs().square()
        width = SAMPLE_RATE / len(noise)
        return float(power[int(low / width) : int(2 * low / width)].sum())

    pink, white = pink_noise(1 << 16, seeded()), white_noise(1 << 16, seeded())
    for low in (200, 800, 3200):
        assert octave(pink, 2 * low if low < 3200 else low) == pytest.approx(
            octave(pink, low), rel=0.1
        )
        assert octave(white, low) / octave(white, low // 2) == pytest.approx(2.0, rel=0.1)


def test_babble_is_all_the_others_equally_loud() -> None:
    loud, quiet = voice(4000, 1, level=0.3), voice(4000, 2, level=0.003)
    babble = babble_noise(4000, [loud, quiet, torch.zeros(9)], seeded())
    spectra = [torch.fft.rfft(x) for x in (babble, loud, quiet)]
    # Circular correlation finds each at its shift, with the same weight.
    peaks = [
        float(torch.fft.irfft(spectra[0] * s.conj()).abs().max() / x.norm())
        for s, x in zip(spectra[1:], (loud, quiet), strict=True)
    ]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.15)


# -- rooms ---------------------------------------------------------------------------------------


def test_convolution_equals_its_definition() -> None:
    samples, response = voice(300), impulse_response(0.01, 0.0, seeded())
    direct = torch.from_numpy(np.convolve(samples.numpy(), response.numpy())[:300])
    direct *= samples.norm() / direct.norm()  # as loud as before
    torch.testing.assert_close(reverberate(samples, response), direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rt60_s", [0.2, 0.6])
def test_a_response_decays_by_60_db_in_its_time(rt60_s: float) -> None:
    response = impulse_response(rt60_s, 3.0, seeded())
    assert db(response[:1], response[1:]) == pytest.approx(3.0, abs=1e-3)
    # Schroeder's backward integral, between -5 and -25 dB of the tail.
    left = 10 * torch.log10(response[1:].square().flip(0).cumsum(0).flip(0))
    level = left - left[0]
    at = [int((level < limit).nonzero()[0]) for limit in (-5.0, -25.0)]
    assert 3 * (at[1] - at[0]) / SAMPLE_RATE == pytest.approx(rt60_s, rel=0.1)


def test_reverberation_keeps_time_length_and_loudness() -> None:
    click = torch.zeros(8000)
    click[1000] = 0.5
    wet = reverberate(click, impulse_response(0.3, 6.0, seeded()))
    assert wet.shape == click.shape and int(wet.abs().argmax()) == 1000
    assert float(wet[:1000].abs().max()) < 1e-5  # nothing before its cause
    assert db(wet, click) == pytest.approx(0.0, abs=1e-3)
    torch.testing.assert_close(reverberate(click, torch.ones(1)), click, rtol=0, atol=1e-6)


# -- speed, volume, band -------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.9, 0.973, 1.0, 1.1])
@pytest.mark.parametrize("count", [1, 160, 16_001])
def test_speed_changes_the_length(count: int, factor: float) -> None:
    assert len(change_speed(voice(count), factor)) == round(count / factor)


def test_speed_changes_the_pitch() -> None:
    for factor in (0.9, 1.1):
        assert loudest_hz(change_speed(tone(1000), factor)) == pytest.approx(
            1000 * factor, rel=0.01
        )


def test_volume() -> None:
    samples = voice()
    torch.testing.assert_close(change_volume(samples, -6.0), samples * 0.501187)
    louder = change_volume(samples, 60.0)
    assert float(louder.abs().max()) == pytest.approx(1.0)
    torch.testing.assert_close(louder * samples.abs().max(), samples)  # scaled, not clipped
    clipped = change_volume(samples, 60.0, clip=True)
    assert int((clipped.abs() == 1.0).sum()) > 100


def test_a_telephone_passes_its_band_alone() -> None:
    for hz, passes in ((100, False), (1000, True), (3000, True), (4000, False), (7000, False)):
        change = db(limit_band(tone(hz))[2000:-2000], tone(hz)[2000:-2000])
        assert change == pytest.approx(0.0, abs=0.05) if passes else change < -40
    everything = limit_band(voice(), 0.0, 8000.0)
    torch.testing.assert_close(everything, voice(), rtol=0, atol=1e-6)


# -- what holds for all --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_silence_stays_silent_and_finite(count: int) -> None:
    silence = torch.zeros(count)
    for index in range(20):
        out = ALWAYS.apply(silence, 0, index, [voice(300)])
        assert torch.isfinite(out).all() and not out.any()


def test_results_are_in_range_and_finite() -> None:
    clipping = AudioAugmentation(p_volume=1, gain_db=(20, 30), p_clip=1)
    for index in range(30):
        for augmentation in (ALWAYS, clipping):
            out = augmentation.apply(voice(2000, index, level=0.33), 1, index, [voice(300)])
            assert out.dtype == torch.float32 and out.ndim == 1
            assert torch.isfinite(out).all() and float(out.abs().max()) <= 1.0


def test_a_function_of_seed_and_index() -> None:
    samples, others = voice(), [voice(3000, 1), voice(2000, 2)]
    kept = samples.clone()
    outs = [ALWAYS.apply(samples, 7, index, others) for index in range(8)]
    for index in (5, 0, 7):  # in any order
        torch.testing.assert_close(
            ALWAYS.apply(samples, 7, index, others), outs[index], rtol=0, atol=0
        )
    torch.testing.assert_close(samples, kept, rtol=0, atol=0)  # never in place
    assert len({len(out) for out in outs}) > 4  # every item draws anew
    other_seed = ALWAYS.apply(samples, 8, 0, others)
    assert other_seed.shape != outs[0].shape or not torch.equal(other_seed, outs[0])


def test_probabilities_of_0_change_nothing() -> None:
    assert torch.equal(NEVER.apply(voice(), 0, 3), voice())


def test_each_kind_alone_comes_as_often_as_asked() -> None:
    samples = voice(400)
    for name in ("p_speed", "p_reverberation", "p_noise", "p_telephone", "p_volume"):
        rare = AudioAugmentation(**{**vars(NEVER), name: 0.25})
        changed = 0
        for index in range(200):
            out = rare.apply(samples, 0, index)
            changed += out.shape != samples.shape or not torch.equal(out, samples)
        assert 25 <= changed <= 75, name  # 50 expected; 4 standard deviations


def test_bad_settings_are_named() -> None:
    for settings in ({"p_noise": 1.5}, {"speed": (0.0, 1.0)}, {"snr_db": (9.0, 3.0)}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            AudioAugmentation(**settings)
    with pytest.raises(InputError, match="3400"):
        limit_band(voice(), 5000.0, 3400.0)
    with pytest.raises(InputError, match="at least one"):
        add_noise(voice(), torch.zeros(0), 3.0)
    with pytest.raises(ConfigError, match="factor"):
        change_speed(voice(), 0.0)
