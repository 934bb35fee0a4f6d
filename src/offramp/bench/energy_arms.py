"""The arms of `offramp bench energy`: one model, compressed by the planner and by simpler rules.

All choose among the same candidates, by the same measured curves, with weights of 8 bits to start
from; all are fine-tuned for as many steps with the same seeds, and keep to a WER that is measured
over these seeds. The planner has to do with the WER of the best of uniform and global pruning.
All that takes long is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp.bench.arms import Progress
from offramp.bench.compress import CompressOptions, finished, measured_problem
from offramp.bench.compress_finetune import finetuner, transducer_recipe
from offramp.bench.compress_measure import MEASURED, Ear, Measurements, data_sha256
from offramp.bench.compress_rounds import (
    Rule,
    SearchOptions,
    Session,
    Tried,
    search,
    stored_bytes,
    worst_ratio,
)
from offramp.bench.stream_profile import ProfileOptions
from offramp.bench.wer import need_jiwer
from offramp.compress import baselines
from offramp.compress.checkpoint import companions, load_model, save_compressed
from offramp.compress.plan import FULL_BITS, CompressionPlan, fingerprint, pruned, quantised
from offramp.compress.planner import solve
from offramp.compress.problem import Budget, Pick, Problem
from offramp.compress.sensitivity import GRIDS, Grid
from offramp.config import check_counts, check_positive
from offramp.data.manifest import Utterance, read_manifest
from offramp.data.speech import normalized, speech_set
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.profiles import SHIPPED
from offramp.errors import CheckpointError, DataError, InputError
from offramp.files import check_writable_folder
from offramp.models import hub
from offramp.models.transducer import Transducer
from offramp.streaming import StreamingRecognizer
from offramp.tokenizer import TextTokenizer
from offramp.train.speech import TransducerRecipe

log = logging.getLogger(__name__)

RUNS = Path("runs/energy")
DATA = ("kathleen_arctic", "mini_librispeech_train_clean_5")
PLANNER, PLANNER_FREE = "planner", "planner_free_chunk"
BLANK_SKIP = "blank_skip"  # the arm that only a factorised blank can have
EQUAL_WER = 0.002  # at most so much more

_ARM = "arm.json"
_LONGER = 2  # times the model's own chunk
_UNTIL = 8  # bits: what all arms but one start from
_GRIDS = {name: replace(grid, bits=(_UNTIL, 4)) for name, grid in GRIDS.items()}
_TUNED, _STATES = "finetuned", "states"  # folders beside the arms


def _rule(choose: Callable[[Problem, float], CompressionPlan]) -> Rule:
    def rule(problem: Problem, budget: Budget) -> CompressionPlan:
        assert budget.max_wer_increase is not None, "arms are compared at equal WER"
        return choose(problem, budget.max_wer_increase)

    return rule


# What is compared with the planner. The first do not prune: (bits, longer chunks, blanks skipped).
_AS_IT_IS = {
    "dense_fp32": (FULL_BITS, False, False),
    "dense_int8": (_UNTIL, False, False),
    BLANK_SKIP: (_UNTIL, False, True),
    "longer_chunk": (_UNTIL, True, False),
}
COMPARED = ("uniform", "global_magnitude")  # the best of them sets the WER of the planner
_RULES = {
    "uniform": _rule(baselines.uniform),
    "global_magnitude": _rule(baselines.global_magnitude),
    "size_optimal": _rule(baselines.size_optimal),
    "paper_rule": _rule(baselines.paper_rule),
}
_PLANNERS = (PLANNER, PLANNER_FREE)
ARMS = (*_AS_IT_IS, *_RULES, *_PLANNERS)


@dataclass(frozen=True)
class ArmsOptions:
    """recipe: of `model`, for fine-tuning. data: development sets by name (data.speech.SPEECH_SETS)
    or paths of manifests, their dev splits; limit: so many utterances of each, spread evenly.

    finetune_steps: of every arm. seeds: of fine-tuning. max_wer_increase: of the arms that prune,
    over the model as it was; a share of the words. rounds: plans that each rule may try.
    blank_skips: thresholds to choose from, the first for the arm that does nothing else.
    """

    recipe: Path
    model: str = "stream-tiny"
    runs: Path = RUNS
    data: tuple[str, ...] = DATA
    limit: int | None = None
    finetune_steps: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    max_wer_increase: float = 0.01
    hardware: tuple[str, ...] = SHIPPED
    blank_skips: tuple[float, ...] = (0.5, 0.3)
    rounds: int = 3
    grids: Mapping[str, Grid] = field(default_factory=lambda: _GRIDS)

    def __post_init__(self) -> None:
        check_counts(1, finetune_steps=self.finetune_steps, rounds=self.rounds)
        check_positive(max_wer_increase=self.max_wer_increase)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {self.seeds}; give at least one, and each once")


def development(data: Sequence[str], limit: int | None = None) -> list[Utterance]:
    """What every WER is of; see `ArmsOptions`."""
    found = []
    for name in data:
        is_file = name.endswith((".tsv", ".jsonl"))
        known = read_manifest(Path(name), "dev") if is_file else speech_set(name, "dev")
        kept, _ = normalized(known)
        count = len(kept) if limit is None else min(limit, len(kept))
        found += [kept[n * len(kept) // count] for n in range(count)]
    if not found:
        raise DataError(f"no text of {', '.join(data)} can be normalised; write numbers out")
    return found


def find_arms(runs: Path) -> dict[str, dict[int, Path]]:
    """Arm -> seed -> checkpoint; every arm has the seeds that any of them has.

    CheckpointError names what is missing, and the command that makes it.
    """
    pattern = re.compile(rf"(?:{'|'.join(ARMS)})-(\d+)")
    found = {p.parent.name: pattern.fullmatch(p.parent.name) for p in runs.glob("*/config.json")}
    names = {name: int(match[1]) for name, match in found.items() if match}
    seeds = sorted(set(names.values()))
    wanted = [f"{arm}-{seed}" for seed in seeds or [0] for arm in ARMS]
    if any(_scores_blanks(runs / name) for name in names):
        wanted = [name for name in wanted if not name.startswith(BLANK_SKIP)]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(
            f"{runs} lacks {', '.join(missing)}; make all with: offramp bench energy --prepare "
            f"--runs {runs}"
        )
    return {
        arm: {seed: runs / f"{arm}-{seed}" for seed in seeds}
        for arm in ARMS
        if f"{arm}-{seeds[0]}" in wanted
    }


def _scores_blanks(folder: Path) -> bool:
    """Whether the model scores the blank among its labels, and so has none to skip."""
    return not hub.read_json(folder / "config.json").get("config", {}).get("factorised_blank")


def prepare(
    options: ArmsOptions, on_progress: Progress | None = None, device: str = "cpu"
) -> dict[str, dict[int, Path]]:
    """Make all arms, or go on with them; on_progress hears of curves first, then of arms."""
    folder = hub.resolve(options.model)
    check_writable_folder(options.runs)
    recipe = transducer_recipe(options.recipe)
    session, measured = _session(options, recipe, folder, device)
    skips = options.blank_skips if session.model.config.factorised_blank else ()
    searched = CompressOptions(
        Budget(options.max_wer_increase),
        hardware=options.hardware,
        chunk_ms=(session.own_ms, _LONGER * session.own_ms),
        blank_skips=skips,
        grids=options.grids,
    )
    tell = on_progress or (lambda done, total: None)
    arms = [arm for arm in ARMS if arm != BLANK_SKIP or skips]
    points = 0

    def measuring(done: int, total: int) -> None:
        nonlocal points
        points = total
        tell(done, total + len(arms))

    problem, _ = measured_problem(session, searched, measured, None, measuring)
    workshop = _Workshop(options, session, problem, recipe, folder)
    for number, arm in enumerate(arms, 1):
        workshop.make(arm)
        tell(points + number, points + len(arms))
    return find_arms(options.runs)


def _session(
    options: ArmsOptions, recipe: TransducerRecipe, folder: Path, device: str
) -> tuple[Session, Measurements]:
    """What plans are tried with, and what was measured so far."""
    profiles = ProfileOptions(options.hardware).profiles()
    need_jiwer()
    utterances = development(options.data, options.limit)
    loaded = StreamingRecognizer.load(folder, device=device)
    tuning = hashlib.sha256(f"{options.finetune_steps} {recipe!r}".encode()).hexdigest()
    of = {
        "model": fingerprint(loaded.model),
        "development set": data_sha256(utterances),
        "fine-tuning": tuning,
    }
    measured = Measurements(options.runs / MEASURED, of)
    ear = Ear(loaded.model, loaded.pieces, utterances)
    return Session(loaded.model, ear, profiles, None), measured


@dataclass(frozen=True)
class _Workshop:
    """Where arms are made. session: without fine-tuning, which differs by seed. folder: of the
    model, whose tokenizer goes along."""

    options: ArmsOptions
    session: Session
    problem: Problem
    recipe: TransducerRecipe
    folder: Path

    def make(self, arm: str) -> None:
        """Every seed's folder, unless they are there."""
        limit = None if arm in _AS_IT_IS else self.limit(arm)
        if self._is_made(arm, limit):
            return
        if limit is None:
            made, best = self.carry_out(self.as_it_is(arm))
        else:
            rule = _RULES.get(arm, solve)
            how = SearchOptions(self.options.rounds, rule, bolder=True)
            made, best, _ = search(self.carry_out, self.choices(arm), Budget(limit), how)
        told = {
            "max_wer_increase": limit,
            "wer_increase": best.increase.value,
            "worst_ratio": worst_ratio(best, self.problem),
            "finetune_steps": self.options.finetune_steps,
        }
        files = {
            **companions(self.folder),
            "plan.json": best.plan.to_json(),
            _ARM: json.dumps(told, indent=2, allow_nan=False) + "\n",
        }
        chunking = self.session.chunking(best.plan.chunk_ms)
        for seed, model in made.items():
            save_compressed(
                finished(model, chunking, best.plan.blank_skip), self._at(arm, seed), files
            )

    def limit(self, arm: str) -> float:
        """The WER increase that `arm` may have."""
        if arm not in _PLANNERS:
            return self.options.max_wer_increase
        seed = self.options.seeds[0]
        best = best_of({name: _read(self._at(name, seed)) for name in COMPARED})
        return float(_read(self._at(best, seed))["wer_increase"]) + EQUAL_WER

    def choices(self, arm: str) -> Problem:
        """What the rule of `arm` may choose from."""
        own = self.problem.settings[0].chunk_ms
        return self.problem.only(
            lambda _, choice: choice.bits <= _UNTIL,
            lambda setting: arm == PLANNER_FREE or setting.chunk_ms == own,
        )

    def as_it_is(self, arm: str) -> CompressionPlan:
        """Of an arm that prunes nothing."""
        bits, longer, skips = _AS_IT_IS[arm]
        own = self.problem.settings[0].chunk_ms
        chunk_ms, skip = own * (_LONGER if longer else 1), None
        if skips and self.options.blank_skips[0] != self.session.model.config.blank_skip:
            skip = self.options.blank_skips[0]  # otherwise None: it is the model's own
        only = self.problem.only(
            lambda _, choice: (choice.bits, choice.level) == (bits, 0.0),
            lambda setting: (setting.chunk_ms, setting.blank_skip) == (chunk_ms, skip),
        )
        return only.plan(Pick(0, (0,) * len(only.candidates)), arm)

    def carry_out(self, plan: CompressionPlan) -> tuple[dict[int, Transducer], Tried]:
        """(model by seed, what they give together: energies and bytes are the first one's)."""
        smaller, how = pruned(self.session.model, plan.choices), StreamOptions(plan.chunk_ms)
        how = replace(how, blank_skip=plan.blank_skip)
        made = {
            seed: quantised(self._tuned(smaller, seed), plan.choices) for seed in self.options.seeds
        }
        ear, first = self.session.ear, made[self.options.seeds[0]]
        found = ear.increase_of([ear.edits(model, how) for model in made.values()])
        taken = self.session.energies(first, how, ear.trace(first, how))
        tried = Tried(plan, found, stored_bytes(first), taken)
        log.info("%s, %s: WER %+.4f", plan.made_by, plan.choices, found.value)
        return made, tried

    def _tuned(self, smaller: Transducer, seed: int) -> Transducer:
        """A fine-tuned copy, from the folder that keeps it once it is made."""
        runs = self.options.runs
        kept = runs / _TUNED / f"{fingerprint(smaller)[:16]}-{seed}"
        if not kept.exists():
            recipe = replace(self.recipe, train=replace(self.recipe.train, seed=seed))
            tokenizer = TextTokenizer.load(self.folder / "tokenizer.json")
            steps, states = self.options.finetune_steps, runs / _STATES / str(seed)
            save_compressed(finetuner(recipe, tokenizer, steps, states)(smaller), kept)
        return load_model(Transducer, kept, smaller.device)

    def _at(self, arm: str, seed: int) -> Path:
        return self.options.runs / f"{arm}-{seed}"

    def _is_made(self, arm: str, limit: float | None) -> bool:
        folders = [self._at(arm, seed) for seed in self.options.seeds]
        return all(
            folder.exists() and _read(folder)["max_wer_increase"] == limit for folder in folders
        )


def best_of(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The one that takes least energy, on the profile where it takes most."""
    return min(arms, key=lambda arm: float(arms[arm]["worst_ratio"]))


def _read(folder: Path) -> dict[str, Any]:
    """What an arm was made with. CheckpointError: the folder holds no arm."""
    values = hub.read_json(folder / _ARM)
    if missing := {"max_wer_increase", "wer_increase", "worst_ratio"} - set(values):
        raise CheckpointError(
            f"{folder / _ARM} lacks {', '.join(sorted(missing))}; delete {folder} and make it anew"
        )
    return values
