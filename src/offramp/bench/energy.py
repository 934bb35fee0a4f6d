"""What choosing well is worth: the planner beside simpler rules, at equal WER and equal chunks.

The arms are compressed models that `energy_prepare.prepare` made. Their WER on recordings that no
arm was chosen by, the time that one thread takes and the latency of their texts are measured here;
bytes are counted; energy is modelled from counts of what their own streams ran
(energy/modelled.py), for several devices. What is modelled and what is measured never meet in one
figure, and the report says which is which.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offramp.bench.arms import Progress
from offramp.bench.compress_measure import Ear
from offramp.bench.compress_rounds import stored_bytes
from offramp.bench.energy_arms import (
    COMPARED,
    DATA,
    EQUAL_WER,
    PLANNER,
    PLANNER_FREE,
    REPORTING,
    Outcome,
    best_of,
    development,
    find_arms,
)
from offramp.bench.equal_time import pooled
from offramp.bench.speech_latency import ALIGNER, Aligner
from offramp.bench.stream_profile import ProfileOptions
from offramp.bench.stream_timing import Timing, spread, timings
from offramp.bench.wer import Difference, Edits, error_rate, need_jiwer, paired_difference
from offramp.compress.components import as_run
from offramp.compress.plan import CompressionPlan
from offramp.config import check_counts
from offramp.data.manifest import Utterance
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.profiles import SHIPPED, Profile
from offramp.energy.uncertainty import DEFAULT_SWEEP, Plan, Sweep, distinct, fraction_better
from offramp.errors import InputError
from offramp.streaming import StreamingRecognizer


@dataclass(frozen=True)
class EnergyOptions:
    """arms: folder of ARM-SEED. data, limit: as in `ArmsOptions`, but the other half. timed:
    recordings that are timed, of all lengths; rounds: how often each. sweep: of what profiles take
    for granted. aligner: the CTC recogniser that says when words were said."""

    arms: Path
    data: tuple[str, ...] = DATA
    limit: int | None = None
    hardware: tuple[str, ...] = SHIPPED
    timed: int = 8
    rounds: int = 5
    sweep: Sweep = DEFAULT_SWEEP
    aligner: str = ALIGNER

    def __post_init__(self) -> None:
        check_counts(1, timed=self.timed, rounds=self.rounds)


@dataclass(frozen=True)
class Row:
    """An arm. wer: of all seeds together; by_seed: of each. stored_bytes, mj_per_audio_s (by
    profile, modelled): means over seeds. runs: as the first seed ran, for draws of constants.
    outcome: what came of it where it was chosen."""

    wer: float
    wer_ci95: tuple[float, float]
    by_seed: Mapping[int, float]
    stored_bytes: int
    mj_per_audio_s: Mapping[str, float]
    timing: Timing
    plan: CompressionPlan
    runs: Plan
    outcome: Outcome

    def to_dict(self) -> dict[str, Any]:
        return {
            "wer": self.wer,
            "wer_ci95": list(self.wer_ci95),
            "bytes": self.stored_bytes,
            "energy_mj_per_audio_s": dict(self.mj_per_audio_s),
            "rtf": self.timing.rtf,
            "latency_ms": self.timing.after_speech.first_partial_ms,
        }


@dataclass(frozen=True)
class EnergyReport:
    """differences: of the planners' WER and that of the arm that they are held against, in pairs.
    fractions: arm -> hardware -> share of draws in which the planner, as in `rival`, takes less;
    profiles that draws make the same hardware of are named together."""

    words: int
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    profiles: tuple[Profile, ...]
    rows: Mapping[str, Row]
    differences: Mapping[str, Difference]
    fractions: Mapping[str, Mapping[str, float]]

    @property
    def best(self) -> str:
        """What the planners are held against, as when they were made: by `best_of`."""
        return best_of({name: self.rows[name].outcome for name in COMPARED})

    def less(self, arm: str) -> dict[str, float]:
        """What `arm` takes less than `best`, by profile, as a share, whatever their WER is."""
        ours, theirs = self.rows[arm].mj_per_audio_s, self.rows[self.best].mj_per_audio_s
        return {name: 1 - mj / theirs[name] for name, mj in ours.items()}

    def saving(self, arm: str) -> dict[str, float | None]:
        """`less`; None where the WER of `arm` is higher by more than EQUAL_WER, since that is no
        saving at equal WER."""
        equal = self.rows[arm].wer <= self.rows[self.best].wer + EQUAL_WER + 1e-12
        return {name: share if equal else None for name, share in self.less(arm).items()}

    @property
    def rank_stability(self) -> float:
        """The least of `fractions`."""
        return min(share for shares in self.fractions.values() for share in shares.values())

    def robustly_better(self, name: str) -> bool:
        """Whether the planner, as in `rival`, takes less than `name` on every profile."""
        ours, theirs = (self.rows[n].mj_per_audio_s for n in (rival(self.rows, name), name))
        return all(mj < theirs[profile] for profile, mj in ours.items())

    @property
    def missed(self) -> dict[str, float]:
        """Arms whose rule found nothing within the WER that it was to keep to -> by how much."""
        return {n: row.outcome.missed_by for n, row in self.rows.items() if row.outcome.missed_by}

    def to_dict(self) -> dict[str, Any]:
        return {
            "suite": "energy",
            "profiles": [profile.name for profile in self.profiles],
            "rows": {name: row.to_dict() for name, row in self.rows.items()},
            "planner_saving_at_equal_wer": self.saving(PLANNER),
            "rank_stability": self.rank_stability,
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        return {
            "modelled": "energy_mj_per_audio_s, planner_saving_at_equal_wer, rank_stability: "
            "memory-traffic energy by published constants; not measured",
            "measured": "wer, rtf (CPU seconds of one thread per second of audio), latency_ms (of "
            "the first partial text, since the end of the first word in the audio by forced "
            "alignment, median over recordings)",
            "counted": "bytes (of the weights as they run, packed), and what every stream ran",
            "data": list(self.data),
            "half": "every second recording; arms were chosen by the others",
            "words": self.words,
            "seeds": list(self.seeds),
            "compared_with": self.best,
            "equal_wer": EQUAL_WER,
            "wer_difference": {name: asdict(found) for name, found in self.differences.items()},
            "saving_with_free_chunk": self.saving(PLANNER_FREE),
            "less_energy_at_any_wer": {name: self.less(name) for name in self.differences},
            "fraction_better": {name: dict(shares) for name, shares in self.fractions.items()},
            "robustly_better": {name: self.robustly_better(name) for name in self.fractions},
            "missed_max_wer_increase_by": self.missed,
            "wer_by_seed": {
                name: {str(seed): wer for seed, wer in row.by_seed.items()}
                for name, row in self.rows.items()
            },
            "latency_ms": {n: asdict(row.timing.after_speech) for n, row in self.rows.items()},
            "wait_after_emission_ms": {
                name: asdict(row.timing.after_emission) for name, row in self.rows.items()
            },
            "when_made": {name: asdict(row.outcome) for name, row in self.rows.items()},
            "plans": {name: asdict(row.plan) for name, row in self.rows.items()},
            "hardware": [asdict(profile) for profile in self.profiles],
        }


def run(options: EnergyOptions, on_progress: Progress | None = None) -> EnergyReport:
    """Measure, count and model all arms. CheckpointError: some are missing."""
    profiles = ProfileOptions(options.hardware).profiles()
    arms = find_arms(options.arms)
    need_jiwer()
    utterances = development(options.data, REPORTING, options.limit)
    plans = {arm: CompressionPlan.load(_first(made) / "plan.json") for arm, made in arms.items()}
    outcomes = {arm: Outcome.load(_first(made)) for arm, made in arms.items()}
    if len({plan.model for plan in plans.values()}) > 1:
        raise InputError(
            f"the arms in {options.arms} are of different models; choose a new folder and make all"
        )
    total = sum(map(len, arms.values())) + options.rounds
    tell = on_progress or (lambda done, total: None)
    firsts = {arm: StreamingRecognizer.load(_first(made)) for arm, made in arms.items()}
    aligner = Aligner(options.aligner)
    heard: dict[str, list[_Heard]] = {}
    done = 0
    for arm, by_seed in arms.items():
        heard[arm] = []
        for seed, folder in by_seed.items():
            heard[arm].append(_heard(seed, folder, utterances, profiles))
            tell(done := done + 1, total)
    times = timings(
        {arm: recognizer.open for arm, recognizer in firsts.items()},
        [aligner.recording(u) for u in spread(utterances, options.timed)],
        options.rounds,
        lambda n, _: tell(done + n, total),
    )
    rows = {arm: _row(heard[arm], times[arm], plans[arm], outcomes[arm]) for arm in arms}
    best = best_of({name: outcomes[name] for name in COMPARED})
    return EnergyReport(
        words=sum(len(u.text.split()) for u in utterances),
        data=options.data,
        seeds=tuple(arms[PLANNER]),
        profiles=profiles,
        rows=rows,
        differences={
            arm: paired_difference(_pooled(heard[arm]), _pooled(heard[best]))
            for arm in (PLANNER, PLANNER_FREE)
        },
        fractions=_fractions(rows, profiles, options.sweep),
    )


def _fractions(
    rows: Mapping[str, Row], profiles: Sequence[Profile], sweep: Sweep
) -> dict[str, dict[str, float]]:
    """Of all arms but the planners."""
    groups = {", ".join(p.name for p in some): some[0] for some in distinct(profiles)}
    return {
        name: {
            names: fraction_better(rows[rival(rows, name)].runs, row.runs, profile, sweep)
            for names, profile in groups.items()
        }
        for name, row in rows.items()
        if name not in (PLANNER, PLANNER_FREE)
    }


def rival(rows: Mapping[str, Row], name: str) -> str:
    """The planner's arm that `name` is compared with: the one with free chunks where those of
    `name` are not the model's own, or the difference would be that of chunks."""
    own = rows[PLANNER].plan.chunk_ms
    return PLANNER if rows[name].plan.chunk_ms == own else PLANNER_FREE


