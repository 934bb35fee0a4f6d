"""What a run gives back, as frozen dataclasses of plain values. Standard library only.

Two figures describe drafting, and they differ: `acceptance_rate` = accepted / drafted tokens;
`mean_accepted_length` = tokens emitted per verify. Where nothing was drafted or generated a
ratio is None, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

# Decimals in a transcript's JSON; what is not named here is written as it is.
_DECIMALS = {"start_s": 3, "end_s": 3, "audio_s": 3, "seconds": 3}
_DECIMALS |= {"confidence": 4, "mean_exit_layer": 3}
_DECIMALS |= {"encoder_s": 4, "ctc_s": 4, "decoder_s": 4, "acceptance_rate": 4}
_DECIMALS |= {"tokens_per_call": 3}


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None where there was nothing to divide by."""
    return part / whole if whole else None


@dataclass(frozen=True)
class DecodeStats:
    """Counts and times of one decoding run, over all rows of its batch.

    A call is one invocation of a layer, however many tokens it took; a position is one token
    through one layer. verify_calls: rounds, counted per row. `ttft_s`: time to the first token,
    prefill included. drafted_tokens, accepted_tokens: see `DraftCounts`.
    """

    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    verify_calls: int
    layer_calls: int
    first_layer_positions: int
    last_layer_positions: int
    head_positions: int
    seconds: float
    ttft_s: float

    @property
    def acceptance_rate(self) -> float | None:
        return ratio(self.accepted_tokens, self.drafted_tokens)

    @property
    def mean_accepted_length(self) -> float | None:
        return ratio(self.generated_tokens, self.verify_calls) if self.drafted_tokens else None

    @property
    def tokens_per_s(self) -> float | None:
        return ratio(self.generated_tokens, self.seconds)

    @property
    def s_per_token(self) -> float | None:
        return ratio(self.seconds, self.generated_tokens)

    @property
    def layer_calls_per_token(self) -> float | None:
        """Layers started per generated token, prefill included: what latency follows at batch 1."""
        return ratio(self.layer_calls, self.generated_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The counts and the ratios above, for JSON."""
        ratios = ("acceptance_rate", "mean_accepted_length", "tokens_per_s", "s_per_token")
        names = (*ratios, "layer_calls_per_token")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Step:
    """One round of one row: `tokens` were emitted, the first `accepted` of them from `drafted`.

    text: what the tokens add to the row's text; a character spread over tokens, or the possible
    start of a stop string, is held back until it is whole. exit_layer: where the draft left the
    tower, None if it did not come from there. source: the name of the draft, where several take
    turns. unverified: how many of `tokens`, the last ones, nobody verified: not 0 only in lossy
    decoding (decoding/threshold.py).
    """

    row: int
    tokens: tuple[int, ...]
    text: str
    drafted: tuple[int, ...]
    accepted: int
    exit_layer: int | None
    finish_reason: FinishReason | None
    source: str | None = None
    unverified: int = 0


@dataclass(frozen=True)
class Generation:
    """The whole answer to one prompt. `stats` covers the batch it was decoded in."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: DecodeStats

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Word:
    """A word and when it was said, in seconds from the start of the audio.

    start_s: of the frame that emitted its first token; end_s: the end of the frame that emitted
    its last one, so CTC's words look short. confidence: the geometric mean of its tokens'
    confidences, in [0, 1].
    """

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True)
class ExitText:
    """What one tested exit wrote, greedily, and how certain the policy found it, if it scores."""

    exit_layer: int
    text: str
    score: float | None


@dataclass(frozen=True)
class DraftCounts:
    """Of one source of drafts: rounds that it drafted in, tokens drafted, tokens accepted.

    The last token that a round emits is its own: if it was drafted too, that counts as neither. So
    rounds and accepted tokens add up to all tokens, and a draft that is always right has them all
    accepted.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, step: Step) -> DraftCounts:
        both = step.accepted == len(step.tokens)  # drafted, and the round's own
        drafted = len(step.drafted)
        return cls(min(1, drafted), drafted - both, step.accepted - both)

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.rounds + other.rounds,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


@dataclass(frozen=True)
class DecoderCounts:
    """What a decoder did for one segment, or for several together.

    tokens: written, the end of the text included. calls: of the whole decoder that took part in
    it, the prompt's included; in a batch a call counts for every row. unverified: tokens that
    nobody verified, not 0 only in lossy decoding. sources: of drafts, such as `ctc`, `mtp`, or
    `mtp+ctc` where the second went on; a beam's are not counted. But for a beam, tokens = calls +
    accepted + unverified.
    """

    tokens: int = 0
    calls: int = 0
    unverified: int = 0
    sources: Mapping[str, DraftCounts] = field(default_factory=dict)

    @staticmethod
    def total(parts: Iterable[DecoderCounts]) -> DecoderCounts:
        tokens, calls, unverified = 0, 0, 0
        sources: dict[str, DraftCounts] = {}
        for part in parts:
            tokens, calls = tokens + part.tokens, calls + part.calls
            unverified += part.unverified
            for source, counts in part.sources.items():
                sources[source] = sources.get(source, DraftCounts()) + counts
        return DecoderCounts(tokens, calls, unverified, sources)

    @property
    def drafted(self) -> int:
        return sum(counts.drafted for counts in self.sources.values())

    @property
    def accepted(self) -> int:
        return sum(counts.accepted for counts in self.sources.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the ratios."""
        return asdict(self) | {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": ratio(self.accepted, self.drafted),
            "tokens_per_call": ratio(self.tokens, self.calls),
        }


