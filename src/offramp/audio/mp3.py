"""How long an MP3 file really is: its frames are counted, because its header may be wrong.

An MP3 file is a row of frames, each with a header of four bytes (ISO/IEC 11172-3 section 2.4.1.3
and 13818-3). Its length is written nowhere, or in a first frame (Xing) that stays as it was when
files are joined or cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

# kbit/s by the header's index, for layer 3 of MPEG-1 and of MPEG-2 and 2.5; 0 and 15 are none.
_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_SLACK_FRAMES = 5  # the Xing frame, and what encoders put before and after the sound


@dataclass(frozen=True)
class Frames:
    """samples: per channel, in all frames. slack: by how many the decoder's length may differ.

    declared: a first frame says how long the file is; else the decoder guesses.
    """

    samples: int
    slack: int
    declared: bool


def count_frames(raw: BinaryIO) -> Frames | None:
    """All layer 3 frames; None where there are none. Moves the position in `raw`."""
    at = frames = each = 0
    kind: tuple[int, int] | None = None  # samples per frame and rate, the same all along
    in_row = declared = False
    while len(head := _bytes_at(raw, at, 10)) >= 4:
        found = _frame(head)
        good = found is not None and kind in (None, found[1:])
        if found is not None and good and not in_row:
            # Two bytes of something else may look like a frame; two frames in a row hardly do.
            after = _frame(_bytes_at(raw, at + found[0], 10))
            good = after is not None and after[1:] == found[1:]
        in_row = good
        if found is not None and good:
            if not frames:
                first = _bytes_at(raw, at, found[0])
                declared = any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
            at, frames, each, kind = at + found[0], frames + 1, found[1], found[1:]
        else:
            at += _tag_bytes(head) or 1
    if not frames:
        return None
    return Frames(frames * each, (_SLACK_FRAMES if declared else 1) * each, declared)


def _bytes_at(raw: BinaryIO, at: int, count: int) -> bytes:
    raw.seek(at)
    return raw.read(count)


def _frame(head: bytes) -> tuple[int, int, int] | None:
    """(bytes, samples, rate) of the layer 3 frame that begins so; None where none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    version, kbits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version not in _RATES or kbits in (0, 15) or rate == 3:
        return None
    hertz, first = _RATES[version][rate], version == 3
    kbit_s = (_KBITS_1 if first else _KBITS_2)[kbits]
    samples = 1152 if first else 576
    return samples // 8 * 1000 * kbit_s // hertz + (head[2] >> 1 & 1), samples, hertz


def _tag_bytes(head: bytes) -> int:
    """Bytes of the ID3v2 tag that begins so, which may hold a picture; 0 where none does."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    return 10 + sum(
        (byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)
    )
