"""Segments of speech: exact samples and times, whatever the blocks; silence gives none."""

from __future__ import annotations

import importlib.util
import logging
import math
import random
import resource
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offramp.audio import vad
from offramp.audio.io import read_audio
from offramp.audio.silero import WINDOW, Silero, silero_path
from offramp.audio.vad import Segment, VadOptions, find_speech
from offramp.data.corpora import data_root
from offramp.data.speech import speech_set
from offramp.errors import ConfigError, DataError, InputError
from thinned import thinned

RATE = 16_000
ENERGY = VadOptions(detector="energy")
KATHLEEN = data_root() / "kathleen_arctic" / "flac"
needs_silero = pytest.mark.skipif(
    importlib.util.find_spec("silero_vad") is None, reason="needs pip install 'offramp[vad]'"
)
needs_speech = pytest.mark.skipif(
    not KATHLEEN.is_dir(), reason=f"no speech at {KATHLEEN}: set OFFRAMP_DATA"
)
both = pytest.mark.parametrize(
    "detector", ["energy", pytest.param("silero", marks=[needs_silero, needs_speech])]
)


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return level * torch.randn(round(seconds * RATE), generator=draw)


def puffs(seconds: float, level: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Noise that swells four times a second, as syllables do, and begins and ends loud."""
    at = torch.arange(round(seconds * RATE)) / RATE
    return noise(seconds, level, seed) * (0.02 + (4 * torch.pi * at).cos() ** 2)


def silence(seconds: float) -> torch.Tensor:
    return torch.zeros(round(seconds * RATE))


def sound(detector: str) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """About 25 s with pauses, and where the parts between the pauses are."""
    if detector == "energy":
        parts = [puffs(s, seed=i) for i, s in enumerate((0.75, 2.0, 6.5, 0.5, 3.0))]
    else:
        files = sorted(KATHLEEN.glob("*.flac"))[:5]
        parts = [read_audio(path) for path in files]
    pieces, where, at = [], [], 0.0
    for part, pause in zip(parts, (1.0, 0.8, 2.5, 1.2, 0.9), strict=True):
        pieces += [silence(pause), part]
        where.append((at + pause, at + pause + len(part) / RATE))
        at = where[-1][1]
    return torch.cat([*pieces, silence(1.7)]), where


def segments(samples: torch.Tensor, options: VadOptions) -> list[Segment]:
    return list(find_speech([samples], options))


@both
def test_segments_are_the_inputs_samples_at_their_times(detector: str) -> None:
    samples, _ = sound(detector)
    found = segments(samples, VadOptions(detector=detector, max_segment_s=4))  # type: ignore[arg-type]
    assert len(found) > 3
    end = 0
    for segment in found:
        assert segment.start >= end, "in order, without overlap"
        end = segment.start + len(segment.samples)
        assert torch.equal(segment.samples, samples[segment.start : end])
        assert segment.start_s == segment.start / RATE
        assert segment.end_s == end / RATE
        assert 0 < len(segment.samples) <= 4 * RATE
    assert end <= len(samples)


@both
@pytest.mark.parametrize("seed", thinned(range(3), keep=[1]))
def test_how_the_input_is_cut_into_blocks_does_not_matter(detector: str, seed: int) -> None:
    samples, _ = sound(detector)
    options = VadOptions(detector=detector, max_segment_s=5)  # type: ignore[arg-type]
    draw, at, blocks = random.Random(seed), 0, []
    while at < len(samples):
        blocks.append(samples[at : at + draw.randint(0, (700, 20_000, 300_000)[seed])])
        at += len(blocks[-1])
    whole, cut = segments(samples, options), list(find_speech(blocks, options))
    assert [s.start for s in cut] == [s.start for s in whole]
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(cut, whole, strict=True))


@both
def test_each_utterance_between_pauses_is_found_with_its_times(detector: str) -> None:
    samples, where = sound(detector)
    options = VadOptions(detector=detector, padding_s=0.1, min_silence_s=0.7)  # type: ignore[arg-type]
    found = segments(samples, options)
    assert len(found) == len(where)
    # Recordings begin and end with some quiet of their own, which Silero leaves out.
    slack = 0.17 if detector == "energy" else 0.5
    for segment, (start, end) in zip(found, where, strict=True):
        assert -0.17 < segment.start_s - start < slack
        assert -slack < segment.end_s - end < 0.3


@pytest.mark.parametrize("detector", ["energy", pytest.param("silero", marks=needs_silero)])
@pytest.mark.parametrize("kind", ["nothing", "zeros", "dither"])
def test_silence_has_no_speech_in_it(detector: str, kind: str) -> None:
    bits = torch.randint(-1, 2, (10 * RATE,), generator=torch.Generator().manual_seed(0))
    samples = {"nothing": silence(0), "zeros": silence(10), "dither": bits / 32768}[kind]
    assert segments(samples, VadOptions(detector=detector)) == []  # type: ignore[arg-type]


def steady(kind: str, seconds: float, seed: int = 0) -> torch.Tensor:
    """A sound that stays as it is, of mean square 1."""
    if kind in COLOURS:
        spectrum = torch.fft.rfft(noise(seconds, 1.0, seed))
        hz = torch.fft.rfftfreq(round(seconds * RATE), 1 / RATE).clamp(min=20)
        made = torch.fft.irfft(spectrum * hz ** (-COLOURS[kind] / 2), round(seconds * RATE))
    else:
        phase = 2 * torch.pi * torch.arange(round(seconds * RATE)) / RATE
        partials = {"hum": range(50, 1000, 50), "whine": range(900, 8000, 900), "tone": [509]}[kind]
        made = sum((hz * phase + hz).sin() * partials[0] / hz for hz in partials)
    return made / made.square().mean().sqrt()


COLOURS = {"white": 0, "pink": 1, "brown": 2}  # power falls with this power of the frequency
KINDS = (*COLOURS, "hum", "whine", "tone")


@pytest.mark.parametrize("level", thinned([0.3, 0.03, 0.001], keep=[0.03]))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_steady_is_no_speech_however_loud(kind: str, level: float) -> None:
    for seed in range(3):
        samples = level * steady(kind, 10, seed)
        assert segments(samples, ENERGY) == []
        assert segments(torch.cat([silence(0.05), samples[: 3 * RATE], silence(1)]), ENERGY) == []
        assert segments(samples[: RATE // 3], ENERGY) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_swings_stands_out_of_what_is_steady(kind: str) -> None:
    """And nothing but it is taken for speech."""
    samples = 0.01 * steady(kind, 12)
    samples[5 * RATE : 7 * RATE] += puffs(2)
    (found,) = segments(samples, ENERGY)
    assert 4.7 < found.start_s < 5.1 and 6.9 < found.end_s < 7.3


def test_silence_and_level_are_not_learned_from_where_the_input_begins() -> None:
    """Later by whole windows, the same is found: at the ends of the blocks too."""
    samples, _ = sound("energy")
    once = [(s.start, len(s.samples)) for s in segments(samples, ENERGY)]
    for windows in (1, 40, 127):
        later = segments(torch.cat([torch.zeros(windows * WINDOW), samples]), ENERGY)
        assert [(s.start - windows * WINDOW, len(s.samples)) for s in later] == once


def spoken(set_name: str, count: int) -> Iterator[tuple[torch.Tensor, list[Segment]]]:
    """(recordings of development data, what Silero finds in them, without padding)."""
    try:
        chosen = speech_set(set_name, "dev")[::7][:count]
    except DataError as error:
        pytest.skip(str(error))
    for utterance in chosen:
        samples = read_audio(utterance.path)
        yield samples, segments(samples, VadOptions(detector="silero", padding_s=0.0))


@needs_silero
@pytest.mark.parametrize(
    ("set_name", "least"),
    [
        ("kathleen_arctic", 0.995),
        pytest.param("mini_librispeech_train_clean_5", 0.995, marks=pytest.mark.slow),
        pytest.param("librispeech_test_other_100", 0.99, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("snr_db", [math.inf, 10.0])
def test_real_speech_is_kept(set_name: str, least: float, snr_db: float) -> None:
    """Of what Silero takes for speech; also where noise is put under it, before and after it."""
    kept = total = 0
    for samples, theirs in spoken(set_name, 6):
        heard = torch.cat([silence(2.048), samples, silence(2)])
        under = samples.square().mean().sqrt() * 10 ** (-snr_db / 20)
        found = segments(heard + under * steady("pink", len(heard) / RATE), ENERGY)
        marked = torch.zeros(len(heard), dtype=torch.bool)
        for segment in found:
            marked[segment.start : segment.start + len(segment.samples)] = True
        assert not marked[:RATE].any(), "noise before the speech"
        for segment in theirs:
            start = segment.start + 64 * WINDOW
            kept += int(marked[start : start + len(segment.samples)].sum())
            total += len(segment.samples)
    assert kept >= (least if snr_db == math.inf else least - 0.02) * total


@needs_silero
@needs_speech
def test_silero_gives_what_the_packages_own_model_gives_window_by_window() -> None:
    path = silero_path()
    assert path is not None
    samples, _ = sound("silero")
    windows = samples[: 330 * WINDOW].view(-1, WINDOW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.jit.optimized_execution(False):  # which takes seconds to compile
        expected = torch.tensor([model(window, RATE).item() for window in windows])
    ours = Silero(path)
    parts = torch.split(windows, [1, 300, 7, len(windows) - 308])
    found = torch.cat([*(ours.push(part) for part in parts), ours.finish()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.max() > 0.9
    assert expected.min() < 0.1


def test_sound_without_pauses_is_cut_where_it_is_quietest_and_nothing_is_lost() -> None:
    samples = puffs(40)
    dips = [8.5, 16.1, 25.0]
    for at in dips:
        samples[round((at - 0.1) * RATE) : round((at + 0.1) * RATE)] *= 0.01
    found = segments(samples, VadOptions(detector="energy", max_segment_s=10))
    assert torch.equal(torch.cat([s.samples for s in found]), samples)
    cuts = [s.end_s for s in found]
    for dip, cut in zip(dips, cuts, strict=False):
        assert abs(cut - dip) < 0.1
    assert all(len(s.samples) <= 10 * RATE for s in found)


def detect_by(probabilities: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the detector say this, window by window."""
    remaining = iter(probabilities)

    class Told:
        def push(self, windows: torch.Tensor) -> torch.Tensor:
            return torch.tensor([next(remaining) for _ in windows])

        def finish(self) -> torch.Tensor:
            return torch.zeros(0)

    monkeypatch.setattr(vad, "_detector", lambda options: Told())


def obvious(probabilities: list[float], options: VadOptions) -> list[tuple[int, int]]:
    """The rules on the whole input at once, in windows of 32 ms, without a longest segment."""
    count, spans, at = len(probabilities), [], 0
    silence, padding = round(options.min_silence_s / 0.032), round(options.padding_s / 0.032)
    while at < count:
        if probabilities[at] < options.threshold:
            at += 1
            continue
        quiet_from = [
            i
            for i in range(at, count - silence + 1)
            if all(p < options.exit_threshold for p in probabilities[i : i + silence])
        ]
        end = next(iter(quiet_from), count)
        stop = min(end + silence, count)
        while end > at and probabilities[end - 1] < options.exit_threshold:
            end -= 1  # at the end of the input a pause may be shorter
        if end - at >= round(options.min_speech_s / 0.032):
            spans.append(
                (max(at - padding, spans[-1][1] if spans else 0), min(end + padding, stop))
            )
        at = stop
    return spans


@pytest.mark.parametrize("seed", range(30))
def test_thresholds_and_durations_follow_their_obvious_definition(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    options = VadOptions(
        min_speech_s=0.032 * draw.choice([1, 2, 4]),
        min_silence_s=0.032 * draw.choice([3, 4, 6]),
        padding_s=0.032 * draw.choice([0, 1, 3]),
        max_segment_s=1_000,
    )
    probabilities: list[float] = []
    while len(probabilities) < 300:
        probabilities += [draw.choice([0.1, 0.1, 0.4, 0.9])] * draw.randint(1, 5)
    detect_by(probabilities, monkeypatch)
    found = segments(noise(len(probabilities) * 0.032), options)
    spans = [(s.start // WINDOW, (s.start + len(s.samples)) // WINDOW) for s in found]
    assert spans == obvious(probabilities, options)
    assert len(spans) > 3


def test_too_long_speech_is_cut_and_what_follows_the_cut_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the cut falls into a pause that may yet end the speech."""
    options = VadOptions(max_segment_s=2, padding_s=0.2, min_silence_s=0.5)
    for length in range(40, 80):
        probabilities = [0.0] * 10 + [0.9] * length + [0.0] * 5 + [0.9] * 2 + [0.0] * 40
        detect_by(probabilities, monkeypatch)
        samples = noise(len(probabilities) * 0.032)
        found = segments(samples, options)
        kept = torch.cat([s.samples for s in found])
        assert found[0].start <= 10 * WINDOW
        assert found[-1].start + len(found[-1].samples) >= (17 + length) * WINDOW
        whole = samples[found[0].start : found[0].start + len(kept)]
        assert torch.equal(kept, whole), "no gap and no overlap"
        assert max(len(s.samples) for s in found) <= 2 * RATE


def test_segments_come_as_soon_as_they_are_complete() -> None:
    read = 0

    def blocks() -> Iterator[torch.Tensor]:
        nonlocal read
        for i in range(120):
            read += RATE
            yield puffs(1, level=0.1 if i % 10 < 6 else 0, seed=i)

    for segment in find_speech(blocks(), ENERGY):
        assert read / RATE - segment.end_s < 6.5, "4 s are taken at once, and 1.5 s looked ahead"
    assert read == 120 * RATE


def test_without_silero_loudness_is_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vad, "silero_path", lambda: None)
    vad._say_that_silero_is_absent.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert len(segments(puffs(3), VadOptions())) == 1
    (record,) = caplog.records
    assert "silero-vad is not installed: all that is neither silent nor steady" in record.message
    with pytest.raises(InputError, match=r"needs the package silero-vad; install it with pip"):
        segments(noise(1), VadOptions(detector="silero"))


@needs_silero
def test_the_package_is_not_imported_which_would_set_torch_to_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    segments(noise(1), VadOptions(detector="silero"))
    assert "silero_vad" not in sys.modules


def test_a_silero_without_its_model_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "silero_vad").mkdir()
    (tmp_path / "silero_vad" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"silero-vad has no .*silero_vad\.jit; install"):
        silero_path()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"exit_threshold": 0.6}, "exit_threshold is 0.6; it must be at most threshold, 0.5"),
        ({"max_segment_s": 1.0}, "max_segment_s is 1.0; it must be at least a second more than"),
        ({"padding_s": 0.6}, "padding_s is 0.6; it must be at most min_silence_s, 0.5"),
        ({"min_silence_s": 0}, "min_silence_s is 0"),
        ({"silence_db": 3.0}, "silence_db is 3.0"),
        ({"detector": "ears"}, "detector is 'ears'; it must be one of auto, silero, energy"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        VadOptions(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
@needs_silero
@needs_speech
def test_an_hour_of_speech_is_cut_in_bounded_memory() -> None:
    minute, _ = sound("silero")
    minute = torch.cat([minute, minute])[: 60 * RATE]
    rounds = 3_600 * RATE // len(minute)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(1 for _ in find_speech((minute for _ in range(rounds)), VadOptions()))
    assert count > rounds * 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
