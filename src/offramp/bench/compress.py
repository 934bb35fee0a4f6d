"""Compress a streaming transducer by a plan that is searched, carried out and checked.

Measures how the WER suffers from compressing each part alone, solves for the least energy within
the budget, carries the plan out, fine-tunes if there is a recipe, and measures what that really
gives. Energy is modelled from counts and stored bytes (energy/modelled.py), never measured here.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from offramp.bench.arms import Progress
from offramp.bench.asr import AsrData
from offramp.bench.compress_finetune import finetuner, transducer_recipe
from offramp.bench.compress_measure import MEASURED, Ear, Measurements, measured_of
from offramp.bench.compress_rounds import SearchOptions, Session, Tried, search, stored_bytes
from offramp.bench.stream_profile import ProfileOptions
from offramp.bench.wer import need_jiwer
from offramp.compress import baselines
from offramp.compress.candidates import Heard, Sensitivity, problem_of
from offramp.compress.checkpoint import companions, save_compressed
from offramp.compress.plan import CompressionPlan
from offramp.compress.planner import front
from offramp.compress.problem import Budget, Problem
from offramp.compress.sensitivity import (
    GRIDS,
    NO_INCREASE,
    Grid,
    SweepOptions,
    curves,
    points_csv,
    sweep,
)
from offramp.config import Chunking, check_counts
from offramp.data.manifest import Utterance
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.modelled import ModelledEnergy
from offramp.energy.profiles import SHIPPED
from offramp.errors import CheckpointError, InputError
from offramp.files import check_writable_folder, json_text, replacing
from offramp.models import hub
from offramp.models.transducer import Transducer
from offramp.streaming import StreamingRecognizer
from offramp.tokenizer import TextTokenizer
from offramp.train.speech import TransducerRecipe

log = logging.getLogger(__name__)

_FINETUNE = "finetune"  # folder of states of a run that goes on
_HOPELESS = 0.2  # WER beyond that of the model as it was, above which no higher level is tried
_FRONT = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)


@dataclass(frozen=True)
class CompressOptions:
    """budget: of the plan that is searched; or plan: the file of one that is carried out.

    hardware: names of shipped profiles, or paths of .toml files; all of them count. chunk_ms: sizes
    to choose from; empty: the model's own.

    recipe: file of the recipe that trained the model, for fine-tuning. finetune_steps: of the plan,
    before it is quantised. curve_steps: of each pruned model that the curves are made of, which
    takes so long for each; 0: curves of models that are only pruned.

    blank_skips: thresholds to choose from, where the blank is factorised; from 0.5 up greedy search
    writes the same as without. grids: what is tried. rounds: plans carried out at most.
    """

    budget: Budget | None = None
    plan: Path | None = None
    hardware: tuple[str, ...] = SHIPPED
    chunk_ms: tuple[float, ...] = ()
    recipe: Path | None = None
    finetune_steps: int = 0
    curve_steps: int = 0
    blank_skips: tuple[float, ...] = (0.5, 0.3)
    grids: Mapping[str, Grid] = field(default_factory=lambda: GRIDS)
    rounds: int = 3

    def __post_init__(self) -> None:
        check_counts(0, finetune_steps=self.finetune_steps, curve_steps=self.curve_steps)
        check_counts(1, rounds=self.rounds)
        if (self.budget is None) == (self.plan is None):
            raise InputError("give either one budget, or the file of a plan to carry out")
        if (self.recipe is None) != (self.finetune_steps == self.curve_steps == 0):
            raise InputError(
                f"recipe is {self.recipe}, finetune_steps {self.finetune_steps}, curve_steps "
                f"{self.curve_steps}; give a recipe and steps, or neither"
            )


@dataclass(frozen=True)
class CompressReport:
    """best: what was saved, one of those tried. wer, dense, dense_bytes: of the model as it was.
    Those bytes are of the weights as they run; file_bytes: of the model.safetensors of `dense` and
    `compressed`, which may hold fewer bits each, and what only training needs.
    front: predicted, for rising WER budgets; baselines: predicted, for this one."""

    model: str
    data: str
    wer: float
    dense: tuple[ModelledEnergy, ...]
    dense_bytes: int
    file_bytes: Mapping[str, int]
    best: Tried
    tried: tuple[Tried, ...]
    front: tuple[CompressionPlan, ...]
    baselines: Mapping[str, CompressionPlan]

    @property
    def summary(self) -> str:
        mj = self.best.mj_per_audio_s
        first, among = next(iter(mj)), ""
        if len(mj) > 1:
            among = f" ({min(mj.values()):.3g} to {max(mj.values()):.3g} over profiles)"
        found = self.best.increase
        return (
            f"modelled {mj[first]:.3g} mJ per audio second on {first}{among}, not measured; "
            f"WER {100 * found.value:+.2f} (+-{100 * found.half_width:.2f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every energy says that it is modelled, with its constants' provenance."""
        rounds = [
            {
                "predicted_wer_increase": t.plan.wer_increase,
                "wer_increase": t.increase.value,
                "wer_increase_ci95": t.increase.ci95,
                "additivity_error": t.additivity_error,
                "modelled_mj_per_audio_s": t.mj_per_audio_s,
                "plan": asdict(t.plan),
            }
            for t in self.tried
        ]
        return {
            "summary": self.summary,
            "model": self.model,
            "data": self.data,
            "wer": {"dense": self.wer, "increase": self.best.increase.value},
            "bytes": {"dense": self.dense_bytes, "compressed": self.best.stored_bytes},
            "file_bytes": dict(self.file_bytes),
            "dense": {e.profile.name: e.to_dict() for e in self.dense},
            "compressed": {e.profile.name: e.to_dict() for e in self.best.energies},
            "rounds": rounds,
            "front": [asdict(plan) for plan in self.front],
            "baselines": {name: asdict(plan) for name, plan in self.baselines.items()},
            "measured_energy": None,
        }