def _first(by_seed: Mapping[int, Path]) -> Path:
    return by_seed[min(by_seed)]


@dataclass(frozen=True)
class _Heard:
    """What one seed's model made of the development set."""

    seed: int
    edits: Sequence[Edits]
    stored_bytes: int
    mj_per_audio_s: Mapping[str, float]
    runs: Plan


def _heard(
    seed: int, folder: Path, utterances: Sequence[Utterance], profiles: Sequence[Profile]
) -> _Heard:
    loaded, own = StreamingRecognizer.load(folder), StreamOptions()
    ear = Ear(loaded.model, loaded.pieces, utterances)
    ran = as_run(loaded.model, ear.trace(loaded.model, own))
    mj = {profile.name: ran.energy(profile).mj_per_audio_s for profile in profiles}
    return _Heard(seed, ear.own, stored_bytes(loaded.model), mj, ran)


def _pooled(heard: Sequence[_Heard]) -> list[Edits]:
    """Of each utterance, all seeds together."""
    return pooled([h.edits for h in heard])


def _row(heard: Sequence[_Heard], timing: Timing, plan: CompressionPlan, outcome: Outcome) -> Row:
    together = error_rate(_pooled(heard))
    assert together.rate is not None and together.ci95 is not None, "the ear has seen to that"
    by_seed = {
        h.seed: sum(e.errors for e in h.edits) / sum(e.length for e in h.edits) for h in heard
    }
    return Row(
        wer=together.rate,
        wer_ci95=together.ci95,
        by_seed=by_seed,
        stored_bytes=round(statistics.fmean(h.stored_bytes for h in heard)),
        mj_per_audio_s={
            name: statistics.fmean(h.mj_per_audio_s[name] for h in heard)
            for name in heard[0].mj_per_audio_s
        },
        timing=timing,
        plan=plan,
        runs=heard[0].runs,
        outcome=outcome,
    )
