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
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-untyped]
import torch
from torch import Tensor

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
    with _opened(source) as (file, name):
        resampler = None
        if file.samplerate != sample_rate:
            resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32")
        for mono, last in _decoded(file, name, max(1, round(block_s * file.samplerate))):
            block = mono if resampler is None else resampler.resample_chunk(mono, last=last)
            if len(block):
                given += len(block)
                yield torch.from_numpy(block)
        if not given:
            raise AudioError(f"{name} holds no samples; give a recording with sound in it")


def duration_s(path: Path) -> float:
    """Seconds of the recording, by its header where that says so, else by decoding it."""
    with _opened(path) as (file, name):
        frames = file.frames
        if frames >= _UNKNOWN_LENGTH:
            frames = sum(len(mono) for mono, _ in _decoded(file, name, file.samplerate))
        return float(frames / file.samplerate)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[soundfile.SoundFile, str]]:
    """The open recording and the name that errors give it."""
    with ExitStack() as stack:
        if source == "-":
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
        yield file, name


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
    head = raw.read(12)
    size = raw.seek(0, 2)
    raw.seek(0)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return
    declared = int.from_bytes(head[4:8], "little") + 8
    if declared < _WAV_PLACEHOLDER and size < declared - _WAV_SLACK:
        raise AudioError(
            f"{name} is truncated: it has {size} of {declared} bytes; copy or download it again"
        )


def _decoded(file: soundfile.SoundFile, name: str, block: int) -> Iterator[tuple[np.ndarray, bool]]:
    """(samples [n], whether they are the last), channels averaged; the last may be empty."""
    buffer = np.empty((block, file.channels), dtype=np.float32)
    done, ended = 0, False
    while not ended:
        got, ended = _fill(buffer, file, name, done)
        mono = buffer[:got, 0].copy() if file.channels == 1 else buffer[:got].mean(axis=1)
        if got and not np.abs(mono).max() <= _LOUDEST:  # so written, it is true of NaN
            raise AudioError(
                f"{name} has samples that are NaN, infinite or beyond {_LOUDEST:g} from "
                f"{done / file.samplerate:.2f} s on; export it again with samples in [-1, 1]"
            )
        done += got
        yield mono, ended


def _fill(buffer: np.ndarray, file: soundfile.SoundFile, name: str, done: int) -> tuple[int, bool]:
    """Decode into `buffer` [block, channels]: how many frames it got and whether they end it."""
    unknown = file.frames >= _UNKNOWN_LENGTH
    buffer.fill(np.nan)
    try:
        got = file.buffer_read_into(buffer, dtype="float32")
    except soundfile.LibsndfileError as error:
        # With a length unknown the end itself is reported as an error, after the last frames
        # were decoded. What they did not fill is still NaN, which FLAC, of integers, never is.
        if unknown:
            return int((~np.isnan(buffer[:, 0])).sum()), True
        raise _truncated(file, name, done, _reason(error)) from error
    if got == len(buffer) and (unknown or done + got < file.frames):
        return got, False
    if not unknown and done + got < file.frames:
        raise _truncated(file, name, done + got, "the data ends there")
    return got, True


def _truncated(file: soundfile.SoundFile, name: str, done: int, reason: str) -> AudioError:
    return AudioError(
        f"{name} is truncated or damaged after {done / file.samplerate:.2f} of "
        f"{file.frames / file.samplerate:.2f} s ({reason}); copy or download it again"
    )


def _reason(error: Exception) -> str:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return " ".join(text.removeprefix("Error : ").rstrip(".").split())
