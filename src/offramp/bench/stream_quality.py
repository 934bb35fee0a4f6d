"""Word error rates of a streaming recogniser by chunk size, with what its streams take.

All recordings are heard at once, which writes what their streams write, only sooner. That this
is so is looked at: a sample is really streamed, its texts are compared, and its time and latency
are the measured ones, latency from the end of a word in the audio (speech_latency.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.bench.arms import Progress
from offramp.bench.asr import AsrData
from offramp.bench.speech_latency import ALIGNER, Aligner, Recording
from offramp.bench.stream_timing import Timing, one_thread, spread, streamed, timings
from offramp.bench.wer import (
    ErrorRate,
    as_reference,
    character_edits,
    error_rate,
    need_jiwer,
    word_edits,
)
from offramp.config import check_counts
from offramp.data.manifest import Utterance
from offramp.decoding.speech_stream import Stream
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.errors import InputError
from offramp.stream_events import Final
from offramp.streaming import StreamingRecognizer


@dataclass(frozen=True)
class StreamQualityOptions:
    """chunk_ms: sizes to compare, each once; none: the model's own. stream: all else of it.
    streamed: recordings that are really streamed, of all lengths; rounds: how often each.
    aligner: the CTC recogniser that says when their words were said."""

    chunk_ms: tuple[float, ...] = ()
    stream: StreamOptions = field(default_factory=StreamOptions)
    streamed: int = 8
    rounds: int = 3
    aligner: str = ALIGNER

    def __post_init__(self) -> None:
        check_counts(1, streamed=self.streamed, rounds=self.rounds)
        if len(set(self.chunk_ms)) < len(self.chunk_ms):
            raise InputError(f"chunk_ms are {self.chunk_ms}; give each once")

    def by_chunk(self, recognizer: StreamingRecognizer) -> dict[float, StreamPlan]:
        """Chunk size in ms -> how it is streamed. InputError: the model has no such chunks."""
        plans = [
            StreamPlan(recognizer.model, recognizer.pieces, replace(self.stream, chunk_ms=size))
            for size in self.chunk_ms or (self.stream.chunk_ms,)
        ]
        return {1000 * plan.chunking.chunk * plan.frame_s: plan for plan in plans}


@dataclass(frozen=True)
class ChunkQuality:
    """Of one chunk size. identical: of the streamed recordings, those whose text is the one that
    hearing them at once gives."""

    wer: ErrorRate
    cer: float | None
    identical: int
    timing: Timing

    def to_dict(self) -> dict[str, Any]:
        return {
            "wer": self.wer.rate,
            "wer_ci95": None if self.wer.ci95 is None else list(self.wer.ci95),
            "cer": self.cer,
            "identical": self.identical,
            "latency_ms": asdict(self.timing.after_speech),
            "wait_after_emission_ms": asdict(self.timing.after_emission),
            "rtf": self.timing.rtf,
        }


@dataclass(frozen=True)
class StreamQuality:
    """chunks: by size in ms. streamed: how many recordings were. left_out: utterances whose text
    has no single reading."""

    model: str
    data: str
    utterances: int
    words: int
    left_out: int
    streamed: int
    chunks: dict[float, ChunkQuality]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {f"{size:g}": made.to_dict() for size, made in self.chunks.items()}
        names = ("model", "data", "utterances", "words", "left_out", "streamed")
        return {name: getattr(self, name) for name in names} | {"chunk_ms": rows}


def run(
    model: str,
    data: AsrData,
    options: StreamQualityOptions = StreamQualityOptions(),
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> StreamQuality:
    """on_progress hears of chunk sizes whose texts are written, then of rounds of streaming."""
    need_jiwer()
    recognizer = StreamingRecognizer.load(model, device=device)
    plans, aligner = options.by_chunk(recognizer), Aligner(options.aligner)
    utterances, left_out = data.utterances()
    references = [u.text for u in utterances]
    tell = on_progress or (lambda done, total: None)
    total = len(plans) + options.rounds
    written: dict[float, list[str]] = {}
    for size, plan in plans.items():
        written[size] = _texts(plan, utterances)
        tell(len(written), total)
    sample = [aligner.recording(u) for u in spread(utterances, options.streamed)]
    times = timings(
        {f"{size}": partial(Stream, plan, SAMPLE_RATE) for size, plan in plans.items()},
        sample,
        options.rounds,
        lambda done, _: tell(len(plans) + done, total),
    )
    found = {
        size: ChunkQuality(
            error_rate(word_edits(references, texts)),
            error_rate(character_edits(references, texts)).rate,
            _identical(plans[size], sample),
            times[f"{size}"],
        )
        for size, texts in written.items()
    }
    words = sum(len(text.split()) for text in references)
    counts = (len(utterances), words, left_out, len(sample))
    return StreamQuality(model, str(data.data), *counts, found)


def _texts(plan: StreamPlan, utterances: Sequence[Utterance]) -> list[str]:
    """Normalised as references are."""
    return [as_reference(plan.read_whole(read_audio(u.path))) for u in utterances]


def _identical(plan: StreamPlan, sample: Sequence[Recording]) -> int:
    """How many of `sample` a stream writes as they are written at once."""
    same = 0
    with one_thread():
        for recording in sample:
            events = streamed(Stream(plan, SAMPLE_RATE), recording.samples)
            said = " ".join(event.text for event in events if isinstance(event, Final))
            same += said == plan.read_whole(recording.samples)
    return same
