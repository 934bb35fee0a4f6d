"""What choosing well is worth: the planner beside simpler rules, at equal WER and equal chunks.

The arms are compressed models that `energy_arms.prepare` made. Their WER, the time that one thread
takes and the latency of their texts are measured here; bytes are counted; energy is modelled from
counts of what their own streams ran (energy/modelled.py), for several devices. What is modelled
and what is measured never meet in one figure, and the report says which is which.
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
    RUNS,
    development,
    find_arms,
)
from offramp.bench.equal_time import pooled
from offramp.bench.stream_profile import ProfileOptions
from offramp.bench.stream_timing import Timing, spread, timings
from offramp.bench.wer import Edits, error_rate, need_jiwer
from offramp.compress.components import as_run
from offramp.compress.plan import CompressionPlan
from offramp.config import check_counts
from offramp.data.manifest import Utterance
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.profiles import SHIPPED, Profile
from offramp.energy.uncertainty import DEFAULT_SWEEP, Plan, Sweep, fraction_better
from offramp.errors import InputError
from offramp.streaming import StreamingRecognizer


@dataclass(frozen=True)
class EnergyOptions:
    """runs: folder of ARM-SEED. data, limit: as in `ArmsOptions`. timed: recordings that are timed,
    of all lengths; rounds: how often each. sweep: of the constants."""

    runs: Path = RUNS
    data: tuple[str, ...] = DATA
    limit: int | None = None
    hardware: tuple[str, ...] = SHIPPED
    timed: int = 8
    rounds: int = 5
    sweep: Sweep = DEFAULT_SWEEP

    def __post_init__(self) -> None:
        check_counts(1, timed=self.timed, rounds=self.rounds)


@dataclass(frozen=True)
class Row:
    """An arm. wer: of all seeds together; by_seed: of each. stored_bytes, mj_per_audio_s (by
    profile, modelled): means over seeds. runs: as the first seed ran, for draws of constants."""

    wer: float
    wer_ci95: tuple[float, float]
    by_seed: Mapping[int, float]
    stored_bytes: int
    mj_per_audio_s: Mapping[str, float]
    timing: Timing
    plan: CompressionPlan
    runs: Plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "wer": self.wer,
            "wer_ci95": list(self.wer_ci95),
            "bytes": self.stored_bytes,
            "energy_mj_per_audio_s": dict(self.mj_per_audio_s),
            "rtf": self.timing.rtf,
            "latency_ms": self.timing.latency.first_partial_ms,
        }


@dataclass(frozen=True)
class EnergyReport:
    """fractions: baseline -> profile -> share of draws in which the planner takes less."""

    words: int
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    profiles: tuple[Profile, ...]
    rows: Mapping[str, Row]
    fractions: Mapping[str, Mapping[str, float]]

    @property
    def best(self) -> str:
        """Of the baselines that the planner is held against, the one that takes least energy, on
        the profile where it takes most of what the dense model takes."""
        dense = self.rows["dense_fp32"].mj_per_audio_s

        def worst(name: str) -> float:
            return max(mj / dense[p] for p, mj in self.rows[name].mj_per_audio_s.items())

        return min(COMPARED, key=worst)

    def saving(self, arm: str) -> dict[str, float | None]:
        """Of `arm` against `best`, by profile, as a share; None where its WER is higher by more
        than EQUAL_WER, since that is no saving at equal WER."""
        ours, theirs = self.rows[arm], self.rows[self.best]
        equal = ours.wer <= theirs.wer + EQUAL_WER + 1e-12
        return {
            name: 1 - mj / theirs.mj_per_audio_s[name] if equal else None
            for name, mj in ours.mj_per_audio_s.items()
        }

    @property
    def rank_stability(self) -> float:
        """The least of `fractions`."""
        return min(share for shares in self.fractions.values() for share in shares.values())

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
            "the first partial text, median over recordings)",
            "counted": "bytes (of the weights as stored), and what every stream ran",
            "data": list(self.data),
            "words": self.words,
            "seeds": list(self.seeds),
            "compared_with": self.best,
            "saving_with_free_chunk": self.saving(PLANNER_FREE),
            "fraction_better": {name: dict(shares) for name, shares in self.fractions.items()},
            "wer_by_seed": {
                name: {str(seed): wer for seed, wer in row.by_seed.items()}
                for name, row in self.rows.items()
            },
            "latency_ms": {name: asdict(row.timing.latency) for name, row in self.rows.items()},
            "plans": {name: asdict(row.plan) for name, row in self.rows.items()},
            "hardware": [asdict(profile) for profile in self.profiles],
        }


def run(
    options: EnergyOptions = EnergyOptions(), on_progress: Progress | None = None
) -> EnergyReport:
    """Measure, count and model all arms. CheckpointError: some are missing."""
    profiles = ProfileOptions(options.hardware).profiles()
    arms = find_arms(options.runs)
    need_jiwer()
    utterances = development(options.data, options.limit)
    plans = {arm: CompressionPlan.load(_first(made) / "plan.json") for arm, made in arms.items()}
    if len({plan.model for plan in plans.values()}) > 1:
        raise InputError(
            f"the arms in {options.runs} are of different models; choose a new folder and make all"
        )
    total = sum(map(len, arms.values())) + options.rounds
    tell = on_progress or (lambda done, total: None)
    firsts = {arm: StreamingRecognizer.load(_first(made)) for arm, made in arms.items()}
    heard: dict[str, list[_Heard]] = {}
    done = 0
    for arm, by_seed in arms.items():
        heard[arm] = []
        for seed, folder in by_seed.items():
            heard[arm].append(_heard(seed, folder, utterances, profiles))
            tell(done := done + 1, total)
    times = timings(
        {arm: recognizer.open for arm, recognizer in firsts.items()},
        spread(utterances, options.timed),
        options.rounds,
        lambda n, _: tell(done + n, total),
    )
    rows = {arm: _row(heard[arm], times[arm], plans[arm]) for arm in arms}
    fractions = {
        name: {
            p.name: fraction_better(rows[PLANNER].runs, row.runs, p, options.sweep)
            for p in profiles
        }
        for name, row in rows.items()
        if name not in (PLANNER, PLANNER_FREE)
    }
    words = sum(len(u.text.split()) for u in utterances)
    seeds = tuple(arms[PLANNER])
    return EnergyReport(words, options.data, seeds, profiles, rows, fractions)


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


def _row(heard: Sequence[_Heard], timing: Timing, plan: CompressionPlan) -> Row:
    together = error_rate(pooled([h.edits for h in heard]))
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
    )
