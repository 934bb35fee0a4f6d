"""How long after it was said a word stands in a stream's text.

A stream's own `latency_ms` begins where the model wrote the newest word, so a model that writes a
second late shows nothing of it. Here the clock starts at the end of the word in the audio, as a CTC
recogniser finds it by forced alignment of the reference text: right to about a frame of 80 ms.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.data.manifest import Utterance
from offramp.decoding.ctc import aligned, words
from offramp.errors import InputError
from offramp.recognizer import Recognizer
from offramp.results import Word
from offramp.stream_events import Endpoint, Event, Final, Partial, ninetieth
from offramp.tokenizer import TextTokenizer

ALIGNER = "asr-tiny"


@dataclass(frozen=True)
class Recording:
    """samples [n] at 16 kHz. spoken: its words, with when they were said; empty: not known."""

    samples: Tensor
    spoken: tuple[Word, ...]


class Aligner:
    """Finds the words of a text in the audio that they were said in."""

    def __init__(self, model: str | Path = ALIGNER) -> None:
        """model: a CTC recogniser of ours, by shipped name or folder; see `Recognizer.load`."""
        self._recognizer = Recognizer.load(model)
        assert self._recognizer.folder is not None, "it was loaded"
        self._tokenizer = TextTokenizer.load(self._recognizer.folder / "tokenizer.json")

    def recording(self, utterance: Utterance) -> Recording:
        samples = read_audio(utterance.path)
        return Recording(samples, self.words(samples, utterance.text))

    @torch.no_grad()
    def words(self, samples: Tensor, text: str) -> tuple[Word, ...]:
        """Of `text` (normalised), as said in `samples` [n]; none if they are too short for it, or
        if the aligner cannot write it."""
        recognizer, config = self._recognizer, self._recognizer.config
        if not recognizer.reader.num_inputs(len(samples)):
            return ()
        encoder = recognizer.encoder
        state = encoder.run(encoder.embed(*recognizer.inputs([samples])), 0, config.exits[-1])
        log_probs = encoder.log_probs(state, config.exits[-1])[0]
        try:
            found = aligned(log_probs, self._tokenizer.encode(text), 0.0, config.blank_id)
        except InputError:
            return ()  # more text than frames
        lead_s, duration_s = recognizer.reader.first_frame_s, len(samples) / SAMPLE_RATE
        local = words(found, recognizer.pieces, recognizer.reader.frame_s, duration_s - lead_s)
        if [word.text for word in local] != text.split():
            return ()
        return tuple(
            Word(w.text, w.start_s + lead_s, w.end_s + lead_s, w.confidence) for w in local
        )


@dataclass(frozen=True)
class SpeechLatency:
    """From the end of a word in the audio to the moment since which the text has it, in ms.

    first_partial_ms: of a recording's first text, since the end of the first word that was said;
    below 0 where something was written before. median_ms, p90_ms: over the `words` that were
    recognised, counted each time that their recording was streamed. None where there are none.
    """

    first_partial_ms: float | None
    median_ms: float | None
    p90_ms: float | None
    words: int

    @classmethod
    def over(cls, streams: Sequence[tuple[Sequence[Event], Sequence[Word]]]) -> Self:
        """Of (what a stream said, the words of its recording), the first text's as a median."""
        firsts, waits = [], list[float]()
        for events, spoken in streams:
            texts = [event for event in events if not isinstance(event, Endpoint)]
            if texts and spoken:
                firsts.append(1000 * (_told_s(texts[0]) - spoken[0].end_s))
            waits += _waits_ms(events, spoken)
        first = statistics.median(firsts) if firsts else None
        if not waits:
            return cls(first, None, None, 0)
        return cls(first, statistics.median(waits), ninetieth(waits), len(waits))


def _waits_ms(events: Sequence[Event], spoken: Sequence[Word]) -> list[float]:
    """Of each word that was recognised."""
    written = standing(events)
    sides = ([word.text for word in spoken], [text for text, _ in written])
    same = SequenceMatcher(None, *sides, autojunk=False).get_matching_blocks()
    pairs = ((a + n, b + n) for a, b, size in same for n in range(size))
    return [1000 * (written[b][1] - spoken[a].end_s) for a, b in pairs]


def standing(events: Sequence[Event]) -> list[tuple[str, float]]:
    """Every word of the final texts, with the second since which the text had it for good."""
    found, texts = list[tuple[str, float]](), list[Partial | Final]()
    for event in events:
        if isinstance(event, Endpoint):
            continue
        texts.append(event)
        if isinstance(event, Final):
            numbered = enumerate(event.words)
            found += [(word.text, _told_s(_since(texts, n))) for n, word in numbered]
            texts = []
    return found


def _since(texts: Sequence[Partial | Final], n: int) -> Partial | Final:
    """The first of an utterance's texts since which word `n` is as in the last one."""
    first = texts[-1]
    for text in reversed(texts):
        if len(text.words) <= n or text.words[n].text != texts[-1].words[n].text:
            break
        first = text
    return first


def _told_s(text: Partial | Final) -> float:
    """Seconds from the start of the audio to the moment that `text` came."""
    return text.end_s + text.latency_ms / 1000
