"""How long streams take: recordings as they would come in, on one thread, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.audio.live import BLOCK_S
from offramp.bench.arms import Progress
from offramp.bench.speech_latency import Recording, SpeechLatency
from offramp.data.manifest import Utterance
from offramp.decoding.speech_stream import Stream
from offramp.results import Word
from offramp.stream_events import Event, Latency


@dataclass(frozen=True)
class Timing:
    """Measured. rtf: CPU seconds of one thread per second of audio. after_speech: from the end of
    words in the audio; after_emission: from where the model wrote them, as streams tell it; both
    until the text had them. The latter are medians over recordings."""

    rtf: float
    after_speech: SpeechLatency
    after_emission: Latency


def spread(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """Up to `count` of them, from short to long."""
    ordered = sorted(utterances, key=lambda u: u.seconds)
    count = min(count, len(ordered))
    return [ordered[(2 * n + 1) * len(ordered) // (2 * count)] for n in range(count)]


def timings(
    arms: Mapping[str, Callable[[], Stream]],
    recordings: Sequence[Recording],
    rounds: int,
    on_progress: Progress | None = None,
) -> dict[str, Timing]:
    """Every arm, which opens streams, on every recording, `rounds` times, in turns, on one thread.

    Process time, which waiting for a busy machine does not add to; of each recording the median
    over rounds. One unmeasured round comes first.
    """
    names = list(arms)
    seconds: dict[str, list[list[float]]] = {n: [[] for _ in recordings] for n in names}
    said: dict[str, list[tuple[list[Event], tuple[Word, ...]]]] = {n: [] for n in names}
    with one_thread():
        for turn in range(rounds + 1):
            for number, recording in enumerate(recordings):
                first = (turn + number) % len(names)
                for name in names[first:] + names[:first]:
                    began = time.process_time()
                    events = streamed(arms[name](), recording.samples)
                    if turn:
                        seconds[name][number].append(time.process_time() - began)
                        said[name].append((events, recording.spoken))
            if turn and on_progress is not None:
                on_progress(turn, rounds)
    audio_s = sum(len(recording.samples) for recording in recordings) / SAMPLE_RATE
    return {
        name: Timing(
            sum(map(statistics.median, seconds[name])) / audio_s,
            SpeechLatency.over(said[name]),
            _median([Latency.of(events) for events, _ in said[name]]),
        )
        for name in names
    }


def streamed(stream: Stream, samples: Tensor) -> list[Event]:
    """What was said in a recording that comes in block by block."""
    events = list[Event]()
    for block in torch.split(samples, round(BLOCK_S * SAMPLE_RATE)):
        events += stream.push(block)
    return events + stream.finish()


def _median(found: Sequence[Latency]) -> Latency:
    """Of each figure, over those recordings in which something was said."""

    def over(values: Iterator[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return Latency(
        over(latency.first_partial_ms for latency in found),
        over(latency.median_ms for latency in found),
        over(latency.p90_ms for latency in found),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread in this scope."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
