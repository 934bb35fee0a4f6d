"""Recordings of any rate, channels and format; streams equal whole reads; what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from offramp.audio.io import duration_s, read_audio, stream_audio
from offramp.errors import AudioError, ConfigError


def noise(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    count = round(seconds * rate)
    return np.random.default_rng(7).uniform(-0.5, 0.5, (count, channels)).astype(np.float32)


def written(path: Path, samples: np.ndarray, rate: int, subtype: str | None = None) -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def tone(hz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def slow_read(path: Path, rate: int) -> torch.Tensor:
    """The obvious version: all at once."""
    samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(soxr.resample(samples.mean(axis=1), file_rate, rate))


@pytest.mark.parametrize(
    ("rate", "channels"), [(8_000, 1), (16_000, 2), (22_050, 1), (44_100, 2), (192_000, 8)]
)
@pytest.mark.parametrize("block_s", [0.01, 0.31, 5.0])
def test_a_stream_equals_the_whole_read_in_any_blocks(
    tmp_path: Path, rate: int, channels: int, block_s: float
) -> None:
    path = written(tmp_path / "a.wav", noise(1.3, rate, channels), rate, "FLOAT")
    expected = slow_read(path, 16_000)
    blocks = list(stream_audio(path, block_s=block_s))
    streamed = torch.cat(blocks)
    assert streamed.dtype == torch.float32
    assert streamed.shape == expected.shape
    assert len(streamed) == pytest.approx(1.3 * 16_000, abs=1)
    torch.testing.assert_close(streamed, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(read_audio(path), expected, atol=2e-6, rtol=0)
    if block_s < 1:
        longest = max(len(block) for block in blocks)
        assert longest <= block_s * 16_000 + 2_000, "a block does not grow with the recording"


@pytest.mark.parametrize(
    ("name", "subtype", "worst"),
    [
        ("a.wav", "PCM_16", 1e-4),
        ("a.flac", "PCM_16", 1e-4),
        ("a.ogg", "VORBIS", 0.03),
        ("a.ogg", "OPUS", 0.03),
        ("a.mp3", "MPEG_LAYER_III", 0.03),
    ],
)
def test_every_format_gives_the_sound_that_was_written(
    tmp_path: Path, name: str, subtype: str, worst: float
) -> None:
    sound = tone(440, 24_000)
    path = written(tmp_path / name, sound, 24_000, subtype)
    found = read_audio(path, 24_000)
    assert len(found) == len(sound)
    middle = slice(12_000, 20_000)  # codecs ring at the edges, Opus for 300 ms
    assert np.abs(found.numpy() - sound)[middle].max() < worst
    assert duration_s(path) == pytest.approx(1.0, abs=1e-3)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(300, 16_000), tone(700, 16_000)
    path = written(tmp_path / "a.wav", np.stack([left, right, 0 * left], axis=1), 16_000, "FLOAT")
    assert np.abs(read_audio(path).numpy() - (left + right) / 3).max() < 1e-6


def test_resampling_keeps_pitch_and_removes_what_the_rate_cannot_hold(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(440, 44_100) + tone(12_000, 44_100), 44_100, "FLOAT")
    found = read_audio(path).numpy()
    expected = tone(440, 16_000)
    assert np.abs(found - expected)[1_000:-1_000].max() < 1e-3


def test_paths_file_objects_and_standard_input_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.flac", noise(0.5, 16_000), 16_000)
    expected = read_audio(path)
    assert torch.equal(read_audio(str(path)), expected)
    assert torch.equal(read_audio(io.BytesIO(path.read_bytes())), expected)
    reading, writing = os.pipe()  # what a shell gives: it cannot seek
    os.write(writing, path.read_bytes()[:60_000])
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert not pipe.seekable()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        assert torch.equal(read_audio("-"), expected)
        sys.stdin.detach()


@pytest.mark.parametrize("count", [4_096, 4_097, 10_000, 48_000])
def test_a_flac_file_of_unknown_length_is_read_to_its_end(tmp_path: Path, count: int) -> None:
    """Written to a pipe: the header's 36 bits of length stay 0."""
    path = written(tmp_path / "a.flac", noise(count / 16_000, 16_000), 16_000)
    expected = read_audio(path)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert torch.equal(read_audio(path), expected)
    assert torch.equal(torch.cat(list(stream_audio(path, block_s=0.05))), expected)
    assert duration_s(path) == count / 16_000


