"""Cut hours of sound into segments of speech, in bounded memory, with exact times.

A detector gives a probability of speech per window of 32 ms: Silero VAD where it is installed,
else the loudness alone, which takes all that is neither silent nor steady for speech; that is
said once. Above them is one state machine: speech starts above one threshold and ends when the
probability has stayed below a lower one; too long a segment is cut where it is quietest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.audio.loudness import Loudness
from offramp.audio.silero import WINDOW, Silero, silero_path
from offramp.config import check_positive, check_range
from offramp.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

WINDOW_S = WINDOW / SAMPLE_RATE
_AT_ONCE = 128  # windows, 4 s: fixed, so that results do not depend on how the input is cut
_DETECTORS = ("auto", "silero", "energy")


class Detector(Protocol):
    """Windows in, probabilities of speech out: one for each, in order, if perhaps later."""

    def push(self, windows: Tensor) -> Tensor:
        """windows [n, 512], n > 0, which follow those before -> [m], of the next m windows."""
        ...

    def finish(self) -> Tensor:
        """Of the windows that it still holds back."""
        ...


@dataclass(frozen=True)
class VadOptions:
    """Durations in seconds. threshold: speech starts at it; it ends below `exit_threshold`.

    min_speech_s: shorter is no speech. min_silence_s: shorter does not end speech. padding_s:
    kept on both sides. max_segment_s: of a segment, padding included. silence_db: below this
    level (of a full-scale square wave) the energy detector sees silence. detector: `auto` is
    Silero if it is installed, else energy.
    """

    threshold: float = 0.5
    exit_threshold: float = 0.35
    min_speech_s: float = 0.1
    min_silence_s: float = 0.5
    padding_s: float = 0.2
    max_segment_s: float = 20.0
    silence_db: float = -70.0
    detector: Literal["auto", "silero", "energy"] = "auto"

    def __post_init__(self) -> None:
        check_range(0.0, 1.0, threshold=self.threshold, exit_threshold=self.exit_threshold)
        check_range(0.0, min_speech_s=self.min_speech_s, padding_s=self.padding_s)
        check_positive(min_silence_s=self.min_silence_s, max_segment_s=self.max_segment_s)
        if self.exit_threshold > self.threshold:
            raise ConfigError(
                f"exit_threshold is {self.exit_threshold}; it must be at most threshold, "
                f"{self.threshold}"
            )
        if self.padding_s > self.min_silence_s:
            raise ConfigError(
                f"padding_s is {self.padding_s}; it must be at most min_silence_s, "
                f"{self.min_silence_s}, so that segments do not overlap"
            )
        if self.max_segment_s < 2 * self.padding_s + 1:
            raise ConfigError(
                f"max_segment_s is {self.max_segment_s}; it must be at least a second more than "
                f"the padding on both sides, {2 * self.padding_s}"
            )
        check_range(-150, 0, silence_db=self.silence_db)
        if self.detector not in _DETECTORS:
            raise ConfigError(
                f"detector is {self.detector!r}; it must be one of {', '.join(_DETECTORS)}"
            )


@dataclass(frozen=True)
class Segment:
    """A stretch of the input: `samples` [N] at 16 kHz, of which the first was number `start`."""

    start: int
    samples: Tensor

    @property
    def start_s(self) -> float:
        return self.start / SAMPLE_RATE

    @property
    def end_s(self) -> float:
        return (self.start + len(self.samples)) / SAMPLE_RATE


def find_speech(blocks: Iterable[Tensor], options: VadOptions | None = None) -> Iterator[Segment]:
    """The segments of speech in `blocks` (samples [n] each, mono, 16 kHz), in order.

    They do not overlap, and their samples are the input's. How the input is cut into blocks does
    not matter. Memory: two blocks and one segment.
    """
    options = options or VadOptions()
    detector, tracker = _detector(options), _Tracker(options)
    held, first = torch.zeros(0), 0  # input that a segment may still need, and its first number
    for samples, probabilities in _told(_recut(blocks, _AT_ONCE * WINDOW), detector):
        held = torch.cat([held, samples])
        told = held[tracker.now * WINDOW - first :][: len(probabilities) * WINDOW]
        levels = _windows(told).square().mean(dim=1)
        for probability, level in zip(probabilities.tolist(), levels.tolist(), strict=True):
            if (span := tracker.push(probability, level)) is not None:
                yield _segment(held, first, *span)
        keep = min(tracker.needed * WINDOW - first, len(held))
        held, first = held[keep:].clone(), first + keep
    if (span := tracker.finish()) is not None:
        yield _segment(held, first, *span)


def _told(blocks: Iterable[Tensor], detector: Detector) -> Iterator[tuple[Tensor, Tensor]]:
    """(a block, the probabilities that are known with it), and without a block those left."""
    for samples in blocks:
        yield samples, detector.push(_windows(samples))
    yield torch.zeros(0), detector.finish()


def _windows(samples: Tensor) -> Tensor:
    """[N] -> [n, 512], the last one filled up with zeros."""
    return F.pad(samples, (0, -len(samples) % WINDOW)).view(-1, WINDOW)


def _segment(held: Tensor, first: int, start: int, end: int) -> Segment:
    """Windows `start` to `end`; only the very last window may be cut short by the input's end."""
    begin = start * WINDOW - first
    assert begin >= 0, "input that a segment needs was let go"
    return Segment(start * WINDOW, held[begin : end * WINDOW - first].clone())


