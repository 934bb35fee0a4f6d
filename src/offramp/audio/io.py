"""Recordings in, samples out: mono float32 at one rate, whole or as a stream in bounded memory.

soundfile decodes WAV, FLAC, OGG (Opus, Vorbis) and MP3; channels are averaged; soxr resamples.
Samples are in [-1, 1] for integer formats. Float recordings and the resampler may overshoot a
little, and nothing is clipped. What is not a whole and finite recording is an AudioError that
names it; a cut-off OGG file looks whole to its decoder and is read as far as it goes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-untyped]
import torch
from torch import Tensor

from offramp.audio import mp3
from offramp.config import check_counts, check_positive
from offramp.errors import AudioError

SAMPLE_RATE = 16_000
Source = str | Path | BinaryIO

_FORMATS = "WAV, FLAC, OGG (Opus, Vorbis) and MP3"
_UNKNOWN_LENGTH = 1 << 62  # libsndfile says 2^63 - 1 for a FLAC file that was written to a pipe
_SPOOL_BYTES = 32 << 20  # standard input above this goes to a temporary file
_LOUDEST = 1e6  # beyond it a recording is not on a scale of 1, and its power nears float32's end
_WAV_PLACEHOLDER = 0x7FFF_0000  # sizes above it are written by programs that do not know the size
_WAV_SLACK = 1024  # bytes that a WAV header may be wrong by, as many are
_CONTAINERS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")  # how libsndfile calls `_FORMATS`
_RATES = 1_000, 768_000  # Hz; beyond them a header is damaged rather than true
_MOST_CHANNELS = 256
_BLOCK_SAMPLES = 1 << 24  # of all channels together: 64 MiB decoded at a time


def read_audio(source: Source, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """The whole recording, mono: float32 [N] at `sample_rate` Hz.

    source: a path, "-" for standard input, or a binary file object. Raises AudioError.
    """
    return torch.cat(list(stream_audio(source, sample_rate)))


def stream_audio(
    source: Source, sample_rate: int = SAMPLE_RATE, block_s: float = 10.0
) -> Iterator[Tensor]:
    """The same samples as `read_audio` in blocks of about `block_s` seconds, none of them empty.

    Memory depends on the block, not on the recording. AudioError comes when the fault is
    reached, so blocks before it may have been used by then.
    """
    check_counts(1, sample_rate=sample_rate)
    check_positive(block_s=block_s)
    given = 0
    with _opened(source) as recording:
        file, resampler = recording.file, None
        if file.samplerate != sample_rate:
            resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32")
        for mono, last in _decoded(recording, block_s):
            block = mono if resampler is None else resampler.resample_chunk(mono, last=last)
            if len(block):
                given += len(block)
                yield torch.from_numpy(block)
        if not given:
            raise AudioError(
                f"{recording.name} holds no samples; give a recording with sound in it"
            )


def duration_s(path: Path) -> float:
    """Seconds of the recording, by its header where that says so, else by decoding it.

    An MP3 header is believed where the frames in the file agree with it. Raises AudioError.
    """
    with _opened(path) as recording:
        frames = recording.frames
        if frames is None:
            frames = sum(len(mono) for mono, _ in _decoded(recording, block_s=1.0))
        return float(frames / recording.file.samplerate)


@dataclass(frozen=True)
class _Recording:
    """An open file. name: as errors call it. frames: its length, None if only decoding tells it.

    least: with fewer frames it is truncated.
    """

    file: soundfile.SoundFile
    name: str
    frames: int | None
    least: int


@contextmanager
def _opened(source: Source) -> Iterator[_Recording]:
    with ExitStack() as stack:
        if source == "-":
            if sys.stdin is None:  # as Python has it where the shell closed it
                raise AudioError("standard input is closed; pipe a recording into it")
            raw, name = sys.stdin.buffer, "standard input"
        elif isinstance(source, str | Path):
            raw, name = stack.enter_context(_open_path(Path(source))), str(source)
        else:
            raw, name = source, str(getattr(source, "name", "the audio stream"))
        if not raw.seekable():
            raw = stack.enter_context(_spooled(raw))
        _refuse_cut_wav(raw, name)
        try:
            file = stack.enter_context(soundfile.SoundFile(raw))
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless .raw
            raise AudioError(
                f"{name} is not a recording that can be read ({_reason(error)}); allowed are "
                f"{_FORMATS}: convert it to one of them"
            ) from error
        _refuse_strange(file, name)
        if file.format == "MP3":
            yield _mp3_recording(raw, file, name)
        else:
            known = file.frames if file.frames < _UNKNOWN_LENGTH else None
            yield _Recording(file, name, known, known or 0)


def _open_path(path: Path) -> BinaryIO:
    """The file, opened by us rather than by libsndfile, which does not say why it could not."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise AudioError(f"{path} is missing; give the path of a recording") from error
    except IsADirectoryError as error:
        raise AudioError(f"{path} is a folder; give the recordings in it") from error
    except OSError as error:
        raise AudioError(
            f"{path} cannot be read ({error.strerror}); give a file that you may read"
        ) from error