def run(
    model: str,
    data: AsrData,
    out: Path,
    options: CompressOptions,
    on_progress: Progress | None = None,
    device: str = "cpu",
) -> CompressReport:
    """Compress `model` into the folder `out`; on_progress hears of each WER that is measured."""
    profiles = ProfileOptions(options.hardware).profiles()
    folder = hub.resolve(model)
    _check_out(out, folder)
    if hub.is_compressed(folder):
        raise InputError(f"{model} is compressed already; give the model that it was made from")
    given = None if options.plan is None else CompressionPlan.load(options.plan)
    recipe = None if options.recipe is None else transducer_recipe(options.recipe)
    need_jiwer()
    recognizer = StreamingRecognizer.load(folder, device=device)
    if given is not None:
        given.check(recognizer.model)
    utterances, _ = data.utterances()
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    steps = (options.finetune_steps, options.curve_steps)
    finetune, curve_finetune = (
        None if recipe is None or not n else finetuner(recipe, tokenizer, n, out / _FINETUNE)
        for n in steps
    )
    measured = Measurements(out / MEASURED, _of(recognizer.model, utterances, options, recipe))
    ear = Ear(recognizer.model, recognizer.pieces, utterances)
    session = Session(recognizer.model, ear, profiles, finetune)
    problem, table = None, ""
    if given is None:
        assert options.budget is not None
        problem, table = measured_problem(session, options, measured, curve_finetune, on_progress)
        how = SearchOptions(options.rounds, bolder=finetune is not None)
        made, best, tried = search(session.carry_out, problem, options.budget, how)
    else:
        made, best = session.carry_out(given)
        tried = (best,)
    own = _heard(session, measured, session.own_ms, None)
    files = {
        **companions(folder),
        "plan.json": best.plan.to_json(),
        MEASURED: measured.to_json(),
    } | ({"sensitivity.csv": table} if table else {})
    with replacing(out) as temporary:  # the measurements make way for the whole
        chunking = session.chunking(best.plan.chunk_ms)
        save_compressed(finished(made, chunking, best.plan.blank_skip), temporary, files)
        report = CompressReport(
            model=model,
            data=str(data.data),
            wer=ear.wer,
            dense=session.energies(recognizer.model, StreamOptions(), own.trace),
            dense_bytes=stored_bytes(recognizer.model),
            file_bytes={"dense": _file_bytes(folder), "compressed": _file_bytes(temporary)},
            best=best,
            tried=tried,
            front=() if problem is None else tuple(front(problem, _FRONT)),
            baselines={} if problem is None else _baselines(problem, options.budget),
        )
        told = json_text(report.to_dict())
        (temporary / "energy-report.json").write_text(told, encoding="utf-8")
    return report


