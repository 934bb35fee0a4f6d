"""Splitformer's claim (arXiv 2506.18035) at equal time, on connected digits of real voices.

Every exit of every arm and seed decodes the same strings greedily; multiply-accumulates are
counted, CPU time is measured from features to text, leaving at that exit, with arms in turns.
Three test sets: takes unseen in training, of voices that were heard in it; the same under noise,
reverberation and the rest of training's augmentation; and a voice that was held out. Strings are
made of few takes, so an arm that fails on one take fails often: intervals resample strings, as
usual, and takes, which is the harder test. The runs come from recipes/splitformer_ablation.py;
those in the repository keep their weights in 8 bits.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.audio.features import encoder_input
from offramp.audio.io import SAMPLE_RATE
from offramp.bench.arms import Progress
from offramp.bench.equal_time import (
    TOLERANCE,
    ArmFigures,
    Best,
    EqualTime,
    ExitFigures,
    Gap,
    Wer,
    affordable,
    best_at,
    edits_by_word,
    gap,
    pooled,
)
from offramp.bench.splitformer_arms import COMPARED
from offramp.bench.wer import Edits, need_jiwer, word_edits
from offramp.config import EncoderConfig, check_counts
from offramp.data.augment_audio import AudioAugmentation
from offramp.data.speech import DigitString, connected_digits
from offramp.decoding.ctc import greedy, text
from offramp.energy.cost import encoder_macs
from offramp.errors import CheckpointError
from offramp.models.ctc import CTCEncoder
from offramp.recognizer import Recognizer

RUNS = Path("runs/splitformer-ablation")
OURS, BASELINES = "ours", ("early_exit", "splitformer")
MAIN = "unseen_takes"  # of the test sets
_SEED = 2  # of the strings; training looked at those of seed 0, the choice of ours at those of 1
_BATCH_STRINGS = 16  # as much work per call as one utterance is for an encoder of full size


@dataclass(frozen=True)
class SplitformerOptions:
    """runs: folder of ARM-SEED/checkpoint. strings: of unseen takes; held_out_strings: of the
    voice that was held out. rounds: of timing."""

    runs: Path = RUNS
    arms: tuple[str, ...] = COMPARED
    strings: int = 1200
    held_out_strings: int = 600
    rounds: int = 60

    def __post_init__(self) -> None:
        check_counts(1, strings=self.strings, held_out_strings=self.held_out_strings)
        check_counts(1, rounds=self.rounds)


@dataclass(frozen=True)
class SplitformerReport:
    """words: by test set. best: by exit of the first of BASELINES, on the main test set. paired:
    baseline -> its exit -> ours beside it, where ours has an exit in that time.
    features_cpu_s_per_audio_s: of what comes before every arm."""

    device: str
    threads: int
    seeds: tuple[int, ...]
    words: Mapping[str, int]
    features_cpu_s_per_audio_s: float
    arms: Mapping[str, ArmFigures]
    best: Mapping[int, Best]
    paired: Mapping[str, Mapping[int, EqualTime]]

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "suite": "splitformer",
            "device": self.device,
            "seeds": list(self.seeds),
            "threads": self.threads,
            "words": dict(self.words),
            "features_cpu_s_per_audio_s": self.features_cpu_s_per_audio_s,
            "arms": {
                arm: {
                    "params": made.params,
                    "exits": {str(e): _exit_told(figures) for e, figures in made.exits.items()},
                }
                for arm, made in self.arms.items()
            },
            "time_tolerance": TOLERANCE,
            "best_arm_at_equal_time": {str(e): asdict(best) for e, best in self.best.items()},
            "paired": {
                arm: {str(e): _pair_told(pair) for e, pair in by_exit.items()}
                for arm, by_exit in self.paired.items()
            },
        }


def _exit_told(figures: ExitFigures) -> dict[str, Any]:
    """wer_mean and wer_std are those of the main test set; the others have their names added."""
    told: dict[str, Any] = {}
    for name, wer in figures.wer.items():
        suffix = "" if name == MAIN else f"_{name}"
        told |= {f"wer_mean{suffix}": wer.mean, f"wer_std{suffix}": wer.std}
    costs = ("macs_per_audio_s", "cpu_s_per_audio_s")
    return told | {name: getattr(figures, name) for name in costs}


def _pair_told(pair: EqualTime) -> dict[str, Any]:
    gaps = {name: asdict(g) | {"significant": g.significant} for name, g in pair.gaps.items()}
    return {"our_exit": pair.our_exit, "cpu_ratio": pair.cpu_ratio, **gaps}


def run(
    options: SplitformerOptions = SplitformerOptions(), on_progress: Progress | None = None
) -> SplitformerReport:
    """Decode all strings with all runs, then time one run of each arm."""
    folders = find_runs(options.runs, options.arms)
    need_jiwer()
    unseen = connected_digits("dev", options.strings, _SEED)
    sets = {
        MAIN: _TestSet(unseen),
        "noisy": _TestSet(unseen, AudioAugmentation()),
        "held_out": _TestSet(connected_digits("held_out", options.held_out_strings, _SEED)),
    }
    models = {
        (arm, seed): Recognizer.load(folder)
        for arm, by_seed in folders.items()
        for seed, folder in by_seed.items()
    }
    total = sum(len(some.batches) for some in sets.values()) + options.rounds
    done = 0
    for some in sets.values():
        for rows in some.batches:
            some.decode(rows, models)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    towers = {arm: _tower(models[arm, min(by_seed)]) for arm, by_seed in folders.items()}
    times = cpu_times(
        towers,
        sets[MAIN].spread(),
        options.rounds,
        None if on_progress is None else lambda n, _: on_progress(done + n, total),
    )
    seeds = tuple(next(iter(folders.values())))
    return _report(towers, sets, times, seeds)


# -- runs ----------------------------------------------------------------------------------------


def find_runs(folder: Path, arms: Sequence[str]) -> dict[str, dict[int, Path]]:
    """Arm -> seed -> checkpoint folder; every arm has the seeds that any of them has.

    CheckpointError names what is missing, and the command that makes it.
    """
    names = [p.parent.parent.name for p in folder.glob("*/checkpoint/config.json")]
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, arms))})-(\d+)")
    seeds = sorted({int(m[1]) for name in names if (m := pattern.fullmatch(name))}) or [0]
    missing = [(arm, s) for arm in arms for s in seeds if f"{arm}-{s}" not in names]
    if missing:
        arm, seed = missing[0]
        raise CheckpointError(
            f"{folder} lacks {', '.join(f'{a}-{s}' for a, s in missing)}; make each as the first: "
            f"offramp train recipes/splitformer_ablation.py --set arm={arm} --set seed={seed} "
            f"--out {folder / f'{arm}-{seed}'}"
        )
    return {arm: {s: folder / f"{arm}-{s}" / "checkpoint" for s in seeds} for arm in arms}


# -- decoding ------------------------------------------------------------------------------------

_Key = tuple[str, int, int]  # arm, seed, exit layer


class _TestSet:
    """Strings, what has been written for them, and how many feature frames they have.

    features_s: CPU seconds that the features took so far, of `audio_s` seconds of audio.
    """

    def __init__(
        self, strings: Sequence[DigitString], augmentation: AudioAugmentation | None = None
    ) -> None:
        self.strings = sorted(strings, key=lambda s: len(s.takes))  # of like length together
        self.batches = [
            range(i, min(i + _BATCH_STRINGS, len(strings)))
            for i in range(0, len(strings), _BATCH_STRINGS)
        ]
        self.texts: dict[_Key, list[str]] = {}
        self._edits: dict[_Key, list[Edits]] = {}
        self.frames: list[int] = []
        self.audio_s = self.features_s = 0.0
        self._augmentation = augmentation

    @property
    def references(self) -> list[str]:
        return [s.text for s in self.strings]

    def samples(self, rows: range) -> list[Tensor]:
        """What is heard."""
        clean = [self.strings[row].samples() for row in rows]
        if self._augmentation is None:
            return clean
        heard = zip(rows, clean, strict=True)
        return [self._augmentation.apply(one, _SEED, row) for row, one in heard]

    def spread(self) -> list[tuple[Tensor, Tensor, float]]:
        """Up to ten of the batches, short and long: (features, lengths, seconds of audio)."""
        full = [rows for rows in self.batches if len(rows) == _BATCH_STRINGS] or self.batches
        chosen = [self.samples(rows) for rows in full[:: -(-len(full) // 10)]]
        return [(*encoder_input(some), sum(map(len, some)) / SAMPLE_RATE) for some in chosen]

    def decode(self, rows: range, models: Mapping[tuple[str, int], Recognizer]) -> None:
        """Write one batch, the next in order, at all exits."""
        samples = self.samples(rows)
        began = time.process_time()
        features, lengths = encoder_input(samples)
        self.features_s += time.process_time() - began
        self.frames += lengths.tolist()
        self.audio_s += sum(map(len, samples)) / SAMPLE_RATE
        for (arm, seed), model in models.items():
            for exit_layer, texts in _written(model, features, lengths).items():
                self.texts.setdefault((arm, seed, exit_layer), []).extend(texts)

    def edits(self, arm: str, seed: int, exit_layer: int) -> list[Edits]:
        """Per string; aligned once, though the table and every comparison ask."""
        key = (arm, seed, exit_layer)
        if key not in self._edits:
            self._edits[key] = word_edits(self.references, self.texts[key])
        return self._edits[key]


@torch.inference_mode()
def _written(model: Recognizer, features: Tensor, lengths: Tensor) -> dict[int, list[str]]:
    """Exit -> texts, in one pass up the tower."""
    encoder, found = model.encoder, {}
    state = encoder.embed(features, lengths)
    for exit_layer in encoder.config.exits:
        state = encoder.run(state, state.layer, exit_layer)
        made = greedy(encoder.log_probs(state, exit_layer), state.lengths, encoder.config.blank_id)
        found[exit_layer] = [text(hypothesis.tokens, model.pieces) for hypothesis in made]
    return found


# -- time ----------------------------------------------------------------------------------------


def _tower(model: Recognizer) -> CTCEncoder:
    """Its shape in float32: the shipped runs have weights of 8 bits, and time knows no weights."""
    config = model.config
    assert isinstance(config, EncoderConfig)
    return CTCEncoder(config).eval()


@torch.inference_mode()
def _leave_at(encoder: CTCEncoder, exit_layer: int, features: Tensor, lengths: Tensor) -> None:
    """From features to tokens, with this exit's head and no layer beyond it."""
    state = encoder.run(encoder.embed(features, lengths), 0, exit_layer)
    greedy(encoder.log_probs(state, exit_layer), state.lengths, encoder.config.blank_id)


