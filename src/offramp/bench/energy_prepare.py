"""The arms of `offramp bench energy`, made: one model, by the planner and by simpler rules.

All choose among the same candidates, by the same measured curves, with weights of 8 bits to start
from; all are fine-tuned for as many steps with the same seeds, or none is, and keep to a WER that
is measured over these seeds. The planner has to do with the WER of the best of uniform and global
pruning. All that takes long is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from offramp.bench.arms import Progress
from offramp.bench.compress import (
    CompressOptions,
    finished,
    measured_problem,
    settings_of,
    stop_above,
)
from offramp.bench.compress_finetune import finetuner, transducer_recipe
from offramp.bench.compress_measure import MEASURED, Ear, Measurements, measured_of
from offramp.bench.compress_rounds import (
    Rule,
    SearchOptions,
    Session,
    Tried,
    search,
    stored_bytes,
    worst_ratio,
)
from offramp.bench.energy_arms import (
    ARM_FILE,
    ARMS,
    BLANK_SKIP,
    COMPARED,
    DATA,
    PLANNER,
    PLANNER_FREE,
    PLANNING,
    RUNS,
    Outcome,
    best_of,
    development,
    find_arms,
)
from offramp.bench.stream_profile import ProfileOptions
from offramp.bench.wer import need_jiwer
from offramp.compress import baselines
from offramp.compress.checkpoint import companions, load_model, save_compressed
from offramp.compress.plan import FULL_BITS, CompressionPlan, pruned, quantised
from offramp.compress.planner import solve
from offramp.compress.problem import Budget, Pick, Problem
from offramp.compress.sensitivity import GRIDS, Grid, SweepOptions, to_measure
from offramp.config import check_counts, check_positive
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.profiles import SHIPPED
from offramp.errors import InputError
from offramp.files import check_writable_folder, json_text
from offramp.models import hub
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer
from offramp.streaming import StreamingRecognizer
from offramp.tokenizer import TextTokenizer
from offramp.train.speech import TransducerRecipe

log = logging.getLogger(__name__)

_LONGER = 2  # times the model's own chunk
_UNTIL = 8  # bits: what all arms but one start from
_TUNED, _STATES = "finetuned", "states"  # folders beside the arms
_MOST = 4.0  # WER increase, beyond which no nearest plan is looked for
LEVELS = (0.2, 0.4, 0.6, 0.8)  # shares pruned at which the curves are measured


def grids_of(levels: Sequence[float] = LEVELS) -> dict[str, Grid]:
    """What is tried, at these levels."""
    at = tuple(sorted(levels))
    return {n: replace(grid, bits=(_UNTIL, 4), levels=at) for n, grid in GRIDS.items()}


def nearest(choose: Callable[[Problem, float], CompressionPlan]) -> Rule:
    """`choose` by a WER budget; where it predicts that nothing keeps to it, what it chooses by the
    least of a few larger ones. Predictions are of models that are not fine-tuned, which mostly do
    worse than those that are tried."""

    def rule(problem: Problem, budget: Budget) -> CompressionPlan:
        assert budget.max_wer_increase is not None, "arms are compared at equal WER"
        limit = budget.max_wer_increase
        while True:
            try:
                return choose(problem, limit)
            except InputError:
                if limit >= _MOST:
                    raise
                limit = max(0.0, limit + 0.001, 1.25 * limit)

    return rule


# Of the arms that prune nothing: (bits, longer chunks, blanks skipped).
_AS_IT_IS = {
    "dense_fp32": (FULL_BITS, False, False),
    "dense_int8": (_UNTIL, False, False),
    "dense_int4": (4, False, False),
    BLANK_SKIP: (_UNTIL, False, True),
    "longer_chunk": (_UNTIL, True, False),
}
_RULES = {
    "uniform": nearest(baselines.uniform),
    "global_magnitude": nearest(baselines.global_magnitude),
    "size_optimal": nearest(baselines.size_optimal),
    "paper_rule": nearest(baselines.paper_rule),
}
_SOLVE = nearest(lambda problem, limit: solve(problem, Budget(limit)))


@dataclass(frozen=True)
class ArmsOptions:
    """runs: folder of the curves, and of a folder of arms for each number of finetune_steps. data:
    development sets by name (data.speech.SPEECH_SETS) or paths of manifests, their dev splits;
    limit: so many utterances of each half of each, spread evenly.

    finetune_steps: of every arm, by the recipe that trained `model`; 0: none is fine-tuned, which
    takes one seed and no recipe. seeds: of fine-tuning. max_wer_increase: of the arms that prune,
    over the model as it was; a share of the words. rounds: plans that each rule may try.
    blank_skips: thresholds to choose from, the first for the arm that does nothing else.
    """

    model: str = "stream-tiny"
    runs: Path = RUNS
    data: tuple[str, ...] = DATA
    limit: int | None = None
    finetune_steps: int = 0
    recipe: Path | None = None
    seeds: tuple[int, ...] = (0,)
    max_wer_increase: float = 0.01
    hardware: tuple[str, ...] = SHIPPED
    blank_skips: tuple[float, ...] = (0.5, 0.3)
    rounds: int = 3
    grids: Mapping[str, Grid] = field(default_factory=grids_of)

    def __post_init__(self) -> None:
        check_counts(0, finetune_steps=self.finetune_steps)
        check_counts(1, rounds=self.rounds)
        check_positive(max_wer_increase=self.max_wer_increase)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {self.seeds}; give at least one, and each once")
        if not self.finetune_steps and len(self.seeds) > 1:
            raise InputError(
                f"seeds are {self.seeds}, and without fine-tuning nothing is drawn; give one, or "
                "finetune_steps"
            )
        if self.finetune_steps and self.recipe is None:
            raise InputError(
                f"finetune_steps is {self.finetune_steps}, which takes a recipe; give the one that "
                f"trained {self.model}, or 0 steps"
            )

    @property
    def arms(self) -> Path:
        """The folder of arms that are fine-tuned for so many steps."""
        return self.runs / f"{self.finetune_steps}-steps"


@dataclass(frozen=True)
class Estimate:
    """What preparing takes at most. points: WERs to measure for the curves; seconds: that each
    takes, as the model as it was took. plans: carried out, each for every seed, fine-tuned for
    `finetune_steps`, with one WER more."""

    points: int
    seconds: float
    plans: int
    finetune_steps: int


def prepare(
    options: ArmsOptions,
    on_progress: Progress | None = None,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    device: str = "cpu",
) -> dict[str, dict[int, Path]]:
    """Make all arms, or go on with them; on_progress hears of curves first, then of arms.

    An arm whose rule finds nothing within the WER that it may have is made of the nearest plan that
    was tried; its `Outcome` says by how much it missed.
    """
    folder = hub.resolve(options.model)
    check_writable_folder(options.runs)
    if hub.is_compressed(folder):
        raise InputError(
            f"{options.model} is compressed already; give the model that it was made from"
        )
    recipe = None
    if options.finetune_steps and options.recipe is not None:
        recipe = transducer_recipe(options.recipe)
    began = time.perf_counter()
    session, measured = _session(options, folder, device)
    seconds = time.perf_counter() - began
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
    on_estimate(_estimate(searched, session, measured, options, seconds))
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
    return find_arms(options.arms)


def _estimate(
    searched: CompressOptions,
    session: Session,
    measured: Measurements,
    options: ArmsOptions,
    seconds: float,
) -> Estimate:
    assert searched.budget is not None
    how = SweepOptions(stop_above=stop_above(searched.budget), known=measured.known)
    points = to_measure(searched.grids, how)
    for setting in settings_of(session, searched.chunk_ms, searched.blank_skips):
        points += measured.setting(*setting) is None
    rounds = options.rounds * (len(_RULES) + 2) + 1  # what is not pruned is one
    return Estimate(points, seconds, rounds * len(options.seeds), options.finetune_steps)


def _session(options: ArmsOptions, folder: Path, device: str) -> tuple[Session, Measurements]:
    """What plans are tried with, and what was measured so far."""
    profiles = ProfileOptions(options.hardware).profiles()
    need_jiwer()
    utterances = development(options.data, PLANNING, options.limit)
    loaded = StreamingRecognizer.load(folder, device=device)
    measured = Measurements(options.runs / MEASURED, measured_of(loaded.model, utterances))
    ear = Ear(loaded.model, loaded.pieces, utterances)
    return Session(loaded.model, ear, profiles, None), measured


@dataclass(frozen=True)
class _Workshop:
    """Where arms are made. session: without fine-tuning, which differs by seed. recipe: for
    fine-tuning; None: none is. folder: of the model, whose tokenizer goes along."""

    options: ArmsOptions
    session: Session
    problem: Problem
    recipe: TransducerRecipe | None
    folder: Path

    def make(self, arm: str) -> None:
        """Every seed's folder, unless they are there."""
        limit = None if arm in _AS_IT_IS else self.limit(arm)
        if self._is_made(arm, limit):
            return
        if limit is None:
            made, best = self.carry_out(self.as_it_is(arm))
        else:
            made, best = self.searched(arm, limit)
        told = Outcome(
            max_wer_increase=limit,
            wer_increase=best.increase.value,
            worst_ratio=worst_ratio(best, self.problem),
            finetune_steps=self.options.finetune_steps,
            recipe=_sha256(self.recipe),
        )
        files = {
            **companions(self.folder),
            "plan.json": best.plan.to_json(),
            ARM_FILE: json_text(asdict(told)),
        }
        chunking = self.session.chunking(best.plan.chunk_ms)
        for seed, model in made.items():
            save_compressed(
                finished(model, chunking, best.plan.blank_skip), self._at(arm, seed), files
            )

    def searched(self, arm: str, limit: float) -> tuple[dict[int, Transducer], Tried]:
        """By the rule of `arm`: the best within `limit`, or else what came nearest to it."""
        missed: tuple[dict[int, Transducer], Tried] | None = None

        def carry_out(plan: CompressionPlan) -> tuple[dict[int, Transducer], Tried]:
            nonlocal missed
            made, tried = self.carry_out(plan)
            if missed is None or tried.increase.value < missed[1].increase.value:
                missed = made, tried
            return made, tried

        how = SearchOptions(self.options.rounds, _RULES.get(arm, _SOLVE), bolder=True)
        try:
            made, best, _ = search(carry_out, self.choices(arm), Budget(limit), how)
        except InputError as error:
            if missed is None:
                raise
            log.warning("%s: %s", arm, error)
            return missed
        return made, best

    def limit(self, arm: str) -> float:
        """The WER increase that `arm` may have."""
        if arm not in (PLANNER, PLANNER_FREE):
            return self.options.max_wer_increase
        seed = self.options.seeds[0]
        made = {name: Outcome.load(self._at(name, seed)) for name in COMPARED}
        return made[best_of(made)].wer_increase

    def choices(self, arm: str) -> Problem:
        """What the rule of `arm` may choose from. Those of pruning alone keep the bits that all
        start from; what fewer bits alone give is an arm of its own."""
        own = self.problem.settings[0].chunk_ms
        least = _UNTIL if arm in COMPARED else 0
        return self.problem.only(
            lambda _, choice: least <= choice.bits <= _UNTIL,
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
        ear, made = self.session.ear, {}
        for seed in self.options.seeds:
            tuned = self._tuned(smaller, seed)
            made[seed] = quantised(tuned, plan.choices, ear.moments(tuned))
        first = made[self.options.seeds[0]]
        found = ear.increase_of([ear.edits(model, how) for model in made.values()])
        taken = self.session.energies(first, how, ear.trace(first, how))
        tried = Tried(plan, found, stored_bytes(first), taken)
        log.info("%s, %s: WER %+.4f", plan.made_by, plan.choices, found.value)
        return made, tried

    def _tuned(self, smaller: Transducer, seed: int) -> Transducer:
        """A fine-tuned copy, from the folder that keeps it once it is made; or as it is."""
        if self.recipe is None:
            return smaller
        recipe = replace(self.recipe, train=replace(self.recipe.train, seed=seed))
        by = _sha256(recipe)
        assert by is not None, "there is a recipe"
        kept = self.options.arms / _TUNED / f"{fingerprint(smaller)[:16]}-{by[:16]}"
        if not kept.exists():
            tokenizer = TextTokenizer.load(self.folder / "tokenizer.json")
            steps, states = self.options.finetune_steps, self.options.arms / _STATES / str(seed)
            save_compressed(finetuner(recipe, tokenizer, steps, states)(smaller), kept)
        return load_model(Transducer, kept, smaller.device)

    def _at(self, arm: str, seed: int) -> Path:
        return self.options.arms / f"{arm}-{seed}"

    def _is_made(self, arm: str, limit: float | None) -> bool:
        """InputError: it is, by another recipe."""
        folders = [self._at(arm, seed) for seed in self.options.seeds]
        made = [Outcome.load(folder) for folder in folders if folder.exists()]
        if any(outcome.recipe != _sha256(self.recipe) for outcome in made):
            raise InputError(
                f"{self.options.arms} was fine-tuned by another recipe; choose a new folder, or "
                "delete it to make all anew"
            )
        return len(made) == len(folders) and all(o.max_wer_increase == limit for o in made)


def _sha256(recipe: TransducerRecipe | None) -> str | None:
    return None if recipe is None else hashlib.sha256(repr(recipe).encode()).hexdigest()