@dataclass(frozen=True)
class RunDecoding:
    """How a Speech-LM wrote a recording, and what its parts took, in seconds.

    draft: where drafts came from. lossy: the text may differ from the decoder's own. encoder_s:
    features, encoder and projector; ctc_s: the CTC's text, word times and guard; decoder_s: the
    rest. Finding speech is in none of them.
    """

    draft: str
    lossy: bool
    counts: DecoderCounts
    encoder_s: float
    ctc_s: float
    decoder_s: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        split = {name: getattr(self, name) for name in ("encoder_s", "ctc_s", "decoder_s")}
        return {"draft": self.draft, "lossy": self.lossy, **self.counts.to_dict(), **split}


@dataclass(frozen=True)
class TextFlag:
    """Words [start, stop) of a segment that the audio does not hold: `unheard` ones, or a
    `repetition` after all has been heard."""

    kind: Literal["unheard", "repetition"]
    start: int
    stop: int


@dataclass(frozen=True)
class SegmentDecoding:
    """What only a segment written by a decoder has. finish_reason: `length` where the text was
    cut, as it had as many tokens as the audio has frames, or the decoder's context was full."""

    counts: DecoderCounts
    finish_reason: FinishReason
    flags: tuple[TextFlag, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        flags = [asdict(flag) for flag in self.flags]
        return {"finish_reason": self.finish_reason, "flags": flags, **self.counts.to_dict()}


@dataclass(frozen=True)
class TranscriptSegment:
    """A stretch of speech, which left the tower as one; in seconds from the start of the audio.

    text may be "": what sounded like speech need not hold words. words: none where there is no CTC
    in the text's tokens to say when they were. confidence: the geometric mean of its words', None
    without words. macs: multiply-accumulates of the encoder up to `exit_layer`, heads that were
    tested included. trail: on request, what each tested exit wrote, the one taken last. decoding:
    only from a Speech-LM.
    """

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...]
    confidence: float | None
    exit_layer: int
    macs: int
    trail: tuple[ExitText, ...] = ()
    decoding: SegmentDecoding | None = None


@dataclass(frozen=True)
class Transcript:
    """A whole recording. audio_s: its length; seconds: what transcribing it took. decoding: only
    from a Speech-LM.

    Silence has no segments.
    """

    segments: tuple[TranscriptSegment, ...]
    audio_s: float
    seconds: float
    decoding: RunDecoding | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        return " ".join(s.text for s in self.segments if s.text)

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def macs(self) -> int:
        return sum(s.macs for s in self.segments)

    @property
    def rtf(self) -> float | None:
        """Processing time / audio time."""
        return ratio(self.seconds, self.audio_s)

    @property
    def mean_exit_layer(self) -> float | None:
        return ratio(sum(s.exit_layer for s in self.segments), len(self.segments))

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; `trail` only where it was asked for, `decoding` (the run's and each
        segment's) only from a Speech-LM.

        Rounded: times to ms, confidences to 4 decimals, rtf to 4 digits.
        """
        segments = [asdict(segment) for segment in self.segments]
        for made, segment in zip(self.segments, segments, strict=True):
            if not segment["trail"]:
                del segment["trail"]
            del segment["decoding"]
            if made.decoding is not None:
                segment["decoding"] = made.decoding.to_dict()
        rtf = None if self.rtf is None else float(f"{self.rtf:.4g}")
        figures = {"audio_s": self.audio_s, "seconds": self.seconds, "rtf": rtf}
        figures["mean_exit_layer"] = self.mean_exit_layer
        written: dict[str, Any] = {"text": self.text, **figures, "macs": self.macs}
        if self.decoding is not None:
            written["decoding"] = self.decoding.to_dict()
        written["segments"] = segments
        return {name: _rounded(value, name) for name, value in written.items()}


def _rounded(value: Any, name: str = "") -> Any:
    """`value` with all in it that has a name in `_DECIMALS` rounded; `name`: its own."""
    if isinstance(value, dict):
        return {key: _rounded(held, key) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rounded(held) for held in value)
    return round(value, _DECIMALS[name]) if name in _DECIMALS and value is not None else value
