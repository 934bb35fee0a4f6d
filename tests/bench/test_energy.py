"""offramp bench energy: arms made on a toy, their figures, and what is said at unequal WER."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import toy_streaming
from commands import offramp
from offramp import terminal_energy
from offramp.bench import energy_prepare
from offramp.bench.compress_rounds import Tried, stored_bytes
from offramp.bench.energy import (
    EnergyOptions,
    EnergyReport,
    Row,
    rival,
    run,
)
from offramp.bench.energy_arms import (
    ARMS,
    COMPARED,
    EQUAL_WER,
    PLANNER,
    PLANNER_FREE,
    PLANNING,
    REPORTING,
    Outcome,
    best_of,
    development,
    find_arms,
)
from offramp.bench.energy_prepare import ArmsOptions, Estimate, grids_of, nearest, prepare
from offramp.bench.speech_latency import Aligner, SpeechLatency
from offramp.bench.stream_timing import Timing
from offramp.bench.wer import Difference
from offramp.compress.baselines import uniform
from offramp.compress.plan import CompressionPlan
from offramp.compress.problem import Budget
from offramp.compress.sensitivity import Grid, Increase
from offramp.data.manifest import Utterance, read_manifest, write_manifest
from offramp.energy.placement import Component, Part
from offramp.energy.profiles import load_profile
from offramp.energy.trace import CallRate
from offramp.energy.uncertainty import Plan, Sweep
from offramp.errors import CheckpointError, ConfigError, DataError, InputError
from offramp.plots import pareto, plot_arms
from offramp.results import Word
from offramp.stream_events import Latency
from offramp.streaming import StreamingRecognizer
from toy_plans import drawn
from toy_streaming import RATE, babble

SECONDS = 0.8
GRIDS = {
    "encoder": Grid(("magnitude", "global_magnitude", "feed_forward"), (0.1,), (8, 4), ("int8",)),
    "predictor": Grid(("magnitude", "global_magnitude"), (0.1,), (8, 4)),
    "joiner": Grid(("magnitude", "global_magnitude"), (0.1,), (8, 4)),
}
RECIPE = """
from offramp.train.loop import TrainConfig
from offramp.train.speech import TransducerRecipe
from offramp.train.transducer import TransducerTraining
recipe = TransducerRecipe(
    name="toy", model="unused", sets=({manifest!r},), prefetch=False, augmentation=None,
    batch_seconds=3.0, train=TrainConfig(9, 1e-4, 0),
    training=TransducerTraining(chunks=(3,), window=3),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model m, and recordings, ten in each half, of which it makes no errors."""
    made = tmp_path_factory.mktemp("energy")
    toy_streaming.save(made / "m", factorised_blank=True, time_reduction=4, seed=5)
    recognizer, utterances = StreamingRecognizer.load(made / "m"), []
    for i in range(20):
        samples = babble(SECONDS, seed=i)
        soundfile.write(made / f"{i}.wav", samples.numpy(), RATE, subtype="FLOAT")
        text = recognizer.transcribe(samples)
        utterances.append(Utterance(made / f"{i}.wav", SECONDS, "s", "dev", text))
    write_manifest(made / "dev.tsv", utterances)
    heard = [replace(u, split="train", text="do re") for u in utterances[:3]]
    write_manifest(made / "train.tsv", heard)
    (made / "recipe.py").write_text(RECIPE.format(manifest=str(made / "train.tsv")))
    return made


def arms_options(folder: Path, **changes: Any) -> ArmsOptions:
    how = {
        "recipe": folder / "recipe.py",
        "model": str(folder / "m"),
        "runs": folder / "runs",
        "data": (str(folder / "dev.tsv"),),
        "finetune_steps": 1,
        "seeds": (0, 1),
        "max_wer_increase": 1.5,
        "hardware": ("edge45", "mcu"),
        "blank_skips": (0.5,),
        "rounds": 4,
        "grids": GRIDS,
    }
    return ArmsOptions(**{**how, **changes})


def energy_options(folder: Path, **changes: Any) -> EnergyOptions:
    how = {
        "arms": folder / "runs" / "1-steps",
        "data": (str(folder / "dev.tsv"),),
        "hardware": ("edge45", "mcu"),
        "timed": 2,
        "rounds": 1,
        "sweep": Sweep(draws=20),
    }
    return EnergyOptions(**{**how, **changes})


# -- arms, made --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms(folder: Path) -> dict[str, dict[int, Path]]:
    told: list[tuple[int, int]] = []
    guessed: list[Estimate] = []
    how = arms_options(folder)
    made = prepare(how, lambda done, total: told.append((done, total)), guessed.append)
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    (estimate,) = guessed
    settings = 2 * 2  # chunks, and blanks skipped or not
    assert estimate.points == settings + sum(len(grid.every) for grid in GRIDS.values())
    assert estimate.seconds > 0 and estimate.finetune_steps == 1
    assert estimate.plans == 2 * (4 * 6 + 1)
    return made


def plan(made: Path) -> CompressionPlan:
    return CompressionPlan.load(made / "plan.json")


@pytest.mark.slow
def test_every_arm_is_what_its_rule_chose_for_every_seed(
    folder: Path, arms: dict[str, dict[int, Path]]
) -> None:
    assert tuple(arms) == ARMS and {tuple(by_seed) for by_seed in arms.values()} == {(0, 1)}
    own, model = 120.0, StreamingRecognizer.load(folder / "m")
    for arm, by_seed in arms.items():
        loaded = [StreamingRecognizer.load(made) for made in by_seed.values()]
        chosen = plan(by_seed[0])
        chosen.check(model.model)
        first, second = (recognizer.model.state_dict() for recognizer in loaded)
        if arm == "dense_fp32":  # rounding may hide so little training
            assert any(not torch.equal(first[n], second[n]) for n in first), "seeds differ"
        config = loaded[0].config
        assert config.blank_skip == chosen.blank_skip and not config.ctc_head
        assert chosen.chunk_ms == config.chunking.chunk * 40.0
        if arm not in ("longer_chunk", PLANNER_FREE):
            assert chosen.chunk_ms == own
        bits = {choice.bits for choice in chosen.choices.values()}
        assert (bits == {32}) == (arm == "dense_fp32") and max(bits) <= 32
    plans = {arm: plan(by_seed[0]) for arm, by_seed in arms.items()}
    assert plans["longer_chunk"].chunk_ms == 2 * own and plans["blank_skip"].blank_skip == 0.5
    assert len({str(c) for c in plans["uniform"].choices.values()}) == 1
    for arm in ("dense_int8", "longer_chunk", "blank_skip"):
        assert {str(c) for c in plans[arm].choices.values()} == {"8 bits"}
    assert {str(c) for c in plans["dense_int4"].choices.values()} == {"4 bits"}
    for arm in COMPARED:
        assert {c.bits for c in plans[arm].choices.values()} == {8}, "pruning alone"


@pytest.mark.slow
def test_the_planner_has_the_wer_of_the_best_it_is_held_against(
    folder: Path, arms: dict[str, dict[int, Path]]
) -> None:
    told = {arm: Outcome.load(by_seed[0]) for arm, by_seed in arms.items()}
    best = best_of({arm: told[arm] for arm in COMPARED})
    for arm in (PLANNER, PLANNER_FREE):
        assert told[arm].max_wer_increase == told[best].wer_increase
        assert told[arm].wer_increase <= told[best].wer_increase or told[arm].missed_by > 0
    assert told["dense_fp32"].max_wer_increase is None


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    folder: Path, arms: dict[str, dict[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not made again: neither models nor measurements."""
    runs = folder / "runs"
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")}
    monkeypatch.setattr(energy_prepare, "finetuner", lambda *_: pytest.fail("nothing is to train"))
    guessed: list[Estimate] = []
    assert prepare(arms_options(folder), on_estimate=guessed.append) == arms
    assert guessed[0].points == 0, "all of them are known"
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")}
    other = folder / "other.py"
    other.write_text((folder / "recipe.py").read_text().replace("1e-4", "2e-4"))
    with pytest.raises(InputError, match="was fine-tuned by another recipe; choose a new folder"):
        prepare(arms_options(folder, recipe=other))


@pytest.mark.slow
def test_without_fine_tuning_the_same_curves_serve(
    folder: Path, arms: dict[str, dict[int, Path]]
) -> None:
    guessed: list[Estimate] = []
    how = arms_options(folder, finetune_steps=0, recipe=None, seeds=(0,))
    made = prepare(how, on_estimate=guessed.append)
    assert guessed[0].points == 0, "all of them are known"
    assert tuple(made) == ARMS and how.arms == folder / "runs" / "0-steps"
    outcomes = {arm: Outcome.load(by_seed[0]) for arm, by_seed in made.items()}
    assert {(o.finetune_steps, o.recipe) for o in outcomes.values()} == {(0, None)}
    assert outcomes["dense_fp32"].wer_increase == 0.0, "it is the model as it was"


@pytest.mark.slow
def test_the_report_has_every_figure_and_says_what_it_is(
    folder: Path,
    arms: dict[str, dict[int, Path]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(self: Aligner, samples: Any, text: str) -> tuple[Word, ...]:
        return tuple(Word(word, 0.0, 0.1, 1.0) for word in text.split())

    monkeypatch.setattr(Aligner, "words", said)  # nobody says these texts
    told: list[tuple[int, int]] = []
    report = run(energy_options(folder), lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == 2 * len(ARMS) + 1
    made = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    keys = ("suite", "profiles", "rows", "planner_saving_at_equal_wer", "rank_stability", "details")
    assert tuple(made) == keys and made["suite"] == "energy"
    assert made["profiles"] == ["edge45", "mcu"] and list(made["rows"]) == list(ARMS)
    for name, row in made["rows"].items():
        columns = ("wer", "wer_ci95", "bytes", "energy_mj_per_audio_s", "rtf", "latency_ms")
        assert tuple(row) == columns
        low, high = row["wer_ci95"]
        assert low <= row["wer"] <= high and row["rtf"] > 0
        assert 0.0 < row["latency_ms"] < 5000.0
        assert list(row["energy_mj_per_audio_s"]) == ["edge45", "mcu"]
        models = [StreamingRecognizer.load(f).model for f in arms[name].values()]
        assert row["bytes"] == round(sum(map(stored_bytes, models)) / 2)
        by_seed = made["details"]["wer_by_seed"][name]
        assert row["wer"] == pytest.approx(sum(by_seed.values()) / 2)
    dense, int8 = (made["rows"][n] for n in ("dense_fp32", "dense_int8"))
    for profile in ("edge45", "mcu"):
        mj = [row["energy_mj_per_audio_s"][profile] for row in (int8, dense)]
        assert mj[0] < mj[1]
    details = made["details"]
    assert details["fraction_better"]["dense_fp32"] == {"edge45": 1.0, "mcu": 1.0}
    assert details["robustly_better"]["dense_fp32"] is True
    apart, rows = details["wer_difference"]["planner"], made["rows"]
    theirs = rows[details["compared_with"]]["wer"]
    assert apart["difference"] == pytest.approx(rows["planner"]["wer"] - theirs)
    assert apart["ci95"][0] <= apart["difference"] <= apart["ci95"][1]
    assert "not measured" in made["details"]["modelled"]
    assert [p["version"] for p in made["details"]["hardware"]] == [1, 1]
    terminal_energy.show_energy_bench(report)
    shown = capsys.readouterr().out
    assert "modelled, memory-traffic energy; not measured" in shown and "Measured: " in shown
    assert all(name.replace("_", " ") in shown for name in ARMS)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_arms(report.rows, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_a_model_that_scores_blanks_among_its_labels_has_an_arm_less(
    folder: Path, tmp_path: Path
) -> None:
    toy_streaming.save(tmp_path / "m", time_reduction=4, seed=5)
    how = {"model": str(tmp_path / "m"), "runs": tmp_path / "runs", "seeds": (3,)}
    made = prepare(arms_options(folder, **how, max_wer_increase=5.0))
    assert tuple(made) == tuple(arm for arm in ARMS if arm != "blank_skip")


# -- arms, found -------------------------------------------------------------------------------


def pretend(runs: Path, names: list[str], factorised: bool = True) -> None:
    for name in names:
        (runs / name).mkdir(parents=True)
        config = {"config": {"factorised_blank": factorised}}
        (runs / name / "config.json").write_text(json.dumps(config))


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"lacks dense_fp32-0, .*offramp bench energy "
    ) as caught:
        find_arms(tmp_path)
    assert all(f"{arm}-0" in str(caught.value) for arm in ARMS)
    pretend(tmp_path, [f"{arm}-{seed}" for arm in ARMS for seed in (0, 2)])
    assert find_arms(tmp_path)["planner"] == {s: tmp_path / f"planner-{s}" for s in (0, 2)}
    pretend(tmp_path, ["uniform-7", "finetuned"])
    with pytest.raises(CheckpointError, match="lacks dense_fp32-7, dense_int8-7, dense_int4-7, "):
        find_arms(tmp_path)


def test_no_blank_to_skip_is_nothing_missing(tmp_path: Path) -> None:
    pretend(tmp_path, [f"{arm}-0" for arm in ARMS if arm != "blank_skip"], factorised=False)
    assert "blank_skip" not in find_arms(tmp_path)
    pretend(tmp_path / "other", [f"{arm}-0" for arm in ARMS if arm != "blank_skip"])
    with pytest.raises(CheckpointError, match="lacks blank_skip-0;"):
        find_arms(tmp_path / "other")


def test_recordings_are_of_dev_splits_and_spread(folder: Path) -> None:
    data = (str(folder / "dev.tsv"),)
    whole = read_manifest(folder / "dev.tsv")
    planning, reporting = (development(data, half) for half in (PLANNING, REPORTING))
    assert planning == whole[::2] and reporting == whole[1::2]
    assert development(data, PLANNING, 5) == planning[::2]
    assert development(data, REPORTING, 99) == reporting
    twice = development(2 * data, REPORTING, 3)
    assert twice[:3] == twice[3:] and not {u.path for u in twice} & {u.path for u in planning}
    with pytest.raises(DataError, match="has no utterances of split dev"):
        development((str(folder / "train.tsv"),), PLANNING)
    with pytest.raises(DataError, match="there is no speech set 'moon'"):
        development(("moon",), PLANNING)


# -- arms that miss ----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_arm_that_misses_its_wer_is_the_nearest_that_was_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole preparation goes on, and the report says so."""
    carry_out, tried = energy_prepare._Workshop.carry_out, list[Tried]()

    def worse(self: Any, plan: CompressionPlan) -> Any:
        made, found = carry_out(self, plan)
        if plan.made_by == "size_optimal":
            found = replace(found, increase=Increase(2.0 + len(tried), (2.0, 3.0)))
            tried.append(found)
        return made, found

    monkeypatch.setattr(energy_prepare._Workshop, "carry_out", worse)
    how = {"runs": tmp_path / "runs", "seeds": (0,), "rounds": 2}
    made = prepare(arms_options(folder, **how))
    assert tuple(made) == ARMS and len(tried) == 2
    outcome = Outcome.load(made["size_optimal"][0])
    assert outcome.wer_increase == 2.0 and outcome.missed_by == pytest.approx(0.5)
    assert plan(made["size_optimal"][0]) == tried[0].plan
    report = run(energy_options(folder, arms=tmp_path / "runs" / "1-steps"))
    assert report.missed["size_optimal"] == pytest.approx(0.5)
    assert report.to_dict()["details"]["missed_max_wer_increase_by"] == report.missed


def test_a_rule_that_predicts_no_plan_gives_the_nearest() -> None:
    """Its curves are of models that are not fine-tuned, so it may do well all the same."""
    problem, rule = drawn(3), nearest(uniform)
    with pytest.raises(InputError, match="no plan keeps the WER increase to"):
        uniform(problem, -0.1)
    found = rule(problem, Budget(-0.1))
    assert found.made_by == "uniform" and found.wer_increase >= 0.0
    assert rule(problem, Budget(0.02)) == uniform(problem, 0.02)

    def hopeless(*_: Any) -> CompressionPlan:
        raise InputError("it lacks candidates")

    with pytest.raises(InputError, match="it lacks candidates"):
        nearest(hopeless)(problem, Budget(0.0))


def test_the_best_is_one_that_kept_to_its_wer() -> None:
    arms = {"a": Outcome(0.01, 0.03, 0.2, 1, None), "b": Outcome(0.01, 0.01, 0.4, 1, None)}
    assert best_of(arms) == "b" and [a.missed_by for a in arms.values()] == pytest.approx([0.02, 0])
    assert best_of({**arms, "c": Outcome(0.01, -0.01, 0.3, 1, None)}) == "c"


def test_a_grid_of_fewer_levels_starts_from_the_same_bits() -> None:
    few, all_of = grids_of((0.6, 0.3)), grids_of()
    assert {g.levels for g in few.values()} == {(0.3, 0.6)}
    assert {g.bits for g in (*few.values(), *all_of.values())} == {(8, 4)}
    assert all(len(few[n].every) < len(all_of[n].every) for n in few)
    with pytest.raises(ConfigError, match="level"):
        grids_of((0.3, 1.5))


def test_the_command_hands_on_what_bounds_the_work(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[ArmsOptions] = []

    def noted(options: ArmsOptions, tell: Any, on_estimate: Any) -> None:
        given.append(options)
        on_estimate(Estimate(7, 1.0, 2, 3))
        raise InputError("that will do")

    monkeypatch.setattr(energy_prepare, "prepare", noted)
    words = ("bench", "energy", "--finetune-steps", "5", "--recipe", folder / "recipe.py")
    bounds = ("--levels", "0.6", "--levels", "0.3", "--rounds", "1", "--limit", "12")
    status, _, err = offramp(capsys, *words, *bounds, "--seeds", "2")
    assert status == 2 and "that will do" in err and "at most 7 WERs of about 1 s each" in err
    (options,) = given
    assert (options.rounds, options.limit, options.seeds) == (1, 12, (0, 1))
    assert {grid.levels for grid in options.grids.values()} == {(0.3, 0.6)}
    assert (options.finetune_steps, options.recipe) == (5, folder / "recipe.py")
    offramp(capsys, "bench", "energy")
    assert (given[1].finetune_steps, given[1].seeds) == (0, (0,))
    offramp(capsys, "bench", "energy", "--finetune-steps", "5")
    assert given[2].seeds == (0, 1, 2)
    status, _, err = offramp(capsys, *words, "--levels", "1.5")
    assert status == 2 and "level is 1.5" in err


def test_an_arm_without_its_outcome_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*; delete .* and make it anew"):
        Outcome.load(tmp_path)
    (tmp_path / "arm.json").write_text('{"wer_increase": 0.1}')
    with pytest.raises(CheckpointError, match="Outcome lacks max_wer_increase, "):
        Outcome.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": ()}, InputError, "give at least one"),
        ({"seeds": (1, 1)}, InputError, "each once"),
        ({"finetune_steps": -1}, ConfigError, "finetune_steps is -1"),
        ({"finetune_steps": 0}, InputError, "without fine-tuning nothing is drawn; give one"),
        ({"recipe": None}, InputError, "finetune_steps is 1, which takes a recipe; give the one"),
        ({"max_wer_increase": 0.0}, ConfigError, "max_wer_increase is 0"),
    ],
)
def test_arms_that_could_not_be_compared_are_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        arms_options(folder, **changes)


# -- figures -----------------------------------------------------------------------------------

EDGE, MCU = load_profile("edge45"), load_profile("mcu")


def row(wer: float, edge: float, mcu: float, missed: float = 0.0) -> Row:
    size = 1000
    made = CompressionPlan(
        "exact", "0" * 64, {}, 320.0, None, wer, 0.0, (0.0, 0.0), size, {"mcu": mcu}, {"mcu": {}}
    )
    runs = Plan((Component("c", (Part("w", size, size),), {}),), {"c": CallRate(1.0)}, 3.0)
    mj = {"edge45": edge, "mcu": mcu}
    timing = Timing(0.1, SpeechLatency(400.0, 300.0, 500.0, 9), Latency(90.0, 80.0, 99.0))
    outcome = Outcome(0.01, 0.01 + missed, max(edge / 10, mcu / 20), 1, None)
    return Row(wer, (wer - 0.01, wer + 0.01), {0: wer}, size, mj, timing, made, runs, outcome)


def report(planner: Row, **rows: Row) -> EnergyReport:
    made = {
        "dense_fp32": row(0.2, 10.0, 20.0),
        "uniform": row(0.21, 5.0, 8.0),
        "global_magnitude": row(0.205, 4.0, 9.0),
        PLANNER: planner,
        PLANNER_FREE: row(0.2, 1.0, 3.0),
        **rows,
    }
    apart = Difference(planner.wer - 0.205, (-0.01, 0.02))
    differences = {PLANNER: apart, PLANNER_FREE: apart}
    fractions = {"uniform": {"edge45": 1.0, "mcu": 0.9}, "dense_fp32": {"edge45": 1.0, "mcu": 1.0}}
    return EnergyReport(100, ("toy",), (0,), (EDGE, MCU), made, differences, fractions)


def test_the_saving_is_against_the_best_of_uniform_and_global() -> None:
    """By the profile where each takes most: 50 % for uniform, 45 % for global."""
    made = report(row(0.205, 2.0, 3.0))
    assert made.best == "global_magnitude"
    assert made.saving(PLANNER) == pytest.approx({"edge45": 0.5, "mcu": 1 - 3 / 9})
    assert report(row(0.2, 1, 1), global_magnitude=row(0.2, 6, 8)).best == "uniform"


def test_a_saving_at_a_higher_wer_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(row(0.205 + EQUAL_WER, 2.0, 3.0)).saving(PLANNER)["edge45"] == 0.5
    made = report(row(0.2071, 2.0, 3.0))
    assert made.saving(PLANNER) == {"edge45": None, "mcu": None}
    assert made.to_dict()["planner_saving_at_equal_wer"] == {"edge45": None, "mcu": None}
    terminal_energy.show_energy_bench(made)
    shown = capsys.readouterr().out
    assert "WER 20.71 and 20.50 %, difference +0.21, 95 % -1.00 to +2.00, not within 0.2, " in shown
    assert "so this is no saving at equal WER; modelled energy less by 50 % on edge45, " in shown
    assert "planner free chunk (chunks of 320 ms) against global magnitude: WER 20.00 and " in shown
    assert "-1.00 to +2.00, within 0.2; modelled energy less by 75 % on edge45" in shown
    assert made.to_dict()["details"]["less_energy_at_any_wer"][PLANNER]["edge45"] == 0.5


def test_shares_of_draws_and_arms_that_missed_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    made = report(row(0.2, 2.0, 9.0), uniform=row(0.21, 5.0, 8.0, missed=0.0123))
    assert not made.robustly_better("uniform") and made.robustly_better("dense_fp32")
    longer = replace(row(0.2, 3.0, 2.0), plan=replace(made.rows[PLANNER].plan, chunk_ms=640.0))
    other = replace(made, rows={**made.rows, "longer_chunk": longer})
    assert rival(other.rows, "longer_chunk") == PLANNER_FREE, "equal chunks are compared"
    assert rival(other.rows, "uniform") == PLANNER and not other.robustly_better("longer_chunk")
    assert made.best == "global_magnitude" and list(made.missed) == ["uniform"]
    terminal_energy.show_energy_bench(made)
    shown = capsys.readouterr().out
    lines = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["uniform", "100.0", "90.0", "no"] in lines
    assert ["dense", "fp32", "100.0", "100.0", "yes"] in lines
    assert "uniform: nothing that was tried kept to the WER" in shown and "1.23 points" in shown
    assert "in at least 90.0 % of them" in shown
    terminal_energy.show_estimate(Estimate(120, 30.0, 55, 200))
    said = capsys.readouterr().err
    assert "at most 120 WERs of about 30 s each, 60 min; then at most 55 plans carried out" in said


def test_rank_stability_is_the_least_fraction() -> None:
    made = report(row(0.2, 1.0, 1.0))
    shares = {"uniform": {"edge45": 1.0, "mcu": 0.75}, "size_optimal": {"edge45": 0.8, "mcu": 0.9}}
    assert replace(made, fractions=shares).rank_stability == 0.75


def test_the_pareto_front_holds_what_nothing_matches() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 2.0), (4.0, 1.0)]
    assert pareto(points) == [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0)]
