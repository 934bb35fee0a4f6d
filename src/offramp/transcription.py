"""One recording on its way to a transcript: speech is found, and written a few segments at a time.

What writes it, a CTC encoder or a Speech-LM, is a `Writer`. Hours of audio go through in bounded
memory, and segments come as soon as they are written; where nobody speaks nothing is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, Source, stream_audio
from offramp.audio.reader import Reader
from offramp.audio.vad import Segment, VadOptions, find_speech
from offramp.data.batching import pack
from offramp.errors import InputError
from offramp.results import RunDecoding, Transcript, TranscriptSegment, Word

BATCH_SAMPLES = 40 * SAMPLE_RATE  # of a batch, padding included


class Writer(Protocol):
    """What writes the segments of one recording.

    vad: how they are found. batch_size: segments that are read ahead and given together. reader:
    of the encoder; a segment too short for it is left out.
    """

    @property
    def vad(self) -> VadOptions: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def reader(self) -> Reader: ...

    def write(self, batch: Sequence[Segment]) -> list[TranscriptSegment]:
        """Segments of like length, at least one, each as it stands in the recording."""
        ...

    def decoding(self) -> RunDecoding | None:
        """What a decoder did until now; None: none is at work."""
        ...


class Transcription:
    """One run: an iterator of segments that knows the transcript when it has ended."""

    def __init__(self, source: Source, writer: Writer) -> None:
        """InputError: `source` is no path, "-" or binary file."""
        if not isinstance(source, str | Path) and not callable(getattr(source, "read", None)):
            raise InputError(
                f"the recording is a value of type {type(source).__name__}; give a path, "
                '"-" for standard input, or a binary file'
            )
        self._writer = writer
        self._segments: list[TranscriptSegment] = []
        self._samples, self._seconds, self._ended = 0, 0.0, False
        self._steps = self._timed(source)

    def __iter__(self) -> Iterator[TranscriptSegment]:
        return self._steps

    @property
    def transcript(self) -> Transcript:
        """InputError while the run has not ended."""
        if not self._ended:
            raise InputError("the run has not ended; iterate over it first")
        audio_s, decoding = self._samples / SAMPLE_RATE, self._writer.decoding()
        return Transcript(tuple(self._segments), audio_s, self._seconds, decoding)

    def complete(self) -> Transcript:
        """Go to the end."""
        for _ in self:
            pass
        return self.transcript

    def _timed(self, source: Source) -> Iterator[TranscriptSegment]:
        """The segments, with the time of our work (not of whoever consumes them)."""
        found = self._transcribed(source)
        while True:
            began = time.perf_counter()
            segment = next(found, None)
            self._seconds += time.perf_counter() - began
            if segment is None:
                self._ended = True
                return
            self._segments.append(segment)
            yield segment

    def _transcribed(self, source: Source) -> Iterator[TranscriptSegment]:
        reader = self._writer.reader
        spoken = find_speech(self._counted(stream_audio(source)), self._writer.vad)
        long_enough = (s for s in spoken if reader.num_inputs(len(s.samples)))
        while group := list(islice(long_enough, self._writer.batch_size)):
            yield from self._group(group)

    def _counted(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            self._samples += len(block)
            yield block

    def _group(self, group: Sequence[Segment]) -> list[TranscriptSegment]:
        """Segments in their own order, however they are batched."""
        found: dict[int, TranscriptSegment] = {}
        for rows in length_batches([len(s.samples) for s in group], BATCH_SAMPLES):
            written = self._writer.write([group[row] for row in rows])
            found.update(zip(rows, written, strict=True))
        return [found[row] for row in range(len(group))]


def length_batches(frames: Sequence[int], batch_frames: int) -> list[list[int]]:
    """Rows by rising length, together while they fit `batch_frames` with padding."""
    rows = sorted(range(len(frames)), key=frames.__getitem__)
    return [[rows[i] for i in batch] for batch in pack([frames[r] for r in rows], batch_frames)]


def heard_s(segment: Segment, reader: Reader) -> float:
    """Seconds of `segment` from what the tower's first frame hears to the end."""
    return len(segment.samples) / SAMPLE_RATE - _lead_s(segment, reader)


def placed(words: Iterable[Word], segment: Segment, reader: Reader) -> tuple[Word, ...]:
    """Words with times from the tower's first frame on, with those of the recording."""
    start_s, end_s = segment.start_s + _lead_s(segment, reader), segment.end_s
    # Adding the start may round a time past the end.
    return tuple(
        Word(
            word.text,
            min(start_s + word.start_s, end_s),
            min(start_s + word.end_s, end_s),
            word.confidence,
        )
        for word in words
    )


def _lead_s(segment: Segment, reader: Reader) -> float:
    return min(reader.first_frame_s, len(segment.samples) / SAMPLE_RATE)
