"""Word and character error rates of a recogniser at every exit and under every exit policy.

Recordings are taken whole, as their manifest cuts them. References and what is written are both
normalised by `data.speech.normalize_text`, as training texts are. Features are computed once per
batch and go through the tower anew for each policy, so every figure of time is measured, not
derived; a sample of the batches is timed in turns, that other work on the machine hits no policy
alone. The same pass over all exits gives `calibrate` what it needs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.bench.arms import Progress
from offramp.bench.wer import as_reference, character_edits, error_rate, need_jiwer, word_edits
from offramp.config import check_counts, check_positive
from offramp.data.manifest import Utterance, read_manifest
from offramp.data.speech import normalized
from offramp.decoding.calibration import Calibration, DevRun, calibrate, says_nothing
from offramp.decoding.ctc import Hypothesis, text
from offramp.decoding.early_exit_ctc import EarlyExit, EarlyExitOptions, early_exit
from offramp.decoding.encoder_cost import tower_macs
from offramp.decoding.exit_policies import RULES, ExitPolicy, FixedExit
from offramp.errors import DataError, InputError
from offramp.recognizer import CALIBRATION, Decode, Recognizer, TranscribeOptions, decoder
from offramp.results import ratio
from offramp.transcription import length_batches

_BATCH_FRAMES = 8_000  # feature frames of a batch, padding included: 80 s
_TIMED = 4  # batches that are timed, spread evenly over the lengths
_TURNS = 3  # how often each policy runs on a timed batch


@dataclass(frozen=True)
class AsrData:
    """data: a manifest. split: of it; None: the only one. limit: so many utterances, drawn at
    random, always the same: the first ones may be of few voices."""

    data: Path
    split: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_counts(1, limit=self.limit)

    def utterances(self) -> tuple[list[Utterance], int]:
        """(with text normalised; how many were left out, whose text has no single reading)."""
        found = read_manifest(self.data, self.split, check_audio=True)
        splits = sorted({u.split for u in found})
        if len(splits) > 1:  # what a model was trained on tells little of it
            raise InputError(
                f"{self.data} has the splits {', '.join(splits)}; choose one with --split"
            )
        kept, left_out = normalized(found)
        if not kept:
            raise DataError(f"{self.data} has no text that can be normalised; write numbers out")
        if self.limit is not None and self.limit < len(kept):
            chosen = random.Random(0).sample(range(len(kept)), self.limit)
            kept = [kept[row] for row in sorted(chosen)]
        return kept, len(left_out)


@dataclass(frozen=True)
class AsrOptions:
    """thresholds: by rule; those not given are the checkpoint's calibrated ones, or else common
    ones. beam_size: also search with so many prefixes, at the last exit. lm: also with this
    language model, whose lm_weight is as in `TranscribeOptions`."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    beam_size: int | None = None
    lm: Path | None = None
    lm_weight: float | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.thresholds) - set(RULES)):
            raise InputError(f"there is no rule {unknown[0]!r}; allowed: {', '.join(RULES)}")
        self.searches()  # which refuses what contradicts itself

    def searches(self) -> dict[str, TranscribeOptions]:
        """`beam` and `beam_lm`, as far as they are asked for."""
        size, found = self.beam_size, {}
        if size is not None:
            found["beam"] = TranscribeOptions(beam_size=size)
        if self.lm is not None or self.lm_weight is not None:
            found["beam_lm"] = TranscribeOptions(
                beam_size=size, lm=self.lm, lm_weight=self.lm_weight
            )
        return found


@dataclass(frozen=True)
class PolicyResult:
    """threshold: what the policy ran with, None for a fixed exit. calibrated: whether that came
    from the checkpoint. rtf: wall time from samples to tokens (features, tower, decoding) per
    second of audio, in batches, on this machine; reading the files is not in it. Measured on four
    batches spread evenly over the lengths (all, if there are fewer): the policies take turns on
    each, three times in rotating order, and the least time of each counts."""

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
        found = {name: getattr(self, name) for name in (*names, "exit_histogram")}
        if self.threshold is not None or self.calibrated:
            found |= {"threshold": self.threshold, "calibrated": self.calibrated}
        return found


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
        return {
            "model": self.model,
            "data": self.data,
            "words": self.words,
            "left_out": self.left_out,
            "policies": policies,
        }


