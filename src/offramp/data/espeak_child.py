"""The program that `synthetic.py` runs in a process of its own: espeak-ng on a pipe.

espeak-ng is not thread-safe, and what it says depends on all that it said before (phases, random
numbers). So every utterance is spoken in a fork of a process that has only started the library:
equal requests give equal samples, and a crash costs one utterance. Standard library only, and no
import of ours, because it is started as `python -I -S espeak_child.py LIBRARY [DATA]`.

Requests are lines of JSON. A reply is two int32, a number and a size in bytes, and that many
bytes: a sampling rate and int16 samples, or an error code below 0 and nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from typing import Any

REPLY = struct.Struct("<ii")
NO_LIBRARY, NO_VOICE, NOT_SPOKEN = -1, -2, -3

# From espeak-ng's public header, speak_lib.h.
_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8 = 2, 0x8000, 1
_PARAMETERS = {"rate": 1, "volume": 2, "pitch": 3, "pitch_range": 4, "word_gap": 7}
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Speaking:
    """The library, started once; `speak` is meant to be called once per process."""

    def __init__(self, library: str, data: str | None) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        path = None if data is None else os.fsencode(data)
        self.rate: int = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, path, _DO_NOT_EXIT)
        self._parts: list[bytes] = []
        self._callback = _CALLBACK(self._take)  # kept: the library only borrows it
        self._lib.espeak_SetSynthCallback(self._callback)
        self._seed()

    def version(self) -> str:
        info = self._lib.espeak_Info
        info.restype, info.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        text: bytes = info(None)
        return text.decode()

    def _seed(self) -> None:
        """The library seeds its random numbers, used for breath, by the clock: not for us."""
        try:
            seed = self._lib.espeak_ng_SetRandSeed  # from version 1.52
        except AttributeError:
            ctypes.CDLL(None).srand(1)
        else:
            seed(ctypes.c_long(1))

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if count > 0:
            self._parts.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def speak(self, request: dict[str, Any]) -> tuple[int, bytes]:
        """(rate, int16 samples) or (error code, nothing)."""
        if self._lib.espeak_SetVoiceByName(request["voice"].encode()) != 0:
            return NO_VOICE, b""
        for name, number in _PARAMETERS.items():
            self._lib.espeak_SetParameter(number, request[name], 0)
        text = request["text"].encode()
        if self._lib.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None) != 0:
            return NOT_SPOKEN, b""
        self._lib.espeak_Synchronize()
        return self.rate, b"".join(self._parts)


def write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def main(library: str, data: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us; we end with them
    replies = os.dup(1)
    os.dup2(2, 1)  # what the library prints must not get among the replies
    try:
        speaking = Speaking(library, data)
    except OSError:
        write_all(replies, REPLY.pack(NO_LIBRARY, 0))
        return
    if speaking.rate <= 0:
        write_all(replies, REPLY.pack(NO_LIBRARY, 0))
        return
    version = speaking.version().encode()
    write_all(replies, REPLY.pack(speaking.rate, len(version)) + version)
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            rate, samples = speaking.speak(json.loads(line))
            write_all(replies, REPLY.pack(rate, len(samples)) + samples)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:  # it broke before the reply, which it writes last
            write_all(replies, REPLY.pack(NOT_SPOKEN, 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