def _spooled(pipe: BinaryIO) -> BinaryIO:
    """All of `pipe`, so that it can be sought in: decoders read headers, ends and tags first."""
    # The caller closes it by leaving its stack.
    spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115
    shutil.copyfileobj(pipe, spool)
    spool.seek(0)
    return spool  # type: ignore[return-value]  # a BinaryIO in all but its declaration


def _refuse_cut_wav(raw: BinaryIO, name: str) -> None:
    """libsndfile takes a WAV file that ends too soon for a shorter one; its header tells."""
    head = raw.read(28)
    size = raw.seek(0, 2)
    raw.seek(0)
    if head[8:12] != b"WAVE":
        return
    if head[:4] in (b"RIFF", b"RIFX"):  # RIFX: all numbers big-endian
        order: Literal["little", "big"] = "little" if head[:4] == b"RIFF" else "big"
        declared, unknown = int.from_bytes(head[4:8], order) + 8, _WAV_PLACEHOLDER
    elif head[:4] == b"RF64" and head[12:16] == b"ds64":  # for sizes above 4 GiB; EBU Tech 3306
        declared, unknown = int.from_bytes(head[20:28], "little") + 8, _UNKNOWN_LENGTH
    else:
        return
    if declared < unknown and size < declared - _WAV_SLACK:
        raise AudioError(
            f"{name} is truncated: it has {size} of {declared} bytes; copy or download it again"
        )


def _refuse_strange(file: soundfile.SoundFile, name: str) -> None:
    """Other containers would be read as far as they go when cut off; odd headers want memory."""
    if file.format not in _CONTAINERS:
        raise AudioError(
            f"{name} is a recording in {file.format}; allowed are {_FORMATS}: convert it to one "
            "of them"
        )
    least, most = _RATES
    if not least <= file.samplerate <= most or file.channels > _MOST_CHANNELS:
        raise AudioError(
            f"{name} has {file.channels} channels at {file.samplerate} Hz by its header; allowed "
            f"are {_MOST_CHANNELS} channels and {least} to {most} Hz: export it again"
        )


def _mp3_recording(raw: BinaryIO, file: soundfile.SoundFile, name: str) -> _Recording:
    """libsndfile reads an MP3 file only as far as its first frame, or a guess, says it goes."""
    at = raw.tell()
    found = mp3.count_frames(raw)
    raw.seek(at)
    if found is None:  # layers 1 and 2 know no Xing frame, and their bit rate is constant
        return _Recording(file, name, file.frames, file.frames)
    said_s, found_s = file.frames / file.samplerate, found.samples / file.samplerate
    if found.declared and found.samples < file.frames - found.slack:
        raise AudioError(
            f"{name} is truncated or damaged: {found_s:.2f} of {said_s:.2f} s are there; copy or "
            "download it again"
        )
    if found.samples > file.frames + found.slack:
        raise AudioError(
            f"{name} lasts {found_s:.2f} s, but would be read as {said_s:.2f} s: MP3 files were "
            "joined, or the bit rate varies and the length was not written; convert it to FLAC"
        )
    frames = min(file.frames, found.samples)
    return _Recording(file, name, frames, frames - found.slack)


def _decoded(recording: _Recording, block_s: float) -> Iterator[tuple[np.ndarray, bool]]:
    """(samples [n], whether they are the last), channels averaged; the last may be empty."""
    file = recording.file
    block = max(1, min(round(block_s * file.samplerate), _BLOCK_SAMPLES // file.channels))
    buffer = np.empty((block, file.channels), dtype=np.float32)
    done, ended = 0, False
    while not ended:
        got, ended = _fill(buffer, recording, done)
        mono = buffer[:got, 0].copy() if file.channels == 1 else buffer[:got].mean(axis=1)
        bad = ~(np.abs(mono) <= _LOUDEST)  # so written, it is true of NaN
        if bad.any():
            raise AudioError(
                f"{recording.name} has samples that are NaN, infinite or beyond {_LOUDEST:g} from "
                f"{(done + int(bad.argmax())) / file.samplerate:.2f} s on; export it again with "
                "samples in [-1, 1]"
            )
        done += got
        yield mono, ended


def _fill(buffer: np.ndarray, recording: _Recording, done: int) -> tuple[int, bool]:
    """Decode into `buffer` [block, channels]: how many frames it got and whether they end it."""
    file = recording.file
    buffer.fill(np.nan)
    try:
        got = file.buffer_read_into(buffer, dtype="float32")
    except soundfile.LibsndfileError as error:
        # With a length unknown the end itself is reported as an error, after the last frames
        # were decoded. What they did not fill is still NaN, which FLAC, of integers, never is.
        got = int((~np.isnan(buffer[:, 0])).sum())
        if recording.frames is None:
            return got, True
        raise _truncated(recording, done + got, _reason(error)) from error
    if got == len(buffer) and done + got < file.frames:
        return got, False
    if done + got < recording.least:
        raise _truncated(recording, done + got, "the data ends there")
    return got, True


def _truncated(recording: _Recording, done: int, reason: str) -> AudioError:
    file = recording.file
    return AudioError(
        f"{recording.name} is truncated or damaged after {done / file.samplerate:.2f} of "
        f"{file.frames / file.samplerate:.2f} s ({reason}); copy or download it again"
    )


def _reason(error: Exception) -> str:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return " ".join(text.removeprefix("Error : ").rstrip(".").split())