@dataclass(frozen=True)
class CalibrateOptions:
    """max_wer_increase, cap: in percent, as in `decoding.calibration.calibrate`."""

    max_wer_increase: float
    rule: str = "confidence"
    cap: float = 100.0

    def __post_init__(self) -> None:
        check_positive(max_wer_increase=self.max_wer_increase, cap=self.cap)
        if self.rule not in RULES:
            raise InputError(f"rule is {self.rule!r}; allowed: {', '.join(RULES)}")
        if empty := says_nothing(*self.shares):  # known before anything is decoded
            raise InputError(empty)

    @property
    def shares(self) -> tuple[float, float]:
        """(max_wer_increase, cap), 0.005 for half a percent."""
        return self.max_wer_increase / 100, self.cap / 100


@dataclass(frozen=True)
class _Batch:
    """rows: which utterances. seconds: what their features took. timed: whether it counts in the
    RTF."""

    rows: list[int]
    features: Tensor
    lengths: Tensor
    audio_s: float
    seconds: float
    timed: bool


@dataclass(frozen=True)
class Candidate:
    """A policy with where its threshold is from (see `PolicyResult`). decode: None is greedy."""

    policy: ExitPolicy
    threshold: float | None = None
    calibrated: bool = False
    decode: Decode | None = None


@dataclass
class _Tally:
    """What a policy wrote and cost so far; by utterance. seconds: on the timed batches."""

    texts: dict[int, str] = field(default_factory=dict)
    exit_layers: dict[int, int] = field(default_factory=dict)
    macs: int = 0
    seconds: float = 0.0

    def add(self, recognizer: Recognizer, batch: _Batch, results: Sequence[EarlyExit]) -> None:
        frames = batch.lengths.tolist()
        for row, num_frames, result in zip(batch.rows, frames, results, strict=True):
            self.texts[row] = _text(recognizer, result.hypothesis)
            self.exit_layers[row] = result.exit_layer
            tested = [t.exit_layer for t in result.trail]
            self.macs += tower_macs(recognizer.config, num_frames, tested)


