"""Sound as it comes in: a microphone, samples through a pipe, a recording block by block."""

from __future__ import annotations

import importlib
import logging
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


def open_source(
    source: Source | None, mic: bool = False, sample_rate: int | None = None
) -> tuple[Iterable[Tensor | np.ndarray], int]:
    """(blocks of mono samples, their rate in Hz); the audio is opened with the first block.

    source: a path or binary file object of a recording; "-" for 16-bit samples (PCM, mono, little
    end first) from standard input at `sample_rate`, 16 kHz if None; or None with `mic`.
    InputError: none of these, or several.
    """
    if mic == (source is not None):
        raise InputError('give either a recording, or "-" for standard input, or the microphone')
    if mic:
        return microphone(sample_rate or SAMPLE_RATE), sample_rate or SAMPLE_RATE
    if source == "-":
        if sys.stdin is None:  # as Python has it where the shell closed it
            raise AudioError("standard input is closed; pipe 16-bit samples into it")
        return pcm(sys.stdin.buffer), sample_rate or SAMPLE_RATE
    if sample_rate is not None:
        raise InputError(
            f"sample_rate is {sample_rate}, and a recording says itself what it has; leave it out"
        )
    assert source is not None
    return stream_audio(source, block_s=BLOCK_S), SAMPLE_RATE


def pcm(file: BinaryIO) -> Iterator[np.ndarray]:
    """int16 blocks [n] of what `file` holds, as soon as it is there.

    Half a sample at the end, where a writer was cut off, is none.
    """
    read = getattr(file, "read1", file.read)  # what there is, rather than all that was asked for
    rest = b""
    while data := read(_PIPE_BYTES):
        data = rest + data
        whole = len(data) - len(data) % 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], dtype="<i2").astype(np.int16)


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
