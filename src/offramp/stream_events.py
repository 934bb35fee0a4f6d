"""What a stream of speech gives back as it comes, as frozen dataclasses. Standard library only.

Times are seconds from the start of the audio. `latency_ms` is the audio that had to come in after
the model wrote what the event is about, and the time that the computing of its chunk took. It takes
for granted that the machine keeps up with the audio; a word that the model writes late is late
beside it (bench/speech_latency.py measures from the speech itself).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from offramp.results import Word


@dataclass(frozen=True)
class _Said:
    """text is never empty. confidence: the geometric mean of its words'. latency_ms: after
    `end_s`, that is of the newest word."""

    text: str
    words: tuple[Word, ...]
    confidence: float
    start_s: float
    end_s: float
    latency_ms: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"event": type(self).__name__.lower()} | asdict(self)


class Partial(_Said):
    """The utterance so far; all of its words may still change."""


@dataclass(frozen=True)
class Alternative:
    """What else was perhaps said. score: how much less likely than the text that was chosen, in
    nats, 0 or below."""

    text: str
    score: float


@dataclass(frozen=True)
class Final(_Said):
    """An utterance that is over: its words will not change.

    alternatives: other texts, best first, where a search with `n_best` was asked for them.
    """

    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Endpoint:
    """After a `Final`: the utterance ended at `at_s`, and the stream goes on.

    rule: `silence`, `trailing_silence` or `length` (see decoding/endpoint.py).
    """

    rule: str
    at_s: float
    latency_ms: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"event": "endpoint"} | asdict(self)


Event = Partial | Final | Endpoint


@dataclass(frozen=True)
class Latency:
    """Of the partial texts of a stream, in ms: the first, the median and the 90th percentile.

    None where there was no partial text.
    """

    first_partial_ms: float | None
    median_ms: float | None
    p90_ms: float | None

    @classmethod
    def of(cls, events: Iterable[Event]) -> Self:
        found = [event.latency_ms for event in events if isinstance(event, Partial)]
        if not found:
            return cls(None, None, None)
        return cls(found[0], statistics.median(found), ninetieth(found))


def ninetieth(values: Sequence[float]) -> float:
    """The least of `values` that nine in ten of them do not exceed."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]
