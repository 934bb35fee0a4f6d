"""Word error rates of a Speech-LM, with what each of its drafts takes, and whether all write alike.

Recordings are taken whole, as their manifest cuts them, in batches as `transcribe` makes them. All
ways of decoding take turns on each batch, encoder and CTC included, so every time is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
    SpeechLMPlan,
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


@dataclass
class _Tally:
    """What one way wrote, by utterance, and took."""

    texts: dict[int, str] = field(default_factory=dict)
    counts: DecoderCounts = field(default_factory=DecoderCounts)
    times: PartTimes = field(default_factory=PartTimes)

    def add(self, rows: Sequence[int], texts: Sequence[SpeechText], times: PartTimes) -> None:
        self.texts.update(zip(rows, (text.text for text in texts), strict=True))
        self.counts = DecoderCounts.total([self.counts, *(text.counts for text in texts)])
        self.times += times


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
    plans = _plans(recognizer, beam_size)
    utterances, left_out = data.utterances()
    _check_lengths(recognizer, utterances)
    tallies = {name: _Tally() for name in plans}
    audio_s, done, names = 0.0, 0, list(plans)
    for number, (rows, samples) in enumerate(_batches(recognizer, utterances)):
        if number == 0:
            recognizer.decode(samples, plans["none"])  # the first run is slower than all others
        audio_s += sum(map(len, samples)) / SAMPLE_RATE
        first = number % len(names)
        for name in names[first:] + names[:first]:
            tallies[name].add(rows, *recognizer.decode(samples, plans[name]))
        done += len(rows)
        if on_progress is not None:
            on_progress(done, len(utterances))
    references = [u.text for u in utterances]
    return SpeechLMQuality(
        model=model,
        data=str(data.data),
        utterances=len(utterances),
        words=sum(len(reference.split()) for reference in references),
        left_out=left_out,
        ways={
            name: _quality(tally, tallies[_plain(name)], references, audio_s)
            for name, tally in tallies.items()
        },
    )


def _plain(name: str) -> str:
    """The way of decoding, without drafts, that writes what `name` has to write."""
    return "beam_none" if name.startswith("beam_") else "none"


def _quality(tally: _Tally, plain: _Tally, references: Sequence[str], audio_s: float) -> WayQuality:
    # A recording too short for the encoder has no text, and cost nothing.
    written = [as_reference(tally.texts.get(row, "")) for row in range(len(references))]
    differing = sum(text != plain.texts[row] for row, text in tally.texts.items())
    return WayQuality(
        wer=error_rate(word_edits(references, written)),
        cer=error_rate(character_edits(references, written)).rate,
        differing=None if tally is plain else differing,
        counts=tally.counts,
        times=tally.times,
        audio_s=audio_s,
    )


def _plans(recognizer: SpeechLMRecognizer, beam_size: int | None) -> dict[str, SpeechLMPlan]:
    """Ways of decoding by name, plain ones first."""
    drafts = list(reversed(available_drafts(recognizer.model)))
    options = {str(draft): SpeechLMOptions(draft) for draft in drafts}
    if beam_size is not None:
        of_beam = [draft for draft in drafts if draft in BEAM_DRAFTS]
        options |= {f"beam_{d}": SpeechLMOptions(d, beam_size=beam_size) for d in of_beam}
    return {name: recognizer.plan(option) for name, option in options.items()}


def _check_lengths(recognizer: SpeechLMRecognizer, utterances: Sequence[Utterance]) -> None:
    longest = max(utterances, key=lambda u: u.seconds)
    if (limit := recognizer.longest_s(longest.seconds + 1)) < longest.seconds:
        raise InputError(
            f"{longest.path} lasts {longest.seconds:.1f} s, and the decoder's context holds "
            f"{limit:.1f} s of speech with its text; cut it (offramp transcribe cuts by itself)"
        )


def _batches(
    recognizer: SpeechLMRecognizer, utterances: Sequence[Utterance]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """(which utterances, their samples), by rising length."""
    lengths = [max(1, round(SAMPLE_RATE * u.seconds)) for u in utterances]
    most = SpeechLMOptions().batch_size
    for together in length_batches(lengths, BATCH_SAMPLES):
        for at in range(0, len(together), most):
            heard = {row: read_audio(utterances[row].path) for row in together[at : at + most]}
            rows = [row for row in heard if recognizer.reader.num_inputs(len(heard[row]))]
            if rows:
                yield rows, [heard[row] for row in rows]