def _file_bytes(folder: Path) -> int:
    """Of the weights there, in one file or in shards."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def finished(model: Transducer, chunking: Chunking, blank_skip: float | None) -> Transducer:
    """A copy that, unless told otherwise, hears in these chunks and skips blanks so (None: as
    `model` does), without the head for training."""
    model = copy.deepcopy(model)
    model.ctc_head = None
    skip = model.config.blank_skip if blank_skip is None else blank_skip
    config = replace(model.config, chunking=chunking, blank_skip=skip, ctc_head=False)
    model.config = model.encoder.config = config
    return model


def _check_out(out: Path, source: Path) -> None:
    """Before the work: what is in the folder must not be lost."""
    check_writable_folder(out)
    if out.resolve() == source.resolve():
        raise InputError(f"{out} holds the model that is to be compressed; give another folder")
    if out.is_dir() and not (out / "config.json").exists():
        own = {MEASURED, _FINETUNE}
        if strays := sorted(
            p.name for p in out.iterdir() if p.name not in own and p.name[0] != "."
        ):
            raise CheckpointError(
                f"{out} holds {strays[0]} and is no checkpoint; choose a new or empty folder"
            )


def _of(
    model: Transducer,
    utterances: Sequence[Utterance],
    options: CompressOptions,
    recipe: TransducerRecipe | None,
) -> dict[str, Any]:
    """What measurements depend on."""
    tuned = None
    if options.curve_steps:
        tuned = hashlib.sha256(f"{options.curve_steps} {recipe!r}".encode()).hexdigest()
    return measured_of(model, utterances) | {"fine-tuning": tuned}


def _heard(
    session: Session, measured: Measurements, chunk_ms: float, blank_skip: float | None
) -> Heard:
    """The setting, tried with the model as it was unless it was before."""
    how, own = StreamOptions(chunk_ms, blank_skip=blank_skip), session.own_ms
    known = measured.setting(chunk_ms, blank_skip)
    if known is None:
        same = (chunk_ms, blank_skip) == (own, None)
        increase = NO_INCREASE if same else session.ear.increase(session.model, how)
        trace = session.ear.trace(session.model, how)
    else:
        increase, trace = known
    heard = Heard(chunk_ms, session.chunking(chunk_ms), blank_skip, trace, increase)
    if known is None:
        measured.add_setting(heard)
    return heard


def settings_of(
    session: Session, chunk_ms: Sequence[float], blank_skips: Sequence[float]
) -> list[tuple[float, float | None]]:
    """Every size of chunks with every threshold, the model's own first; a threshold None is its
    own. InputError: a size that cannot be, refused before the work."""
    config = session.model.config
    own, others = config.blank_skip, dict.fromkeys(blank_skips)
    skips = [skip for skip in others if skip != own] if config.factorised_blank else []
    sizes = dict.fromkeys((session.own_ms, *chunk_ms))
    for size in sizes:
        session.chunking(size)
    return list(product(sizes, (None, *skips)))


def stop_above(budget: Budget) -> float:
    """The WER increase of a component alone above which it is not pruned further."""
    return max(_HOPELESS, 2 * (budget.max_wer_increase or 0.0))


def measured_problem(
    session: Session,
    options: CompressOptions,
    measured: Measurements,
    finetune: Callable[[Transducer], Transducer] | None,
    on_progress: Progress | None,
) -> tuple[Problem, str]:
    """What there is to choose from, and a table of what was measured for it."""
    assert options.budget is not None
    settings = settings_of(session, options.chunk_ms, options.blank_skips)
    total = len(settings) + sum(len(grid.every) for grid in options.grids.values())
    heard, done = [], 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(min(done, total), total)

    for chunk_ms, blank_skip in settings:
        heard.append(_heard(session, measured, chunk_ms, blank_skip))
        tell(1)
    known, own = measured.known, StreamOptions()
    points = []
    for point in sweep(
        session.model,
        options.grids,
        lambda model: session.ear.increase(model, own),
        SweepOptions(finetune, session.ear.moments, stop_above(options.budget), known),
    ):
        points.append(point)
        if (point.component, point.choice, point.finetuned) not in known:
            measured.add(point)
        tell(not point.finetuned)
    plain, tuned = curves(points), curves(points, finetuned=True)
    told = Sensitivity(session.ear.wer, points, tuned or plain)
    problem = problem_of(session.model, told, heard, session.profiles)
    if options.chunk_ms:
        problem = problem.only(settings=lambda s: s.chunk_ms in options.chunk_ms)
    return problem, points_csv(points, [*plain, *tuned])


def _baselines(problem: Problem, budget: Budget | None) -> dict[str, CompressionPlan]:
    """What simpler rules would choose, as far as they find something within a WER budget."""
    if budget is None or budget.max_wer_increase is None:
        return {}
    found = {}
    for rule in (
        baselines.uniform,
        baselines.global_magnitude,
        baselines.size_optimal,
        baselines.paper_rule,
    ):
        try:
            plan = rule(problem, budget.max_wer_increase)
        except InputError as error:
            log.warning("%s", error)
        else:
            found[plan.made_by] = plan
    return found
