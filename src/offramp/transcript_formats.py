"""A transcript as a file: plain text, subtitles (SRT, WebVTT), a table (TSV) or JSON.

A segment of speech may last 20 s, too long to read as one subtitle, so SRT, VTT and TSV cut it
between words into cues of at most two lines. Times are whole milliseconds, rounded down: they
never lie beyond the audio.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from offramp.results import Transcript, Word

_CUE_CHARS = 84  # two lines of 42, which television takes for readable
_CUE_S = 7.0
_PAUSE_S = 1.0  # so long a silence starts a new cue
_HOLD_S = 0.5  # a cue stays this long after its last word, unless the next one comes
_VTT_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True)
class Cue:
    """What is shown at once, and from when to when, in seconds."""

    start_s: float
    end_s: float
    text: str


def cues(transcript: Transcript) -> list[Cue]:
    """Cues in order, none overlapping the next, each inside its segment.

    A text whose words have no times is one cue.
    """
    found: list[Cue] = []
    for segment in transcript.segments:
        if segment.text and not segment.words:
            found.append(Cue(segment.start_s, segment.end_s, segment.text))
        groups = list(_groups(segment.words))
        starts = [group[0].start_s for group in groups] + [segment.end_s]
        for group, following in zip(groups, starts[1:], strict=True):
            end_s = min(group[-1].end_s + _HOLD_S, following)
            text = " ".join(word.text for word in group)
            found.append(Cue(group[0].start_s, max(group[0].start_s, end_s), text))
    return found


def to_txt(transcript: Transcript) -> str:
    """A line per segment that has text."""
    return "".join(f"{s.text}\n" for s in transcript.segments if s.text)


def to_srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    return "".join(
        f"{n}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{cue.text}\n\n"
        for n, cue in enumerate(cues(transcript), start=1)
    )


def to_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles (W3C), with `&`, `<` and `>` escaped."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n"
        f"{cue.text.translate(_VTT_ESCAPES)}\n\n"
        for cue in cues(transcript)
    )


def to_tsv(transcript: Transcript) -> str:
    """start and end in milliseconds, text; below a header line."""
    return "start\tend\ttext\n" + "".join(
        f"{_milliseconds(c.start_s)}\t{_milliseconds(c.end_s)}\t{c.text}\n"
        for c in cues(transcript)
    )


def to_json(transcript: Transcript) -> str:
    """All there is (`Transcript.to_dict`), indented."""
    return json.dumps(transcript.to_dict(), indent=2, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": to_txt,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
    "json": to_json,
}


def _groups(words: Sequence[Word]) -> Iterator[list[Word]]:
    """The words of each cue: as many as fit, up to a pause."""
    group: list[Word] = []
    for word in words:
        if group:
            chars = sum(len(w.text) + 1 for w in group) + len(word.text)
            full = chars > _CUE_CHARS or word.end_s - group[0].start_s > _CUE_S
            if full or word.start_s - group[-1].end_s > _PAUSE_S:
                yield group
                group = []
        group.append(word)
    if group:
        yield group


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000 + 1e-6)  # 0.57 * 1000 is a little less than 570


def _clock(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds after `point`."""
    minutes, ms = divmod(_milliseconds(seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}{point}{ms % 1000:03}"
