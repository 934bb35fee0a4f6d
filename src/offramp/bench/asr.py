"""Word and character error rates of a recogniser at every exit and under every exit policy.

Recordings are taken whole, as their manifest cuts them. Features are computed once per batch and
go through the tower anew for each policy, so every figure of time is measured, not derived. The
same pass over all exits gives `calibrate` what it needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.bench.arms import Progress
from offramp.bench.wer import character_edits, error_rate, word_edits
from offramp.config import check_counts, check_positive
from offramp.data.manifest import Utterance, read_manifest
from offramp.data.speech import normalize_text, normalized
from offramp.decoding.calibration import RULES, Calibration, DevRun, calibrate
from offramp.decoding.ctc import Hypothesis, text
from offramp.decoding.early_exit_ctc import EarlyExit, EarlyExitOptions, early_exit
from offramp.decoding.exit_policies import ExitPolicy, FixedExit
from offramp.energy.cost import trail_macs
from offramp.errors import DataError, InputError
from offramp.recognizer import CALIBRATION, POLICIES, Recognizer, batch_features, length_batches
from offramp.results import ratio

_BATCH_FRAMES = 8_000  # feature frames of a batch, padding included: 80 s
_DEFAULTS = {"confidence": 0.95, "entropy": 0.1, "agreement": 1.0}


@dataclass(frozen=True)
class AsrData:
    """data: a manifest. split: of it; None: all. limit: so many utterances, the first ones."""

    data: Path
    split: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_counts(1, limit=self.limit)

    def utterances(self) -> tuple[list[Utterance], int]:
        """(with text normalised; how many were left out, whose text has no single reading)."""
        kept, left_out = normalized(read_manifest(self.data, self.split))
        if not kept:
            raise DataError(f"{self.data} has no text that can be normalised; write numbers out")
        return kept[: self.limit], len(left_out)


@dataclass(frozen=True)
class PolicyResult:
    """threshold: what the policy ran with, None for a fixed exit. calibrated: whether that came
    from the checkpoint. rtf: features and tower, on this machine."""

    wer: float | None
    wer_ci95: tuple[float, float] | None
    cer: float | None
    mean_exit_layer: float | None
    macs_per_audio_s: float | None
    rtf: float | None
    exit_histogram: dict[str, int]
    threshold: float | None
    calibrated: bool

    def to_dict(self) -> dict[str, Any]:
        names = ("wer", "wer_ci95", "cer", "mean_exit_layer", "macs_per_audio_s", "rtf")
        return {name: getattr(self, name) for name in (*names, "exit_histogram")}


@dataclass(frozen=True)
class AsrReport:
    """words: in all references. left_out: utterances whose text has no single reading."""

    model: str
    data: str
    words: int
    utterances: int
    left_out: int
    policies: dict[str, PolicyResult]

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        policies = {name: made.to_dict() for name, made in self.policies.items()}
        return {"model": self.model, "data": self.data, "words": self.words, "policies": policies}


@dataclass(frozen=True)
class CalibrateOptions:
    """max_wer_increase, cap: in percent, as in `decoding.calibration.calibrate`."""

    max_wer_increase: float
    rule: str = "confidence"
    cap: float = 100.0

    def __post_init__(self) -> None:
        check_positive(max_wer_increase=self.max_wer_increase, cap=self.cap)
        if self.rule not in POLICIES:
            raise InputError(f"rule is {self.rule!r}; allowed: {', '.join(POLICIES)}")


@dataclass(frozen=True)
class _Batch:
    """rows: which utterances. seconds: what their features took."""

    rows: list[int]
    features: Tensor
    lengths: Tensor
    audio_s: float
    seconds: float


@dataclass(frozen=True)
class _Candidate:
    """A policy with where its threshold is from; see `PolicyResult`."""

    policy: ExitPolicy
    threshold: float | None = None
    calibrated: bool = False


@dataclass
class _Tally:
    """What a policy wrote and cost so far; by utterance."""

    texts: dict[int, str] = field(default_factory=dict)
    exit_layers: dict[int, int] = field(default_factory=dict)
    macs: int = 0
    seconds: float = 0.0

    def add(self, recognizer: Recognizer, batch: _Batch, policy: ExitPolicy) -> None:
        """Run `policy` on `batch`."""
        began = time.perf_counter()
        results = _early_exit(recognizer, batch, policy)
        self.seconds += batch.seconds + time.perf_counter() - began
        frames = batch.lengths.tolist()
        for row, num_frames, result in zip(batch.rows, frames, results, strict=True):
            self.texts[row] = _text(recognizer, result.hypothesis)
            self.exit_layers[row] = result.exit_layer
            tested = [t.exit_layer for t in result.trail]
            self.macs += trail_macs(recognizer.config, num_frames, tested)


def run(
    model: str | Path,
    data: AsrData,
    thresholds: Mapping[str, float] | None = None,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> AsrReport:
    """Every fixed exit (`exit_2`, ...), then confidence, entropy and agreement; greedy decoding.

    thresholds: by rule; those not given are the checkpoint's calibrated ones, or else common ones.
    """
    recognizer = Recognizer.load(model, device=device)
    candidates = _candidates(recognizer, thresholds or {})
    utterances, left_out = data.utterances()
    tallies = {name: _Tally() for name in candidates}
    audio_s = 0.0
    for batch in _batches(recognizer, utterances, on_progress):
        if not audio_s:
            _early_exit(recognizer, batch, FixedExit())  # the first run is slower than all others
        audio_s += batch.audio_s
        for name, candidate in candidates.items():
            tallies[name].add(recognizer, batch, candidate.policy)
    references = [u.text for u in utterances]
    return AsrReport(
        model=str(model),
        data=str(data.data),
        words=sum(len(reference.split()) for reference in references),
        utterances=len(utterances),
        left_out=left_out,
        policies={
            name: _result(recognizer, tallies[name], references, audio_s, candidate)
            for name, candidate in candidates.items()
        },
    )


def calibrate_model(
    model: str | Path,
    data: AsrData,
    options: CalibrateOptions,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Calibration:
    """The threshold of a rule that keeps the expected excess error within what is allowed.

    Every exit is decoded once, greedily.
    """
    recognizer = Recognizer.load(model, device=device)
    utterances, _ = data.utterances()
    config, never = recognizer.config, RULES[options.rule](math.inf)
    exits = config.exits
    texts, scores, costs = [], [], []
    references = []
    for batch in _batches(recognizer, utterances, on_progress):
        results = _early_exit(recognizer, batch, never)
        frames = batch.lengths.tolist()
        for row, num_frames, result in zip(batch.rows, frames, results, strict=True):
            references.append(utterances[row].text)
            texts.append([_text(recognizer, t.hypothesis) for t in result.trail])
            scores.append([0.0 if t.score is None else t.score for t in result.trail])
            macs = [trail_macs(config, num_frames, exits[: n + 1]) for n in range(len(exits))]
            costs.append(macs)
    edits = [word_edits(references, [t[n] for t in texts]) for n in range(len(exits))]
    errors = [[at_exit[row].errors for at_exit in edits] for row in range(len(texts))]
    words = [len(reference.split()) for reference in references]
    dev = DevRun(exits, scores, errors, words, costs)
    share, cap = options.max_wer_increase / 100, options.cap / 100
    return calibrate(dev, options.rule, share, cap)


def _candidates(recognizer: Recognizer, thresholds: Mapping[str, float]) -> dict[str, _Candidate]:
    """Policies by name. Of the calibrated file only the rule that it is for is known."""
    if unknown := sorted(set(thresholds) - set(POLICIES)):
        raise InputError(f"there is no rule {unknown[0]!r}; allowed: {', '.join(POLICIES)}")
    path = None if recognizer.folder is None else recognizer.folder / CALIBRATION
    saved = Calibration.load(path) if path is not None and path.exists() else None
    found = {f"exit_{e}": _Candidate(FixedExit(e)) for e in recognizer.config.exits}
    for rule, default in _DEFAULTS.items():
        if rule in thresholds or saved is None or saved.rule != rule:
            threshold = thresholds.get(rule, default)
            found[rule] = _Candidate(POLICIES[rule](threshold), threshold)
        else:
            policy = saved.policy(recognizer.config.exits)
            found[rule] = _Candidate(policy, saved.threshold, calibrated=True)
    return found


def _batches(
    recognizer: Recognizer, utterances: Sequence[Utterance], on_progress: Progress | None
) -> Iterator[_Batch]:
    """The utterances by rising length, as far as the encoder can take them."""
    lengths = [max(1, round(100 * u.seconds)) for u in utterances]  # only to sort by
    done = 0
    for rows in length_batches(lengths, _BATCH_FRAMES):
        samples = {row: read_audio(utterances[row].path) for row in rows}
        count, config = recognizer.features.num_frames, recognizer.config
        rows = [row for row in rows if config.output_frames(count(len(samples[row])))]
        if rows:
            heard = [samples[row] for row in rows]
            began = time.perf_counter()
            device = recognizer.encoder.device
            features, lengths_ = batch_features(heard, recognizer.features, device)
            taken = time.perf_counter() - began
            yield _Batch(rows, features, lengths_, sum(map(len, heard)) / SAMPLE_RATE, taken)
        done += len(samples)
        if on_progress is not None:
            on_progress(done, len(utterances))


def _early_exit(recognizer: Recognizer, batch: _Batch, policy: ExitPolicy) -> list[EarlyExit]:
    encoder, config = recognizer.encoder, recognizer.config
    options = EarlyExitOptions(config.blank_id)
    return early_exit(encoder, config.exits, batch.features, batch.lengths, policy, options)


def _text(recognizer: Recognizer, hypothesis: Hypothesis) -> str:
    """Normalised as references are."""
    written = text(hypothesis.tokens, recognizer.pieces)
    try:
        return normalize_text(written)
    except DataError:
        return written  # signs that no reference has: its words count as errors


def _result(
    recognizer: Recognizer,
    tally: _Tally,
    references: Sequence[str],
    audio_s: float,
    candidate: _Candidate,
) -> PolicyResult:
    # A recording too short for the encoder has no text, left nowhere and cost nothing.
    written = [tally.texts.get(row, "") for row in range(len(references))]
    wer = error_rate(word_edits(references, written))
    cer = error_rate(character_edits(references, written))
    left = list(tally.exit_layers.values())
    return PolicyResult(
        wer=wer.rate,
        wer_ci95=wer.ci95,
        cer=cer.rate,
        mean_exit_layer=ratio(sum(left), len(left)),
        macs_per_audio_s=ratio(tally.macs, audio_s),
        rtf=ratio(tally.seconds, audio_s),
        exit_histogram={str(e): left.count(e) for e in recognizer.config.exits},
        threshold=candidate.threshold,
        calibrated=candidate.calibrated,
    )