def run(
    model: str | Path,
    data: AsrData,
    options: AsrOptions = AsrOptions(),
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> AsrReport:
    """Every fixed exit (`exit_2`, ...), then confidence, entropy and agreement, all decoded
    greedily; then the beam searches that were asked for."""
    recognizer = Recognizer.load(model, device=device)
    candidates = exit_candidates(recognizer, options.thresholds) | {
        name: Candidate(FixedExit(), decode=_decoder(recognizer, search))
        for name, search in options.searches().items()
    }
    need_jiwer()
    utterances, left_out = data.utterances()
    tallies = {name: _Tally() for name in candidates}
    audio_s = timed_s = 0.0
    for batch in _batches(recognizer, utterances, on_progress):
        if not audio_s:
            _early_exit(recognizer, batch, FixedExit())  # the first run is slower than all others
        audio_s += batch.audio_s
        timed_s += batch.audio_s * batch.timed
        _run_all(recognizer, batch, candidates, tallies)
    references = [u.text for u in utterances]
    return AsrReport(
        model=str(model),
        data=str(data.data),
        words=sum(len(reference.split()) for reference in references),
        utterances=len(utterances),
        left_out=left_out,
        policies={
            name: _result(recognizer, tallies[name], references, (audio_s, timed_s), candidate)
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
    """The threshold of a rule that keeps the expected excess error within what is allowed."""
    recognizer = Recognizer.load(model, device=device)
    need_jiwer()
    utterances, _ = data.utterances()
    dev = dev_run(recognizer, utterances, options.rule, on_progress)
    found = calibrate(dev, options.rule, *options.shares)
    return replace(found, weights=recognizer.weights_sha256())


def dev_run(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    rule: str,
    on_progress: Progress | None = None,
) -> DevRun:
    """Every exit decoded once, greedily, with the scores of `rule`; by rising length."""
    config, never = recognizer.config, RULES[rule].at_score(math.inf)
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
            macs = [tower_macs(config, num_frames, exits[: n + 1]) for n in range(len(exits))]
            costs.append(macs)
    edits = [word_edits(references, [t[n] for t in texts]) for n in range(len(exits))]
    errors = [[at_exit[row].errors for at_exit in edits] for row in range(len(texts))]
    words = [len(reference.split()) for reference in references]
    return DevRun(exits, scores, errors, words, costs)


def exit_candidates(
    recognizer: Recognizer, thresholds: Mapping[str, float]
) -> dict[str, Candidate]:
    """Exits and rules by name. Of the calibrated file only the rule that it is for is known."""
    path = None if recognizer.folder is None else recognizer.folder / CALIBRATION
    saved = recognizer.load_calibration(path) if path is not None and path.exists() else None
    found = {f"exit_{e}": Candidate(FixedExit(e)) for e in recognizer.config.exits}
    for rule, kind in RULES.items():
        if rule in thresholds or saved is None or saved.rule != rule:
            policy = kind(thresholds[rule]) if rule in thresholds else kind()
            found[rule] = Candidate(policy, policy.threshold)
        else:
            certified = saved.policy(recognizer.config.exits)
            found[rule] = Candidate(certified, saved.setting, calibrated=True)
    return found


def _batches(
    recognizer: Recognizer, utterances: Sequence[Utterance], on_progress: Progress | None
) -> Iterator[_Batch]:
    """The utterances by rising length, as far as the encoder can take them."""
    lengths = [max(1, round(100 * u.seconds)) for u in utterances]  # only to sort by
    done, plan = 0, list(length_batches(lengths, _BATCH_FRAMES))
    count = min(_TIMED, len(plan))
    timed = {(2 * i + 1) * len(plan) // (2 * count) for i in range(count)}
    for number, rows in enumerate(plan):
        samples = {row: read_audio(utterances[row].path) for row in rows}
        rows = [row for row in rows if recognizer.reader.num_inputs(len(samples[row]))]
        if rows:
            heard = [samples[row] for row in rows]
            began = time.perf_counter()
            made, lengths_ = recognizer.inputs(heard)
            taken = time.perf_counter() - began
            audio_s = sum(map(len, heard)) / SAMPLE_RATE
            yield _Batch(rows, made, lengths_, audio_s, taken, number in timed)
        done += len(samples)
        if on_progress is not None:
            on_progress(done, len(utterances))


def _run_all(
    recognizer: Recognizer,
    batch: _Batch,
    candidates: Mapping[str, Candidate],
    tallies: Mapping[str, _Tally],
) -> None:
    """Every candidate on `batch`, in turns if it is timed; into the tallies."""
    names = list(candidates)
    least = dict.fromkeys(names, math.inf)
    for turn in range(_TURNS if batch.timed else 1):
        start = turn * len(names) // _TURNS
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            made = candidates[name]
            results = _early_exit(recognizer, batch, made.policy, made.decode)
            least[name] = min(least[name], time.perf_counter() - began)
            if turn == 0:
                tallies[name].add(recognizer, batch, results)
    if batch.timed:
        for name in names:
            tallies[name].seconds += batch.seconds + least[name]


def _decoder(recognizer: Recognizer, search: TranscribeOptions) -> Decode | None:
    return decoder(recognizer.pieces, search, recognizer.config.blank_id)


def _early_exit(
    recognizer: Recognizer, batch: _Batch, policy: ExitPolicy, decode: Decode | None = None
) -> list[EarlyExit]:
    encoder, config = recognizer.encoder, recognizer.config
    options = EarlyExitOptions(config.blank_id, decode=decode)
    return early_exit(encoder, config.exits, batch.features, batch.lengths, policy, options)


def _text(recognizer: Recognizer, hypothesis: Hypothesis) -> str:
    return as_reference(text(hypothesis.tokens, recognizer.pieces))


def _result(
    recognizer: Recognizer,
    tally: _Tally,
    references: Sequence[str],
    audio_s: tuple[float, float],
    candidate: Candidate,
) -> PolicyResult:
    """audio_s: of all batches, and of the timed ones."""
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
        macs_per_audio_s=ratio(tally.macs, audio_s[0]),
        rtf=ratio(tally.seconds, audio_s[1]),
        exit_histogram={str(e): left.count(e) for e in recognizer.config.exits},
        threshold=candidate.threshold,
        calibrated=candidate.calibrated,
    )
