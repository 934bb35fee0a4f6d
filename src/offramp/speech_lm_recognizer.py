"""From audio to text by a Speech-LM: speech segments of a recording, each decoded as one.

A segment is no longer than the decoder has room for, text included: longer speech is cut where it
is quietest, as all long speech is. Where the checkpoint's CTC writes the decoder's tokens it also
says when each word was, and which words it has not heard.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, Source
from offramp.audio.reader import LogMelReader, Reader
from offramp.audio.vad import Segment, VadOptions
from offramp.config import EncoderConfig
from offramp.decoding.alignment import text_words
from offramp.decoding.ctc import geometric_mean
from offramp.decoding.encoder_cost import tower_macs
from offramp.decoding.guard import Flag, joined
from offramp.decoding.speech_lm import PartTimes, SpeechLMOptions, SpeechLMPlan, SpeechText
from offramp.errors import InputError
from offramp.models import hub
from offramp.models.hf_ctc import PretrainedConfig
from offramp.models.hf_speech_lm import AudioLM, AudioTowerConfig, is_audio_lm, load_audio_lm
from offramp.models.speech_lm import SpeechLM
from offramp.models.speech_lm_checkpoint import SpeechLMCheckpoint, load_speech_lm
from offramp.nn.device import choose_device
from offramp.results import (
    DecoderCounts,
    RunDecoding,
    SegmentDecoding,
    TextFlag,
    Transcript,
    TranscriptSegment,
    Word,
)
from offramp.transcription import Transcription, heard_s, placed


class SpeechLMRecognizer:
    """A Speech-LM with its tokenizer. One recording at a time; loading is the slow part, so keep
    it."""

    def __init__(self, checkpoint: SpeechLMCheckpoint | AudioLM) -> None:
        self.model: SpeechLM = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        if checkpoint.reader is not None:
            self.reader: Reader = checkpoint.reader
        else:
            assert isinstance(self.model.encoder.config, EncoderConfig), "others bring a reader"
            self.reader = LogMelReader(self.model.encoder.config)
        self._plan: tuple[SpeechLMOptions, SpeechLMPlan] | None = None

    @classmethod
    def load(cls, model: str | Path, *, device: str = "cpu") -> SpeechLMRecognizer:
        """A folder or a hub id. CheckpointError: no Speech-LM is there."""
        folder, on = hub.resolve(str(model)), choose_device(device)
        return cls(load_audio_lm(folder, on) if is_audio_lm(folder) else load_speech_lm(folder, on))

    def decode(
        self, samples: Sequence[Tensor], plan: SpeechLMPlan
    ) -> tuple[list[SpeechText], PartTimes]:
        """Samples [N_b] each, none too short for the encoder -> a text for each, and the time."""
        began = time.perf_counter()
        made, lengths = self.reader.inputs(samples)
        inputs, lengths = made.to(self.model.device), lengths.to(self.model.device)
        features_s = time.perf_counter() - began
        texts, times = plan.decode(inputs, lengths)
        return texts, PartTimes(encoder_s=features_s) + times

    def longest_s(self, up_to_s: float) -> float:
        """The longest speech, up to `up_to_s`, that the encoder and the decoder can hear at once,
        with a token written for every frame of the encoder; 0: none."""
        encoder = self.model.encoder.config
        window = encoder.window if isinstance(encoder, AudioTowerConfig) else math.inf

        def too_long(num_samples: int) -> bool:
            num_inputs = self.reader.num_inputs(num_samples)
            full = self.model.room(num_inputs) < encoder.output_frames(num_inputs) + 1
            return full or num_inputs > window

        lengths = range(1, int(up_to_s * SAMPLE_RATE) + 1)
        return bisect.bisect_left(lengths, True, key=too_long) / SAMPLE_RATE

    def transcribe(self, source: Source, options: SpeechLMOptions | None = None) -> Transcript:
        """The whole recording: a path, "-" for standard input, or a binary file.

        Raises AudioError, or InputError where `source` is none of these.
        """
        return self.stream(source, options).complete()

    def stream(self, source: Source, options: SpeechLMOptions | None = None) -> Transcription:
        """The same as it comes: iterate for segments, in order; then it has `.transcript`."""
        return Transcription(source, _Writer(self, self.plan(options or SpeechLMOptions())))

    def plan(self, options: SpeechLMOptions) -> SpeechLMPlan:
        """`options` made ready for this model, kept for the next recording; their faults show here.

        InputError: the checkpoint lacks what they need, or its context is too short for speech.
        """
        if self._plan is None or self._plan[0] != options:
            fitted = replace(options, vad=self._fitted(options.vad))
            self._plan = options, SpeechLMPlan(self.model, self.tokenizer, fitted)
        return self._plan[1]

    def _fitted(self, vad: VadOptions) -> VadOptions:
        """`vad` with segments that the decoder has room for."""
        longest_s, least_s = self.longest_s(vad.max_segment_s), 2 * vad.padding_s + 1
        if longest_s < least_s:
            limit = self.model.config.decoder.max_positions
            raise InputError(
                f"the decoder's context of {limit} positions holds {longest_s:.2f} s of speech "
                f"with its text, and segments need {least_s:g} s; choose another model"
            )
        return replace(vad, max_segment_s=longest_s)


class _Writer:
    """Segments decoded, and what that took."""

    def __init__(self, recognizer: SpeechLMRecognizer, plan: SpeechLMPlan) -> None:
        self._recognizer, self._plan = recognizer, plan
        self.vad, self.batch_size = plan.options.vad, plan.options.batch_size
        self.reader = recognizer.reader
        self._counts, self._times = DecoderCounts(), PartTimes()

    def write(self, batch: Sequence[Segment]) -> list[TranscriptSegment]:
        samples = [segment.samples for segment in batch]
        texts, times = self._recognizer.decode(samples, self._plan)
        self._times += times
        self._counts = DecoderCounts.total([self._counts, *(text.counts for text in texts)])
        return [self._written(*pair) for pair in zip(batch, texts, strict=True)]

    def decoding(self) -> RunDecoding:
        times, options = self._times, self._plan.options
        split = (times.encoder_s, times.ctc_s, times.decoder_s)
        return RunDecoding(self._plan.draft, options.lossy, self._counts, *split)

    def _written(self, segment: Segment, made: SpeechText) -> TranscriptSegment:
        """With times from the start of the recording."""
        moved: tuple[Word, ...] = ()
        if made.spans is not None:
            seconds = heard_s(segment, self.reader)
            local = text_words(made.spans, made.parts, self.reader.frame_s, seconds)
            moved = placed(local, segment, self.reader)
        flagged = [flagged_words(flag, made.parts) for flag in made.flags]
        # Some tokens write nothing, and two runs of tokens may be of one word.
        flags = tuple(joined([flag for flag in flagged if flag.start < flag.stop]))
        return TranscriptSegment(
            start_s=segment.start_s,
            end_s=segment.end_s,
            text=made.text,
            words=moved,
            confidence=geometric_mean([w.confidence for w in moved]) if moved else None,
            exit_layer=self._recognizer.model.encoder.config.num_layers,
            macs=self._macs(len(segment.samples)),
            decoding=SegmentDecoding(made.counts, made.finish_reason, flags),
        )

    def _macs(self, num_samples: int) -> int:
        """Of the encoder, whose last exit is not read unless it drafts."""
        model = self._recognizer.model
        encoder, drafting = model.encoder.config, model.config.ctc_exit
        num_inputs = self.reader.num_inputs(num_samples)
        if isinstance(encoder, AudioTowerConfig):
            return encoder.macs(num_inputs)
        assert isinstance(encoder, EncoderConfig | PretrainedConfig), "we know of no other"
        top = encoder.num_layers
        tested = [top] if drafting in (None, top) else [drafting, top]
        macs = tower_macs(encoder, num_inputs, tested)
        if drafting == top:
            return macs
        return macs - encoder.output_frames(num_inputs) * encoder.d_model * encoder.vocab_size


def flagged_words(flag: Flag, parts: Sequence[str]) -> TextFlag:
    """Tokens that a guard flags, as the words that they have a part in."""
    before, through = "".join(parts[: flag.start]), "".join(parts[: flag.stop])
    start, stop = len(before.split()), len(through.split())
    inside = before[-1:].strip() and through[len(before) :][:1].strip()
    return TextFlag(flag.kind, start - 1 if inside else start, stop)
