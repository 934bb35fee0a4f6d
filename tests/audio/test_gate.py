"""The gate opens for what stands out, stays open a while, and knows no future."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offramp.audio.features import FeatureConfig, log_mel
from offramp.audio.gate import GateOptions, SpeechGate
from offramp.errors import ConfigError

FEATURES = FeatureConfig(num_mels=8)
BLOCK = 4  # 40 ms
OPTIONS = GateOptions(floor_s=1.0, hold_s=0.4, before_s=0.12)


def noise(seconds: float, db: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (db / 20) * torch.randn(round(16_000 * seconds), generator=generator)


def opened(samples: Tensor, options: GateOptions = OPTIONS) -> list[int]:
    """How many blocks pass with each block of `samples`."""
    gate = SpeechGate(options, FEATURES, BLOCK)
    passed = [gate.push(b) for b in torch.split(log_mel(samples, FEATURES), BLOCK)]
    return [0 if p is None else math.ceil(len(p) / BLOCK) for p in passed]


def test_silence_never_opens_it() -> None:
    assert not any(opened(torch.zeros(16_000)))
    assert not any(opened(noise(1.0, -95)))
    assert not any(opened(torch.full((16_000,), 0.3)))  # an offset is no sound


def test_speech_passes_with_what_came_before_and_a_while_longer() -> None:
    samples = torch.cat((torch.zeros(16_000), noise(0.2, -20), torch.zeros(16_000)))
    found = opened(samples)
    first, last = 24, 29  # blocks that hear the noise; a window is 15 ms longer than its hop
    assert found[:first] == [0] * first
    assert found[first] == 1 + 3  # 0.12 s before
    assert found[first + 1 : last + 10] == [1] * (last + 9 - first)  # 0.4 s after
    assert not any(found[last + 10 :])


def test_what_passes_is_the_input() -> None:
    samples = torch.cat((torch.zeros(16_000), noise(0.2, -20), torch.zeros(16_000)))
    features = log_mel(samples, FEATURES)
    gate = SpeechGate(OPTIONS, FEATURES, BLOCK)
    passed = [p for b in torch.split(features, BLOCK) if (p := gate.push(b)) is not None]
    start = 4 * (24 - 3)
    assert torch.equal(torch.cat(passed), features[start : start + sum(map(len, passed))])


@pytest.mark.parametrize("db", [-10, -40, -70])
def test_steady_noise_shuts_it_however_loud(db: float) -> None:
    found = opened(noise(3.0, db))
    assert all(found[:30])  # nothing is known yet, so it may be speech
    assert not any(found[40:])


def test_louder_than_the_noise_is_speech() -> None:
    samples = noise(4.0, -50)
    samples[48_000:49_600] += noise(0.1, -38, seed=1)
    found = opened(samples)
    assert not any(found[40:74]) and all(found[75:85])


def test_the_future_does_not_matter_and_a_copy_goes_on() -> None:
    samples = torch.cat([noise(0.6, db, seed) for seed, db in enumerate((-20, -90, -50, -90, -30))])
    blocks = torch.split(log_mel(samples, FEATURES), BLOCK)
    gate, found = SpeechGate(OPTIONS, FEATURES, BLOCK), []
    for block in blocks:
        other = SpeechGate(OPTIONS, FEATURES, BLOCK)
        other.restore(gate.tensors())
        gate = other
        passed = gate.push(block)
        found.append(0 if passed is None else math.ceil(len(passed) / BLOCK))
    assert found == opened(samples)
    assert 0 in found and max(found) > 1
    half = opened(samples[: len(samples) // 2])
    assert half[:-1] == found[: len(half) - 1]  # its last block is cut short


def test_nothing_need_be_kept() -> None:
    options = GateOptions(hold_s=0.04, before_s=0.0)
    found = opened(torch.cat((torch.zeros(8_000), noise(0.1, -20), torch.zeros(8_000))), options)
    assert max(found) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"silence_db": 0}, "silence_db is 0; it must be a number of at least -150 and less th"),
        ({"silence_db": math.nan}, "silence_db is nan"),
        ({"margin_db": -1}, "margin_db is -1"),
        ({"floor_s": 0}, "floor_s is 0"),
        ({"hold_s": math.inf}, "hold_s is inf"),
        ({"before_s": -0.1}, "before_s is -0.1"),
    ],
    ids=str,
)
def test_what_makes_no_gate_is_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GateOptions(**changes)
