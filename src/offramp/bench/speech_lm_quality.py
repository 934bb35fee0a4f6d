"""Word error rates of a Speech-LM, with what each of its drafts takes, and whether all write alike.

Recordings are taken whole, as their manifest cuts them, in batches as `transcribe` makes them. All
ways of decoding take turns on each batch, encoder and CTC included, so every time is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.bench.arms import Progress
from offramp.bench.asr import AsrData
from offramp.bench.wer import (
    ErrorRate,
    as_reference,
    character_edits,
    error_rate,
    need_jiwer,
    word_edits,
)
from offramp.data.manifest import Utterance
from offramp.decoding.speech_lm import (
    BEAM_DRAFTS,
    PartTimes,
    SpeechLMOptions,
    SpeechText,
    available_drafts,
)
from offramp.errors import InputError
from offramp.results import DecoderCounts, ratio
from offramp.speech_lm_recognizer import SpeechLMRecognizer
from offramp.transcription import BATCH_SAMPLES, length_batches


@dataclass(frozen=True)
class WayQuality:
    """Of one way of decoding. differing: texts that are not those of draft `none` by the same
    search; None: it is that one itself. times: over `audio_s` seconds."""

    wer: ErrorRate
    cer: float | None
    differing: int | None
    counts: DecoderCounts
    times: PartTimes
    audio_s: float

    @property
    def calls_per_utterance(self) -> float | None:
        return ratio(self.counts.calls, self.wer.utterances)

    @property
    def rtf_split(self) -> dict[str, float | None]:
        """Time over audio time, by part."""
        parts = asdict(self.times)
        return {name.removesuffix("_s"): ratio(s, self.audio_s) for name, s in parts.items()}

    @property
    def rtf(self) -> float | None:
        return ratio(sum(asdict(self.times).values()), self.audio_s)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "wer": self.wer.rate,
            "wer_ci95": None if self.wer.ci95 is None else list(self.wer.ci95),
            "cer": self.cer,
            "identical": None if self.differing is None else self.differing == 0,
            "differing": self.differing,
            "decoder_calls_per_utterance": self.calls_per_utterance,
            "rtf": self.rtf,
            "rtf_split": self.rtf_split,
            **self.counts.to_dict(),
        }


@dataclass(frozen=True)
class SpeechLMQuality:
    """ways: by the name of their draft, `beam_` before those that search. left_out: utterances
    whose text has no single reading."""

    model: str
    data: str
    utterances: int
    words: int
    left_out: int
    ways: dict[str, WayQuality]

    @property
    def identical(self) -> bool:
        """Whether every draft wrote what plain decoding writes, everywhere."""
        return not any(way.differing for way in self.ways.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("model", "data", "utterances", "words", "left_out", "identical")
        ways = {name: way.to_dict() for name, way in self.ways.items()}
        return {name: getattr(self, name) for name in names} | {"drafts": ways}


# Samples [N_b] of a batch -> a text for each, and the time.
Way = Callable[[Sequence[Tensor]], tuple[list[SpeechText], PartTimes]]


@dataclass
class Tally:
    """What one way wrote, by utterance, and took over `audio_s` seconds: medians over rounds.
    unsteady: utterances that not every round wrote alike."""

    written: dict[int, SpeechText] = field(default_factory=dict)
    unsteady: set[int] = field(default_factory=set)
    times: PartTimes = field(default_factory=PartTimes)
    audio_s: float = 0.0

    @staticmethod
    def joined(parts: Sequence[tuple[Tally, int]]) -> Tally:
        """Those of several sets as one, each with its number of utterances."""
        made, before = Tally(), 0
        for part, utterances in parts:
            made.written |= {before + row: text for row, text in part.written.items()}
            made.unsteady |= {before + row for row in part.unsteady}
            made.times += part.times
            made.audio_s += part.audio_s
            before += utterances
        return made

    @property
    def counts(self) -> DecoderCounts:
        return DecoderCounts.total(text.counts for text in self.written.values())

    def texts(self, utterances: int) -> list[str]:
        """As references are. A recording too short for the encoder has none, and cost nothing."""
        texts = {row: text.text for row, text in self.written.items()}
        return [as_reference(texts.get(row, "")) for row in range(utterances)]

    def differing(self, plain: Tally) -> list[int]:
        """Utterances for which not every round of both wrote the same tokens to the same end."""
        pairs = {row: (text, plain.written[row]) for row, text in self.written.items()}
        parted = {row for row, pair in pairs.items() if len(set(map(_told, pair))) > 1}
        return sorted(parted | self.unsteady | plain.unsteady)

    def add(
        self, rows: Sequence[int], rounds: Sequence[tuple[list[SpeechText], PartTimes]]
    ) -> None:
        """One batch, decoded so many times."""
        every = zip(*(texts for texts, _ in rounds), strict=True)
        for row, texts in zip(rows, every, strict=True):
            self.written[row] = texts[0]
            if len(set(map(_told, texts))) > 1:
                self.unsteady.add(row)
        taken = zip(*(astuple(times) for _, times in rounds), strict=True)
        self.times += PartTimes(*map(statistics.median, taken))


def _told(text: SpeechText) -> tuple[tuple[int, ...], str]:
    return text.tokens, text.finish_reason


def run(
    model: str,
    data: AsrData,
    beam_size: int | None = None,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> SpeechLMQuality:
    """Every draft that the model has, greedily; with `beam_size` those that can draft for a beam
    too. InputError: an utterance is longer than the decoder has room for."""
    need_jiwer()
    recognizer = SpeechLMRecognizer.load(model, device=device)
    ways = as_ways(recognizer, draft_options(recognizer, beam_size))
    utterances, left_out = data.utterances()
    check_lengths(recognizer, utterances)
    batches = _rising(utterances)
    tallies = measure(recognizer, utterances, ways, batches, on_progress=on_progress)
    references = [u.text for u in utterances]
    return SpeechLMQuality(
        model=model,
        data=str(data.data),
        utterances=len(utterances),
        words=sum(len(reference.split()) for reference in references),
        left_out=left_out,
        ways={
            name: quality(tally, tallies[_plain(name)], references)
            for name, tally in tallies.items()
        },
    )


def measure(
    recognizer: SpeechLMRecognizer,
    utterances: Sequence[Utterance],
    ways: Mapping[str, Way],
    batches: Sequence[Sequence[int]],
    rounds: int = 1,
    on_progress: Progress | None = None,
) -> dict[str, Tally]:
    """Every way on every batch, `rounds` times, in turns; one unmeasured turn comes first.

    batches: which of `utterances` are decoded together.
    """
    tallies, names = {name: Tally() for name in ways}, list(ways)
    done, warm = 0, False
    for number, together in enumerate(batches):
        heard = {row: read_audio(utterances[row].path) for row in together}
        rows = [row for row in together if recognizer.reader.num_inputs(len(heard[row]))]
        samples = [heard[row] for row in rows]
        if rows and not warm:
            for name in names:
                ways[name](samples)
            warm = True
        made: dict[str, list[tuple[list[SpeechText], PartTimes]]] = {name: [] for name in names}
        for turn in range(rounds if rows else 0):
            first = (number + turn) % len(names)
            for name in names[first:] + names[:first]:
                made[name].append(ways[name](samples))
        for name in names if rows else ():
            tallies[name].add(rows, made[name])
            tallies[name].audio_s += sum(map(len, samples)) / SAMPLE_RATE
        done += len(together)
        if on_progress is not None:
            on_progress(done, len(utterances))
    return tallies


def _plain(name: str) -> str:
    """The way of decoding, without drafts, that writes what `name` has to write."""
    return "beam_none" if name.startswith("beam_") else "none"


def quality(tally: Tally, plain: Tally, references: Sequence[str]) -> WayQuality:
    written = tally.texts(len(references))
    return WayQuality(
        wer=error_rate(word_edits(references, written)),
        cer=error_rate(character_edits(references, written)).rate,
        differing=None if tally is plain else len(tally.differing(plain)),
        counts=tally.counts,
        times=tally.times,
        audio_s=tally.audio_s,
    )


def draft_options(
    recognizer: SpeechLMRecognizer, beam_size: int | None = None
) -> dict[str, SpeechLMOptions]:
    """Ways of decoding by name, plain ones first."""
    drafts = list(reversed(available_drafts(recognizer.model)))
    options = {str(draft): SpeechLMOptions(draft) for draft in drafts}
    if beam_size is not None:
        of_beam = [draft for draft in drafts if draft in BEAM_DRAFTS]
        options |= {f"beam_{d}": SpeechLMOptions(d, beam_size=beam_size) for d in of_beam}
    return options


def as_ways(
    recognizer: SpeechLMRecognizer, options: Mapping[str, SpeechLMOptions]
) -> dict[str, Way]:
    return {n: partial(recognizer.decode, plan=recognizer.plan(o)) for n, o in options.items()}


def check_lengths(recognizer: SpeechLMRecognizer, utterances: Sequence[Utterance]) -> None:
    """InputError: an utterance is longer than the decoder has room for."""
    longest = max(utterances, key=lambda u: u.seconds)
    if (limit := recognizer.longest_s(longest.seconds + 1)) < longest.seconds:
        raise InputError(
            f"{longest.path} lasts {longest.seconds:.1f} s, and the decoder's context holds "
            f"{limit:.1f} s of speech with its text; cut it (offramp transcribe cuts by itself)"
        )


def _rising(utterances: Sequence[Utterance]) -> list[list[int]]:
    """Batches as `transcribe` makes them, by rising length."""
    lengths = [max(1, round(SAMPLE_RATE * u.seconds)) for u in utterances]
    most = SpeechLMOptions().batch_size
    return [
        together[at : at + most]
        for together in length_batches(lengths, BATCH_SAMPLES)
        for at in range(0, len(together), most)
    ]
