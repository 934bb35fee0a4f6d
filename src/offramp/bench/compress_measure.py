"""What compression costs in WER and what streams run, on a development set; kept as it comes.

Every WER is told against the model as it was, on the same utterances, so that what makes one hard
for both cancels. Text is written as streams write it: through the gate, in chunks, with endpoints.
All that was measured lies in one file, and an interrupted run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offramp.audio.io import read_audio
from offramp.bench.equal_time import pooled
from offramp.bench.wer import Edits, as_reference, error_rate, paired_difference, word_edits
from offramp.compress.candidates import Heard
from offramp.compress.plan import Choice
from offramp.compress.rounding import Moments, input_moments
from offramp.compress.sensitivity import Increase, Point
from offramp.config import strict
from offramp.data.manifest import Utterance
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.energy.trace import StreamTrace
from offramp.errors import ConfigError, DataError, InputError
from offramp.files import replacing
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer
from offramp.streaming import StreamingRecognizer

MEASURED = "measured.json"
TRACED_S = 120.0  # of audio that is really streamed, to count what runs
GATHERED_S = 300.0  # of audio that is heard to round weights by


class Ear:
    """Hears development utterances with a model. `wer` is that of the model as it was, `own` what
    it made of each utterance.

    DataError: there are too few.
    """

    def __init__(
        self, model: Transducer, pieces: Sequence[str], utterances: Sequence[Utterance]
    ) -> None:
        self.pieces, self._utterances = tuple(pieces), tuple(utterances)
        self.own = self.edits(model, StreamOptions())
        found = error_rate(self.own)
        if found.rate is None or found.ci95 is None:
            raise DataError(
                f"{len(self._utterances)} utterances are too few for a WER with an interval; give "
                "more development data"
            )
        self.wer = found.rate

    def increase(self, model: Transducer, options: StreamOptions) -> Increase:
        """WER beyond that of the model as it was, as it streams without options."""
        return self.increase_of([self.edits(model, options)])

    def increase_of(self, edits: Sequence[Sequence[Edits]]) -> Increase:
        """The same of several models together, such as those of several seeds, by what each
        made of all utterances."""
        apart = paired_difference(pooled(edits), pooled([self.own] * len(edits)))
        assert apart.difference is not None and apart.ci95 is not None, "as for the model's own"
        return Increase(apart.difference, apart.ci95)

    def trace(self, model: Transducer, options: StreamOptions) -> StreamTrace:
        """What streams run, of recordings spread evenly over the set."""
        recognizer, trace = StreamingRecognizer(model, self.pieces), StreamTrace()
        for utterance in self._spread(TRACED_S):
            stream = recognizer.open(options)
            stream.push(read_audio(utterance.path))
            stream.finish()
            trace += stream.trace
        return trace

    def moments(self, model: Transducer) -> Moments:
        """What the layers of `model` hear, of recordings spread evenly over the set; no text is
        read for it."""
        plan = StreamPlan(model, self.pieces, StreamOptions())
        with input_moments(model) as found:
            for utterance in self._spread(GATHERED_S):
                plan.read_whole(read_audio(utterance.path))
        return found

    def _spread(self, seconds: float) -> Sequence[Utterance]:
        """At least so much of the set, or all of it."""
        total = sum(u.seconds for u in self._utterances)
        return self._utterances[:: max(1, int(total / seconds))]

    def edits(self, model: Transducer, options: StreamOptions) -> list[Edits]:
        """Of each utterance."""
        plan = StreamPlan(model, self.pieces, options)
        written = [as_reference(plan.read_whole(read_audio(u.path))) for u in self._utterances]
        return word_edits([u.text for u in self._utterances], written)


def measured_of(model: Transducer, utterances: Sequence[Utterance]) -> dict[str, Any]:
    """What all measurements depend on, as `Measurements` takes it."""
    return {
        "model": fingerprint(model),
        "development set": data_sha256(utterances),
        "rounded by": f"{GATHERED_S:g} s",
    }


def data_sha256(utterances: Sequence[Utterance]) -> str:
    """Tells whether the development set is still the same."""
    rows = [[u.path.name, u.seconds, u.text] for u in utterances]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Measurements:
    """All that was measured so far, in a file that grows with each.

    of: what the figures are of (JSON); those of something else are refused.
    """

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        self._path, self._of = path, dict(of)
        self.points: list[Point] = []
        self._settings: list[dict[str, Any]] = []
        if path.exists():
            self._read()

    @property
    def known(self) -> dict[tuple[str, Choice, bool], Increase]:
        """As `sensitivity.sweep` takes it."""
        return {(p.component, p.choice, p.finetuned): p.increase for p in self.points}

    def setting(
        self, chunk_ms: float, blank_skip: float | None
    ) -> tuple[Increase, StreamTrace] | None:
        """Of a setting that was tried; None: it was not."""
        for row in self._settings:
            if (row["chunk_ms"], row["blank_skip"]) == (chunk_ms, blank_skip):
                return _increase(row["wer_increase"]), strict(StreamTrace, row["trace"])
        return None

    def add_setting(self, heard: Heard) -> None:
        row = {"chunk_ms": heard.chunk_ms, "blank_skip": heard.blank_skip}
        told = {"wer_increase": _figures(heard.increase), "trace": asdict(heard.trace)}
        self._settings.append(row | told)
        self._write()

    def add(self, point: Point) -> None:
        self.points.append(point)
        self._write()

    def to_json(self) -> str:
        points = [asdict(p) | {"increase": _figures(p.increase)} for p in self.points]
        values = {"of": self._of, "settings": self._settings, "points": points}
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    def _write(self) -> None:
        with replacing(self._path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def _read(self) -> None:
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            of, self._settings = values["of"], list(values["settings"])
            for row in self._settings:
                self.setting(row["chunk_ms"], row["blank_skip"])
            self.points = [_point(row) for row in values["points"]]
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror}; delete it") from error
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise DataError(
                f"{self._path} holds no measurements of offramp compress ({error}); delete it"
            ) from error
        if of != self._of:
            other = next(name for name in {**of, **self._of} if of.get(name) != self._of.get(name))
            raise InputError(
                f"{self._path} was measured with another {other}; choose a new folder, or delete "
                "the file to measure anew"
            )


def _point(row: Mapping[str, Any]) -> Point:
    choice, found = strict(Choice, row["choice"]), _increase(row["increase"])
    return Point(row["component"], choice, row["finetuned"], found)


def _figures(increase: Increase) -> list[float]:
    return [increase.value, *increase.ci95]


def _increase(figures: Sequence[float]) -> Increase:
    value, low, high = figures
    return Increase(value, (low, high))
