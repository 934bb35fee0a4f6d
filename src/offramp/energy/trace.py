"""What ran how often: the counts from which compute, latency and modelled energy follow.

A call is one invocation (its weights are read once); a position is one token that passed
through. In a ragged batch the padding counts too: it was computed.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Self

from offramp.config import check_counts, check_range, strict
from offramp.errors import ConfigError, DataError, InputError
from offramp.files import read_table, write_table


@dataclass
class Trace:
    """Counts of one run over a tower of `num_layers` layers."""

    num_layers: int
    layer_calls: list[int] = field(default_factory=list)
    layer_positions: list[int] = field(default_factory=list)
    head_calls: int = 0
    head_positions: int = 0

    def __post_init__(self) -> None:
        self.layer_calls = self.layer_calls or [0] * self.num_layers
        self.layer_positions = self.layer_positions or [0] * self.num_layers

    def layers(self, start: int, stop: int, positions: int) -> None:
        for layer in range(start, stop):
            self.layer_calls[layer] += 1
            self.layer_positions[layer] += positions

    def head(self, positions: int) -> None:
        self.head_calls += 1
        self.head_positions += positions


@dataclass(frozen=True)
class CallRate:
    """How often a component runs per audio second: a fixed part and one that follows the tokens."""

    per_s: float
    per_token: float = 0.0

    def at(self, tokens_per_s: float) -> float:
        """Calls per audio second."""
        return self.per_s + self.per_token * tokens_per_s


@dataclass
class StreamTrace:
    """Counts of a streaming transducer over `audio_s` seconds of audio, silence included.

    enc_frames: output frames of the encoder; right_ctx_frames: those of the right context, which
    the next chunk computes again. joiner_calls: all tokens scored; joiner_blank_only: a factorised
    blank's scorer alone ran (it runs in every joiner call too). A call takes one position per
    hypothesis. kv_bytes_*: of the encoder's left context. vad_active_s: seconds that the encoder
    was given.
    """

    audio_s: float = 0.0
    enc_chunks: int = 0
    enc_frames: int = 0
    right_ctx_frames: int = 0
    joiner_calls: int = 0
    joiner_positions: int = 0
    joiner_blank_only: int = 0
    blank_only_positions: int = 0
    predictor_calls: int = 0
    predictor_positions: int = 0
    tokens: int = 0
    kv_bytes_read: int = 0
    kv_bytes_written: int = 0
    vad_active_s: float = 0.0

    def __post_init__(self) -> None:
        check_range(0, audio_s=self.audio_s, vad_active_s=self.vad_active_s)
        seconds = ("audio_s", "vad_active_s")
        check_counts(0, **{n: v for n, v in asdict(self).items() if n not in seconds})

    def __add__(self, other: StreamTrace) -> StreamTrace:
        """Of several utterances together: `sum(traces, StreamTrace())`."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return StreamTrace(*(mine + theirs for mine, theirs in pairs))

    def per_s(self) -> dict[str, float]:
        """Every count per audio second. InputError: no audio."""
        if not self.audio_s:
            raise InputError("the trace holds no audio; count over at least one recording")
        counts = [f.name for f in fields(self) if f.name != "audio_s"]
        return {name: getattr(self, name) / self.audio_s for name in counts}

    def rates(self, blank_head: bool = False) -> dict[str, CallRate]:
        """Of encoder, predictor, joiner and, if the joiner has one, its factorised `blank_head`.

        What follows the tokens: the predictor; the joiner's calls beyond one per frame; all calls
        of a joiner behind a blank head that lets only likely tokens through.
        """
        counts = self.per_s()
        frames, joiner = counts["enc_frames"], counts["joiner_calls"]
        gated = self._checked_blank_only(blank_head) > 0
        rates = {
            "encoder": CallRate(counts["enc_chunks"]),
            "predictor": _following(counts["predictor_calls"], 0.0, counts["tokens"]),
            "joiner": _following(joiner, 0.0 if gated else frames, counts["tokens"]),
        }
        if blank_head:
            both = joiner + counts["joiner_blank_only"]
            rates["blank_head"] = _following(both, frames, counts["tokens"])
        return rates

    def positions_per_call(self, blank_head: bool = False) -> dict[str, float]:
        """Of the same components, for their MACs; 0 of what never ran. An encoder call is one."""
        both = self.joiner_calls + self._checked_blank_only(blank_head)
        scored = self.joiner_positions + self.blank_only_positions
        positions = {
            "encoder": 1.0,
            "predictor": self.predictor_positions / max(1, self.predictor_calls),
            "joiner": self.joiner_positions / max(1, self.joiner_calls),
        }
        return positions | ({"blank_head": scored / max(1, both)} if blank_head else {})

    def _checked_blank_only(self, blank_head: bool) -> int:
        if self.joiner_blank_only and not blank_head:
            raise InputError(
                f"joiner_blank_only is {self.joiner_blank_only}, which needs a factorised blank; "
                "take the trace of this model"
            )
        return self.joiner_blank_only

    def save(self, path: Path) -> None:
        """Write JSON to `path`."""
        write_table(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Strict: DataError for a file that is missing, malformed or has other counts."""
        values = read_table(path, DataError, "give a file that StreamTrace.save wrote")
        if missing := [f.name for f in fields(cls) if f.name not in values]:
            raise DataError(f"{path}: the trace lacks {', '.join(missing)}; write it anew")
        try:
            return strict(cls, values)
        except ConfigError as error:
            raise DataError(f"{path}: {error}") from error


def _following(calls: float, fixed: float, tokens: float) -> CallRate:
    """Calls beyond `fixed` follow the tokens, if there were any; all per second."""
    fixed = min(calls, fixed) if tokens else calls
    return CallRate(fixed, (calls - fixed) / tokens if tokens else 0.0)