def cpu_times(
    towers: Mapping[str, CTCEncoder],
    batches: Sequence[tuple[Tensor, Tensor, float]],
    rounds: int,
    on_progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Arm -> exit -> median CPU seconds per second of audio.

    Process time, which waiting for a busy machine does not add to. Each round takes the next
    batch, and all arms and exits in turns; one unmeasured round comes first.
    """
    calls = [(arm, exit_layer) for arm in towers for exit_layer in towers[arm].config.exits]
    taken: dict[tuple[str, int], list[float]] = {call: [] for call in calls}
    for turn in range(rounds + 1):
        features, lengths, audio_s = batches[turn % len(batches)]
        first = turn % len(calls)
        for arm, exit_layer in calls[first:] + calls[:first]:
            began = time.process_time()
            _leave_at(towers[arm], exit_layer, features, lengths)
            if turn:
                taken[arm, exit_layer].append((time.process_time() - began) / audio_s)
        if turn and on_progress is not None:
            on_progress(turn, rounds)
    found: dict[str, dict[int, float]] = {arm: {} for arm in towers}
    for (arm, exit_layer), seconds in taken.items():
        found[arm][exit_layer] = statistics.median(seconds)
    return found


# -- the report ----------------------------------------------------------------------------------


def _report(
    towers: Mapping[str, CTCEncoder],
    sets: Mapping[str, _TestSet],
    times: Mapping[str, Mapping[int, float]],
    seeds: tuple[int, ...],
) -> SplitformerReport:
    main = sets[MAIN]
    arms = {}
    for arm, encoder in towers.items():
        exits = {}
        for exit_layer in encoder.config.exits:
            macs = sum(encoder_macs(encoder.config, n, exit_layer) for n in main.frames)
            exits[exit_layer] = ExitFigures(
                {name: _over_seeds(some, arm, seeds, exit_layer) for name, some in sets.items()},
                macs_per_audio_s=macs / main.audio_s,
                cpu_s_per_audio_s=times[arm][exit_layer],
            )
        arms[arm] = ArmFigures(sum(p.numel() for p in encoder.parameters()), exits)
    present = [arm for arm in BASELINES if arm in arms]
    return SplitformerReport(
        device="cpu",
        threads=torch.get_num_threads(),
        seeds=seeds,
        words={name: sum(len(s.takes) for s in some.strings) for name, some in sets.items()},
        features_cpu_s_per_audio_s=main.features_s / main.audio_s,
        arms=arms,
        best={e: best_at(t, arms) for e, t in times.get(BASELINES[0], {}).items()},
        paired={arm: _paired(arm, sets, times, seeds) for arm in present if OURS in arms},
    )


def _over_seeds(some: _TestSet, arm: str, seeds: Sequence[int], exit_layer: int) -> Wer:
    rates = []
    for seed in seeds:
        edits = some.edits(arm, seed, exit_layer)
        rates.append(sum(e.errors for e in edits) / sum(e.length for e in edits))
    return Wer(statistics.fmean(rates), statistics.stdev(rates) if len(rates) > 1 else None)


def _paired(
    baseline: str,
    sets: Mapping[str, _TestSet],
    times: Mapping[str, Mapping[int, float]],
    seeds: Sequence[int],
) -> dict[int, EqualTime]:
    found = {}
    for exit_layer, budget in times[baseline].items():
        ours = affordable(times[OURS], budget)
        if ours is None:
            continue
        theirs = (baseline, exit_layer)
        gaps = {name: _gap(some, seeds, ours, theirs) for name, some in sets.items()}
        found[exit_layer] = EqualTime(ours, times[OURS][ours] / budget, gaps)
    return found


def _gap(some: _TestSet, seeds: Sequence[int], our_exit: int, theirs: tuple[str, int]) -> Gap:
    strings, takes = [], []
    for arm, exit_layer in ((OURS, our_exit), theirs):
        strings.append(pooled([some.edits(arm, seed, exit_layer) for seed in seeds]))
        written = [some.texts[arm, seed, exit_layer] for seed in seeds]
        takes.append(pooled([take_edits(some.strings, texts) for texts in written]))
    return gap((strings[0], strings[1]), (takes[0], takes[1]))


def take_edits(strings: Sequence[DigitString], hypotheses: Sequence[str]) -> list[Edits]:
    """Per take, in the order of paths: the edits at the words that it was heard as."""
    heard: dict[Path, list[Edits]] = {}
    for string, hypothesis in zip(strings, hypotheses, strict=True):
        at_words = edits_by_word(string.text.split(), hypothesis.split())
        for take, edits in zip(string.takes, at_words, strict=True):
            heard.setdefault(take, []).append(edits)
    return [edits for take in sorted(heard) for edits in pooled([[e] for e in heard[take]])]