def test_a_wav_file_written_to_a_pipe_is_not_taken_for_truncated(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", noise(0.5, 16_000), 16_000)
    expected = read_audio(path)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    assert torch.equal(read_audio(path), expected)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.wav", lambda p: None, "is missing"),
    "a folder": ("a.wav", lambda p: p.mkdir(), "is a folder"),
    "text": ("a.wav", lambda p: p.write_text("so it goes\n" * 99), "is not a recording that can"),
    "text as mp3": ("a.mp3", lambda p: p.write_text("hello\n" * 99), "is not a recording that"),
    "no bytes": ("a.flac", lambda p: p.write_bytes(b""), "is not a recording that can be read"),
    "headerless": ("a.raw", lambda p: p.write_bytes(bytes(999)), "allowed are WAV, FLAC, OGG"),
    "cut flac": ("a.flac", lambda p: (written(p, noise(3, 16_000), 16_000), cut(p)), "truncated"),
    "cut wav": ("a.wav", lambda p: (written(p, noise(3, 16_000), 16_000), cut(p)), "truncated"),
    "cut mp3": ("a.mp3", lambda p: (written(p, noise(3, 16_000), 16_000), cut(p)), "truncated"),
    "no samples": ("a.wav", lambda p: written(p, noise(0, 16_000), 16_000), "holds no samples"),
    "one sample": ("a.wav", lambda p: written(p, noise(1e-5, 96_000), 96_000), "holds no samples"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_a_whole_recording_is_refused_in_one_line_that_names_it(
    tmp_path: Path, fault: str
) -> None:
    name, make, says = BAD[fault]
    path = tmp_path / name
    make(path)
    with pytest.raises(AudioError, match=says) as error:
        read_audio(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def mp3_bytes(seconds: float, rate: int, mode: str, declared: bool = True) -> bytes:
    """Quiet, then loud, so that the bit rate varies. declared: with the frame of the length."""
    sound = noise(seconds, rate)
    sound[: len(sound) // 2] *= 1e-3
    made = io.BytesIO()
    how = {"format": "MP3", "subtype": "MPEG_LAYER_III"}
    soundfile.write(made, sound, rate, **how, bitrate_mode=mode, compression_level=0.5)
    data = made.getvalue()
    second = data.index(data[:2], 4)
    assert any(mark in data[:second] for mark in (b"Xing", b"Info"))
    return data if declared else data[second:]


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_an_mp3_file_that_would_lose_its_end_is_refused(tmp_path: Path, rate: int) -> None:
    """libsndfile believes the first of joined files, and guesses from the first frame's rate."""
    whole = mp3_bytes(4, rate, "VARIABLE")
    path = tmp_path / "a.mp3"
    tag = b"ID3\3\0\0\0\0\2\0" + b"\xff\xfb\x90\x64" * 64
    for data in (whole + whole, whole + tag + whole, mp3_bytes(4, rate, "VARIABLE", False)):
        path.write_bytes(data)
        for read in (read_audio, duration_s):
            with pytest.raises(AudioError, match=r"a\.mp3 lasts \d\.\d\d s, but would"):
                read(path)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
@pytest.mark.parametrize("declared", [True, False])
def test_a_whole_mp3_file_is_read_with_tags_and_with_or_without_its_length(
    tmp_path: Path, rate: int, declared: bool
) -> None:
    data = mp3_bytes(6, rate, "CONSTANT", declared)
    path = tmp_path / "a.mp3"
    path.write_bytes(b"ID3\3\0\0\0\0\2\0" + bytes(256) + data + b"TAG" + bytes(125))
    padding = 0 if declared else 0.3
    assert 6 <= duration_s(path) <= 6 + padding
    assert len(read_audio(path, rate)) / rate == pytest.approx(duration_s(path), abs=0.1)


def test_a_cut_mp3_file_has_no_length(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(mp3_bytes(4, 16_000, "VARIABLE")[:-4_000])
    with pytest.raises(AudioError, match="truncated or damaged"):
        duration_s(tmp_path / "a.mp3")


@pytest.mark.parametrize(("rate", "channels"), [(2_000_000_000, 1), (50, 1), (16_000, 300)])
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, rate: int, channels: int) -> None:
    path = written(tmp_path / "a.wav", np.zeros((100, channels)), rate)
    with pytest.raises(AudioError, match=rf"has {channels} channels at {rate} Hz"):
        read_audio(path)


def test_many_channels_do_not_make_a_block_larger(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", np.zeros((70_000, 256), np.int16), 16_000)
    assert [len(block) for block in stream_audio(path)] == [65_536, 70_000 - 65_536]


@pytest.mark.parametrize(("format", "endian"), [("RF64", "FILE"), ("WAV", "BIG")])
def test_other_kinds_of_wav_are_read_unless_cut(tmp_path: Path, format: str, endian: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(1, 16_000), 16_000, format=format, endian=endian)
    assert len(read_audio(path)) == 16_000
    cut(path)
    with pytest.raises(AudioError, match="truncated"):
        read_audio(path)


@pytest.mark.parametrize("format", ["AIFF", "W64", "AU"])
def test_containers_that_do_not_tell_that_they_were_cut_are_refused(
    tmp_path: Path, format: str
) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(1, 16_000), 16_000, format=format)
    with pytest.raises(AudioError, match=f"is a recording in {format}; allowed are WAV, FLAC"):
        read_audio(path)


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AudioError, match="standard input is closed"):
        read_audio("-")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_samples_that_are_not_finite_are_refused_with_their_time(
    tmp_path: Path, value: float, rate: int
) -> None:
    samples = noise(3, rate, 2)
    samples[2 * rate + rate // 5, 1] = value
    path = written(tmp_path / "a.wav", samples, rate, "FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav has samples that are NaN.* from 2\.20 s on"):
        list(stream_audio(path, block_s=0.5))
    with pytest.raises(AudioError, match="has samples that are NaN"):
        read_audio(path)


def test_a_stream_gives_what_comes_before_the_fault(tmp_path: Path) -> None:
    path = written(tmp_path / "a.flac", noise(3, 16_000), 16_000)
    expected = read_audio(path)
    cut(path)
    blocks, stream = [], stream_audio(path, block_s=0.1)
    with pytest.raises(AudioError, match=r"truncated or damaged after 1\.\d\d of 3\.00 s"):
        while True:
            blocks.append(next(stream))
    given = torch.cat(blocks)
    assert len(given) > 16_000
    assert torch.equal(given, expected[: len(given)])


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.5])
def test_a_rate_or_block_that_makes_no_sense_is_refused(tmp_path: Path, rate: float) -> None:
    path = written(tmp_path / "a.wav", noise(0.1, 16_000), 16_000)
    with pytest.raises(ConfigError, match="sample_rate"):
        read_audio(path, rate)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block_s"):
        next(stream_audio(path, block_s=0))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    """Ten minutes of 8 channels at 48 kHz are 922 MB as float32; a stream holds some blocks."""
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", 48_000, 8, "PCM_16") as file:
        second = noise(1, 48_000, 8)
        for _ in range(600):
            file.write(second)
    script = (
        "import resource, sys\nfrom offramp.audio.io import stream_audio\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "count = sum(len(b) for b in stream_audio(sys.argv[1]))\n"
        "print(count, peak() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    count, megabytes = map(int, run.stdout.split())
    assert count == 600 * 16_000
    assert megabytes < 150
