"""Sound from a pipe, a microphone or a recording comes in blocks; what cannot come says why."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from offramp.audio.live import microphone, open_source, pcm
from offramp.errors import AudioError, InputError


class Pipe(io.BytesIO):
    """Gives out a few bytes at a time, as pipes do."""

    def read1(self, size: int | None = -1, /) -> bytes:
        return self.read(7)


def test_16_bit_samples_from_a_pipe() -> None:
    said = np.arange(-50, 50, dtype="<i2")
    for file in (Pipe(said.tobytes()), io.BytesIO(said.tobytes())):
        blocks = list(pcm(file))
        assert np.array_equal(np.concatenate(blocks), said)
        assert all(block.dtype == np.int16 for block in blocks)
    assert np.concatenate(list(pcm(Pipe(said.tobytes()[:-1])))).tolist() == said[:-1].tolist()
    for nothing in (b"", b"\x01"):
        with pytest.raises(AudioError, match="standard input holds no samples"):
            list(pcm(io.BytesIO(nothing)))


def wav(samples: np.ndarray, subtype: str, rate: int = 16_000, kind: str = "WAV") -> bytes:
    """The bytes of a recording."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=kind)
    return file.getvalue()


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, rate: int | None = None) -> Any:
    """(samples, rate) of standard input that holds `data`."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(data)))
    blocks, found = open_source("-", sample_rate=rate)
    return np.concatenate([np.asarray(block) for block in blocks]).tolist(), found


def test_a_wav_header_on_standard_input_is_read_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    said = np.arange(-50, 51, dtype=np.int16)
    file = wav(said, rate=44_100, subtype="PCM_16")
    assert piped(monkeypatch, file) == (said.tolist(), 44_100)
    assert piped(monkeypatch, file, 44_100) == (said.tolist(), 44_100)
    extensible = wav(said, kind="WAVEX", subtype="PCM_16")
    assert piped(monkeypatch, extensible) == (said.tolist(), 16_000)
    at = file.index(b"data")
    after = file + b"LIST\x04\0\0\0INFO"  # no samples either
    assert piped(monkeypatch, after)[0] == said.tolist()
    for unknown in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x80"):  # as a pipe is begun
        endless = file[: at + 4] + unknown + file[at + 8 :]
        assert piped(monkeypatch, endless)[0] == said.tolist()
    noted = file[:12] + b"note\x03\0\0\0abc\0" + file[12:]  # of odd length, filled up
    assert piped(monkeypatch, noted) == (said.tolist(), 44_100)
    assert piped(monkeypatch, b"RIFF" + said.tobytes())[0][2:] == said.tolist()


@pytest.mark.parametrize(
    ("data", "rate", "says"),
    [
        (wav(np.zeros((9, 2)), subtype="PCM_16"), None, "WAV of 2 channels and 16 bits"),
        (wav(np.zeros(9), subtype="PCM_24"), None, "WAV of 1 channels and 24 bits"),
        (
            wav(np.zeros(9), subtype="FLOAT"),
            None,
            r"1 channels and 32 bits \(format 3\); pipe 16-b",
        ),
        (wav(np.zeros(9), subtype="PCM_16"), 8000, "is 8000, and the WAV header on .* says 16000"),
        (wav(np.zeros(9), subtype="PCM_16")[:40], None, "header that is damaged, or ends within"),
        (b"RIFF\0\0\0\0WAVEfmt \xff\xff\xff\xff", None, "header that is damaged, or ends within"),
        (wav(np.zeros(9), subtype="PCM_16")[:44], None, "standard input holds no samples"),
    ],
    ids=["stereo", "24 bits", "float", "another rate", "cut off", "damaged", "empty"],
)
def test_a_header_of_other_samples_is_refused(
    monkeypatch: pytest.MonkeyPatch, data: bytes, rate: int | None, says: str
) -> None:
    with pytest.raises((AudioError, InputError), match=says):
        piped(monkeypatch, data, rate)


def test_standard_input_has_the_rate_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\x01\x00")))
    blocks, rate = open_source("-", sample_rate=8000)
    assert rate == 8000 and [b.tolist() for b in blocks] == [[1]]
    assert open_source("-")[1] == 16_000
    assert open_source("-", sample_rate=0)[1] == 0, "which a stream refuses"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AudioError, match="standard input is closed"):
        open_source("-")


def test_a_recording_comes_in_blocks(tmp_path: Path) -> None:
    samples = 0.1 * torch.randn(16_000)
    soundfile.write(tmp_path / "a.wav", samples.numpy(), 16_000, subtype="FLOAT")
    blocks, rate = open_source(tmp_path / "a.wav")
    found = [torch.as_tensor(block) for block in blocks]
    assert rate == 16_000 and len(found) > 5 and torch.equal(torch.cat(found), samples)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None,), "give either a recording, or"),
        (("a.wav", True), "give either a recording, or"),
        (("a.wav", False, 8000), "sample_rate is 8000, and a recording says itself"),
    ],
    ids=str,
)
def test_what_is_no_source_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_source(*given)


class PortAudioError(Exception):
    pass


class FakeStream:
    """Gives 3 blocks, of which the first two had losses before them; then Ctrl-C or a fault."""

    def __init__(self, sample_rate: int, channels: int, dtype: str, end: BaseException) -> None:
        assert (channels, dtype) == (1, "int16")
        self.left, self.end, self.closed = 3, end, False

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def read(self, frames: int) -> tuple[np.ndarray, bool]:
        if not self.left:
            raise self.end
        self.left -= 1
        return np.full((frames, 1), self.left, dtype=np.int16), self.left > 0


def fake_sounddevice(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> list[FakeStream]:
    opened: list[FakeStream] = []

    def open_stream(*args: Any, **options: Any) -> FakeStream:
        opened.append(FakeStream(*args, **options, end=end))
        return opened[-1]

    module = SimpleNamespace(InputStream=open_stream, PortAudioError=PortAudioError)
    monkeypatch.setitem(sys.modules, "sounddevice", module)  # type: ignore[arg-type]
    return opened


def test_a_microphone_is_read_until_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = fake_sounddevice(monkeypatch, KeyboardInterrupt())
    with caplog.at_level(logging.WARNING):
        blocks, rate = open_source(None, mic=True, sample_rate=48_000)
        found = list(blocks)
    assert rate == 48_000 and [b.shape for b in found] == 3 * [(4800,)]
    assert [int(b[0]) for b in found] == [2, 1, 0] and opened[0].closed
    assert len(caplog.records) == 1 and "samples are lost" in caplog.text


def test_a_microphone_that_fails_is_an_audio_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sounddevice(monkeypatch, PortAudioError("Device unavailable"))
    with pytest.raises(AudioError, match=r"cannot be read at 16000 Hz \(Device unavailable\)"):
        list(microphone(16_000))


def test_what_a_microphone_needs_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(InputError, match=r"pip install 'offramp\[mic\]'"):
        microphone(16_000)

    def no_library(name: str) -> Any:
        raise OSError("PortAudio library not found")

    monkeypatch.setattr("offramp.audio.live.importlib.import_module", no_library)
    with pytest.raises(InputError, match=r"\(PortAudio library not found\); install PortAudio"):
        microphone(16_000)
