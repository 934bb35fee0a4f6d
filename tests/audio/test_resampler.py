"""Any rate becomes 16 kHz in a stream: cuts do not matter, and it can go on elsewhere."""

from __future__ import annotations

import io

import pytest
import soundfile
import torch

from offramp.audio.io import read_audio
from offramp.audio.resampler import Resampler
from offramp.errors import ConfigError, InputError

RATES = [8_000, 11_025, 16_000, 22_050, 44_100, 48_000]


def noise(rate: int, seconds: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rate)
    return 0.1 * torch.randn(round(rate * seconds), generator=generator)


def pushed(resampler: Resampler, samples: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [resampler.push(piece) for piece in samples.split(size)]


def whole(samples: torch.Tensor, rate: int) -> torch.Tensor:
    resampler = Resampler(rate)
    return torch.cat((resampler.push(samples), resampler.finish()))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("size", [37, 1000, 16_000])
def test_cuts_do_not_matter(rate: int, size: int) -> None:
    samples, resampler = noise(rate), Resampler(rate)
    streamed = torch.cat([*pushed(resampler, samples, size), resampler.finish()])
    assert torch.equal(streamed, whole(samples, rate))


@pytest.mark.parametrize("rate", RATES)
def test_it_is_what_a_file_of_that_rate_gives(rate: int) -> None:
    samples, file = noise(rate), io.BytesIO()
    soundfile.write(file, samples.numpy(), rate, format="WAV", subtype="FLOAT")
    file.seek(0)
    assert torch.equal(whole(samples, rate), read_audio(file))


@pytest.mark.parametrize("rate", RATES)
def test_what_waits_is_little(rate: int) -> None:
    samples, resampler, heard, made = noise(rate), Resampler(rate), 0, 0
    for piece in samples.split(rate // 100):
        heard, made = heard + len(piece), made + len(resampler.push(piece))
        assert heard / rate - made / 16_000 < (0.13 if rate < 16_000 else 0.05)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("saved_s", [0.01, 0.3, 1.234])
def test_it_goes_on_elsewhere(rate: int, saved_s: float) -> None:
    """Twice, since a stream that was restored is saved like any other."""
    samples = noise(rate, 3.0)
    cut, piece = round(saved_s * rate), round(0.02 * rate)
    found, resampler = [], Resampler(rate)
    for part in samples.split([cut, cut, len(samples) - 2 * cut]):
        other = Resampler(rate)
        other.restore(resampler.tensors())
        resampler = other
        found += pushed(resampler, part, piece)
    made = torch.cat([*found, resampler.finish()])
    torch.testing.assert_close(made, whole(samples, rate), rtol=0, atol=1e-6)


def test_what_is_kept_is_bounded() -> None:
    resampler = Resampler(44_100)
    for _ in range(20):
        resampler.push(noise(44_100, 0.5))
        assert resampler.tensors()["heard"].numel() <= 44_100


def test_the_saved_stream_is_left_alone() -> None:
    resampler, samples = Resampler(8_000), noise(8_000)
    resampler.push(samples[:4000])
    saved = resampler.tensors()
    rest = torch.cat((resampler.push(samples[4000:]), resampler.finish()))
    other = Resampler(8_000)
    other.restore(saved)
    again = torch.cat((other.push(samples[4000:]), other.finish()))
    torch.testing.assert_close(again, rest, rtol=0, atol=1e-6)


def test_what_no_stream_has_is_refused() -> None:
    for rate in (1, 3_999, 384_001):
        with pytest.raises(InputError, match=f"sample_rate is {rate}; it must lie between 4000"):
            Resampler(rate)
    with pytest.raises(ConfigError, match=r"sample_rate is 16000\.0; it must be a whole number"):
        Resampler(16_000.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has 8000 Hz, this one 16000 Hz"):
        Resampler(16_000).restore(Resampler(8_000).tensors())
