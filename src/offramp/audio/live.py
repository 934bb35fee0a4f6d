"""Sound as it comes in: a microphone, samples through a pipe, a recording block by block."""

from __future__ import annotations

import importlib
import logging
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, Source, stream_audio
from offramp.errors import AudioError, InputError

logger = logging.getLogger(__name__)

BLOCK_S = 0.1
_PIPE_BYTES = 1 << 16
_PCM, _EXTENSIBLE = 1, 0xFFFE  # formats of a WAV header; the second names the true one further on
_MOST_HEADER_BYTES = 1 << 20  # of a part of a WAV header; what says more is damaged
_NO_SIZE = 0x7FFF_0000  # from here up, and 0, are sizes that a program writes that knows none yet


def open_source(
    source: Source | None, mic: bool = False, sample_rate: int | None = None
) -> tuple[Iterable[Tensor | np.ndarray], int]:
    """(blocks of mono samples, their rate in Hz); a file is opened with the first block.

    source: a path or binary file object of a recording; "-" for 16-bit samples (PCM, mono, little
    end first) from standard input, which says its rate in a WAV header or has `sample_rate`, 16 kHz
    if None; or None with `mic`. InputError: none of these, or several. AudioError: standard input
    begins with a WAV header of other samples.
    """
    if mic == (source is not None):
        raise InputError('give either a recording, or "-" for standard input, or the microphone')
    rate = SAMPLE_RATE if sample_rate is None else sample_rate
    if mic:
        return microphone(rate), rate
    if source == "-":
        if sys.stdin is None:  # as Python has it where the shell closed it
            raise AudioError("standard input is closed; pipe 16-bit samples into it")
        return _piped(sys.stdin.buffer, sample_rate)
    if sample_rate is not None:
        raise InputError(
            f"sample_rate is {sample_rate}, and a recording says itself what it has; leave it out"
        )
    assert source is not None
    return stream_audio(source, block_s=BLOCK_S), SAMPLE_RATE


def pcm(file: BinaryIO, begun: bytes = b"", size: int | None = None) -> Iterator[np.ndarray]:
    """int16 blocks [n] of what `file` holds, as soon as it is there.

    begun: bytes of it that were read already. size: bytes that are samples, None: all to the end.
    Half a sample at the end, where a writer was cut off, is none. AudioError: there is no sample.
    """
    read = getattr(file, "read1", file.read)  # what there is, rather than all that was asked for
    rest, given = b"", 0
    while data := begun or read(_PIPE_BYTES):
        data, begun = rest + data, b""
        if size is not None:
            data = data[: size - given]
        whole = len(data) - len(data) % 2
        rest, given = data[whole:], given + whole
        if whole:
            yield np.frombuffer(data[:whole], dtype="<i2").astype(np.int16)
        if given == size:
            break
    if not given:
        raise AudioError("standard input holds no samples; pipe 16-bit samples into it")


def _piped(file: BinaryIO, sample_rate: int | None) -> tuple[Iterator[np.ndarray], int]:
    """Blocks and rate of a pipe, whose first bytes tell whether a WAV header comes."""
    head = file.read(4)
    if head == b"RIFF":
        head += file.read(8)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return pcm(file, head), SAMPLE_RATE if sample_rate is None else sample_rate
    rate, size = _wav_header(file)
    if sample_rate not in (None, rate):
        raise InputError(
            f"sample_rate is {sample_rate}, and the WAV header on standard input says {rate}; "
            "leave it out"
        )
    return pcm(file, size=size), rate


def _wav_header(file: BinaryIO) -> tuple[int, int | None]:
    """(rate in Hz, bytes of samples or None: not known), up to the first sample."""
    rate = None
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"data" and rate is not None:
            return rate, size if 0 < size < _NO_SIZE else None
        if size > _MOST_HEADER_BYTES:
            break
        body = file.read(size + size % 2)
        if name == b"fmt " and len(body) >= 16:
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
            if kind == _EXTENSIBLE and len(body) >= 26:
                (kind,) = struct.unpack_from("<H", body, 24)
            if (kind, channels, bits) != (_PCM, 1, 16):
                raise AudioError(
                    f"standard input is WAV of {channels} channels and {bits} bits (format {kind});"
                    " pipe 16-bit mono, such as arecord -f S16_LE -c 1 makes"
                )
    raise AudioError(
        "standard input has a WAV header that is damaged, or ends within it; pipe 16-bit samples "
        "into it"
    )


def microphone(sample_rate: int) -> Iterator[np.ndarray]:
    """int16 blocks [n] from the default microphone until Ctrl-C.

    InputError, at once: sounddevice (extra `mic`) is missing. AudioError, with the first block or
    later: there is no such microphone, or it fails. That samples were lost is told once.
    """
    return _recorded(_sounddevice(), sample_rate)


def _recorded(sounddevice: Any, sample_rate: int) -> Iterator[np.ndarray]:
    lost = False
    try:
        with sounddevice.InputStream(sample_rate, channels=1, dtype="int16") as stream:
            while True:
                samples, overflowed = stream.read(round(BLOCK_S * sample_rate))
                if overflowed and not lost:
                    lost = True
                    logger.warning("the microphone was faster than we are: samples are lost")
                yield samples[:, 0].copy()
    except KeyboardInterrupt:
        return  # how one stops speaking to a machine
    except sounddevice.PortAudioError as error:
        raise AudioError(
            f"the microphone cannot be read at {sample_rate} Hz ({error}); plug one in, or try "
            "another sample rate"
        ) from error


def _sounddevice() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ImportError as error:
        raise InputError(
            "the microphone needs sounddevice; install it with pip install 'offramp[mic]'"
        ) from error
    except OSError as error:  # the package is there, the library under it is not
        raise InputError(
            f"sounddevice cannot be loaded ({error}); install PortAudio, such as libportaudio2"
        ) from error