def _recut(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same samples in blocks of `size`, the last one shorter."""
    waiting: list[Tensor] = []
    count = 0
    for block in blocks:
        for piece in torch.split(block.float(), size):
            waiting.append(piece)
            count += len(piece)
            if count >= size:
                whole = torch.cat(waiting)
                yield whole[:size]
                waiting, count = [whole[size:]], count - size
    if count:
        yield torch.cat(waiting)


@dataclass
class _Open:
    """A span of which the end is not known yet. All numbers are of windows.

    start: with padding. speech: where speech began; `levels` are from there on. quiet: since when
    it may have ended.
    """

    start: int
    speech: int
    min_speech: int
    quiet: int | None = None
    levels: list[float] = field(default_factory=list)


class _Tracker:
    """Windows in, spans of speech out: (first window, window after the last), padded."""

    def __init__(self, options: VadOptions) -> None:
        self._options = options
        self._min_speech = math.ceil(options.min_speech_s / WINDOW_S)
        self._min_silence = math.ceil(options.min_silence_s / WINDOW_S)
        self._padding = math.ceil(options.padding_s / WINDOW_S)
        self._longest = math.floor(options.max_segment_s / WINDOW_S) - self._padding
        self.now = 0  # windows seen
        self._given = 0  # where the last span ended: spans do not overlap
        self._open: _Open | None = None

    @property
    def needed(self) -> int:
        """The first window that a coming span may hold."""
        if self._open is not None:
            return self._open.start
        return max(self._given, self.now - self._padding)

    def push(self, probability: float, level: float) -> tuple[int, int] | None:
        """Takes one window; gives the span that it completes, if any. level: mean square."""
        at, self.now = self.now, self.now + 1
        if self._open is None:
            if probability < self._options.threshold:
                return None
            self._open = _Open(max(self._given, at - self._padding), at, self._min_speech)
        span = self._open
        span.levels.append(level)
        if probability >= self._options.exit_threshold:
            span.quiet = None
        elif span.quiet is None:
            span.quiet = at
        if span.quiet is not None and self.now - span.quiet >= self._min_silence:
            return self.finish()
        return self._cut(span) if self.now - span.start >= self._longest else None

    def finish(self) -> tuple[int, int] | None:
        """The span that ends here, if one is open and long enough."""
        span, self._open = self._open, None
        if span is None:
            return None
        end = self.now if span.quiet is None else span.quiet
        if end - span.speech < span.min_speech:
            return None
        self._given = min(end + self._padding, self.now)
        return span.start, self._given

    def _cut(self, span: _Open) -> tuple[int, int]:
        """The open span up to the quietest window of its last third; the rest stays open."""
        first = max(span.speech + 1, self.now - (self.now - span.start) // 3)
        smooth = [
            sum(span.levels[i - 1 : i + 2])
            for i in range(first - span.speech, len(span.levels) - 1)
        ]
        cut = first + min(range(len(smooth)), key=smooth.__getitem__)
        self._given = cut
        quiet = None if span.quiet is None else max(span.quiet, cut)
        # What goes on is part of speech already: any window of it counts.
        self._open = _Open(cut, cut, 1, quiet, span.levels[cut - span.speech :])
        return span.start, cut


def _detector(options: VadOptions) -> Detector:
    path = None if options.detector == "energy" else silero_path()
    if path is not None:
        return Silero(path)
    if options.detector == "silero":
        raise InputError(
            "the detector silero needs the package silero-vad; install it with "
            "pip install 'offramp[vad]', or choose the detector energy"
        )
    if options.detector == "auto":
        _say_that_silero_is_absent()
    return Loudness(options.silence_db)


@cache
def _say_that_silero_is_absent() -> None:
    """Once per process."""
    logger.warning(
        "silero-vad is not installed: all that is neither silent nor steady is taken for speech; "
        "for speech detection: pip install 'offramp[vad]'"
    )
