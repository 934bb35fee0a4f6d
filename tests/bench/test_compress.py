"""offramp compress, end to end on a toy: a plan is found, carried out, checked and saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import toy_encoder
import toy_streaming
from commands import offramp
from offramp.audio.io import read_audio
from offramp.bench import compress
from offramp.bench.asr import AsrData
from offramp.bench.compress import CompressOptions, CompressReport, finished, run, settings_of
from offramp.bench.compress_measure import MEASURED, Ear, Measurements
from offramp.bench.compress_rounds import SearchOptions, Session, Tried, search
from offramp.bench.stream_profile import ProfileOptions
from offramp.bench.stream_profile import run as profile
from offramp.compress.checkpoint import save_compressed
from offramp.compress.components import stored_weights
from offramp.compress.plan import Choice, CompressionPlan
from offramp.compress.problem import Budget, Problem
from offramp.compress.rounding import input_moments
from offramp.compress.sensitivity import Grid, Increase, Point
from offramp.data.manifest import Utterance, read_manifest, write_manifest
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.errors import CheckpointError, ConfigError, DataError, InputError
from offramp.models.ctc_checkpoint import save_encoder
from offramp.models.fingerprint import fingerprint
from offramp.streaming import StreamingRecognizer
from toy_plans import alike, drawn
from toy_streaming import RATE, babble

GRIDS = {
    "encoder": Grid(("feed_forward",), (0.1, 0.3), (32, 8), ("int8",)),
    "joiner": Grid(("magnitude",), (0.1, 0.3), (32, 8)),
}
WER = Budget(0.6)
SECONDS = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model m, and a development set of which it makes no errors."""
    made = tmp_path_factory.mktemp("compress")
    sizes = {"factorised_blank": True, "ctc_head": True, "time_reduction": 4, "seed": 5}
    toy_streaming.save(made / "m", **sizes)
    recognizer, utterances = StreamingRecognizer.load(made / "m"), []
    for i in range(10):
        samples = babble(SECONDS, seed=i)
        soundfile.write(made / f"{i}.wav", samples.numpy(), RATE, subtype="FLOAT")
        text = recognizer.transcribe(samples)
        assert text
        utterances.append(Utterance(made / f"{i}.wav", SECONDS, "s", "dev", text))
    write_manifest(made / "dev.tsv", utterances)
    return made


def options(**changes: Any) -> CompressOptions:
    how = {"budget": WER, "grids": GRIDS, "hardware": ("edge45", "mcu"), "blank_skips": (0.5,)}
    return CompressOptions(**{**how, **changes})


@pytest.fixture(scope="module")
def small(folder: Path) -> tuple[Path, CompressReport, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    report = run(
        str(folder / "m"),
        AsrData(folder / "dev.tsv"),
        folder / "small",
        options(),
        lambda done, total: told.append((done, total)),
    )
    return folder / "small", report, told


# -- the whole of it ---------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_saved_streams_and_takes_what_was_promised(
    folder: Path, small: tuple[Path, CompressReport, Any]
) -> None:
    out, report, told = small
    plan = CompressionPlan.load(out / "plan.json")
    plan.check(StreamingRecognizer.load(folder / "m").model)
    assert plan == report.best.plan and report.wer == 0.0
    assert report.best.increase.value <= 0.6
    assert any(choice.bits == 8 for choice in plan.choices.values())
    loaded = StreamingRecognizer.load(out)
    assert loaded.model.ctc_head is None, "only training needs it"
    assert loaded.config.blank_skip == plan.blank_skip, "so no flag is needed"
    how = StreamOptions()
    found = Ear(loaded.model, loaded.pieces, read_manifest(folder / "dev.tsv"))
    assert found.wer == pytest.approx(report.best.increase.value)
    assert report.best.stored_bytes < report.dense_bytes
    stored = stored_weights(loaded.model)
    assert report.best.stored_bytes == sum(held.stored_bytes for held in stored.values())
    assert plan.stored_bytes == report.best.stored_bytes, "not fine-tuned, so to the byte"
    energies = profile(str(out), folder / "0.wav", ProfileOptions(("edge45", "mcu"), how)).energies
    dense = profile(str(folder / "m"), folder / "0.wav", ProfileOptions(("edge45", "mcu"))).energies
    for ours, theirs in zip(energies, dense, strict=True):
        assert ours.mj_per_audio_s < theirs.mj_per_audio_s
    assert told[-1][0] <= told[-1][1] and told == sorted(told)


@pytest.mark.slow
def test_the_report_says_what_every_figure_is(
    folder: Path, small: tuple[Path, CompressReport, Any]
) -> None:
    out, report, _ = small
    names = ("config.json", "model.safetensors", "tokenizer.json", "plan.json", MEASURED)
    assert {p.name for p in out.iterdir()} == {*names, "sensitivity.csv", "energy-report.json"}
    made = json.loads((out / "energy-report.json").read_text())
    assert made == json.loads(json.dumps(report.to_dict()))
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder / "m", out)]
    assert made["file_bytes"] == {"dense": sizes[0], "compressed": sizes[1]}
    assert sizes[1] > made["bytes"]["compressed"], "a table of contents comes first"
    assert report.summary.startswith("modelled ") and " on edge45 (" in report.summary
    assert "over profiles), not measured; WER +" in report.summary
    for part in ("dense", "compressed"):
        assert list(made[part]) == ["edge45", "mcu"]
        assert all(e["kind"] == "modelled" for e in made[part].values())
    (last,) = made["rounds"][-1:]
    assert last["additivity_error"] == pytest.approx(
        last["wer_increase"] - last["predicted_wer_increase"]
    )
    rows = (out / "sensitivity.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(len(grid.every) for grid in GRIDS.values())
    assert {"size_optimal", "paper_rule"} <= set(made["baselines"])
    assert made["front"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_plan(
    folder: Path,
    small: tuple[Path, CompressReport, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, measure = [0], Ear.increase

    def counted(self: Ear, *args: Any) -> Increase:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(Ear, "increase", counted)
    words = (str(folder / "m"), AsrData(folder / "dev.tsv"), tmp_path / "out", options())
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [MEASURED]
    report = run(*words)
    assert report.best.plan == small[1].best.plan
    whole = 1 + sum(len(grid.every) for grid in GRIDS.values()) + len(report.tried)
    assert calls[0] == whole + 1, "the one that was interrupted came twice"
    again = run(*words[:3], options(budget=Budget(0.61)))
    assert calls[0] == whole + 1 + len(again.tried), "nothing of the curves is measured anew"


@pytest.mark.slow
def test_a_plan_of_an_earlier_run_is_carried_out(
    folder: Path, small: tuple[Path, CompressReport, Any], tmp_path: Path
) -> None:
    out, report, _ = small
    how = options(budget=None, plan=out / "plan.json")
    again = run(str(folder / "m"), AsrData(folder / "dev.tsv"), tmp_path / "o", how)
    assert again.best == report.best and not again.front and not again.baselines
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.slow
def test_an_energy_budget_holds_on_every_profile(
    folder: Path, small: tuple[Path, CompressReport, Any], tmp_path: Path
) -> None:
    """With what was measured for the other budget."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / MEASURED).write_text((small[0] / MEASURED).read_text())
    dense = max(e.mj_per_audio_s for e in small[1].dense)
    how = options(budget=Budget(None, 0.6 * dense))
    report = run(str(folder / "m"), AsrData(folder / "dev.tsv"), tmp_path / "o", how)
    assert max(report.best.mj_per_audio_s.values()) <= 0.6 * dense
    assert min(report.best.mj_per_audio_s.values()) > 0


def test_what_is_saved_skips_blanks_as_its_plan_does(folder: Path) -> None:
    model = StreamingRecognizer.load(folder / "m").model
    chunking = replace(model.config.chunking, chunk=5)
    made = finished(model, chunking, 0.5)
    assert made.config.blank_skip == made.encoder.config.blank_skip == 0.5
    assert made.config.chunking.chunk == 5 and made.ctc_head is None
    assert model.config.blank_skip is None and model.ctc_head is not None, "a copy"
    assert finished(made, chunking, None).config.blank_skip == 0.5, "its own, if none is chosen"


def test_a_threshold_that_is_the_model_s_own_is_not_tried_twice(folder: Path) -> None:
    loaded = StreamingRecognizer.load(folder / "m")
    ear = Ear(loaded.model, loaded.pieces, read_manifest(folder / "dev.tsv"))
    session = Session(loaded.model, ear, (), None)
    both = settings_of(session, (240.0, 120.0), (0.5, 0.3))
    assert both == [(120.0, s) for s in (None, 0.5, 0.3)] + [(240.0, s) for s in (None, 0.5, 0.3)]
    own = finished(loaded.model, loaded.model.config.chunking, 0.5)
    assert settings_of(replace(session, model=own), (), (0.5, 0.3)) == [(120.0, None), (120.0, 0.3)]
    plain = toy_streaming.model(time_reduction=4)
    assert settings_of(replace(session, model=plain), (), (0.5,)) == [(120.0, None)]


# -- rounds ------------------------------------------------------------------------------------


def rounds(
    monkeypatch: pytest.MonkeyPatch,
    off: list[float],
    budget: Budget,
    bolder: bool = False,
    problem: Problem | None = None,
) -> tuple[Tried, tuple[Tried, ...]]:
    """Plans that really cost so much more WER than predicted, one after the other."""
    errors = iter(off)

    def carry_out(plan: CompressionPlan) -> tuple[str, Tried]:
        value = plan.wer_increase + next(errors)
        return "model", Tried(plan, Increase(value, (value, value)), 1, ())

    def taken(self: Tried) -> dict[str, float]:
        return dict(self.plan.modelled_mj_per_audio_s)

    monkeypatch.setattr(Tried, "mj_per_audio_s", property(taken))
    how = SearchOptions(3, bolder=bolder)
    _, best, tried = search(carry_out, problem or drawn(3), budget, how)
    return best, tried


def test_a_plan_within_the_budget_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    best, tried = rounds(monkeypatch, [-0.01], Budget(0.05))
    assert tried == (best,)


def test_a_budget_that_was_missed_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    best, tried = rounds(monkeypatch, [0.02, 0.0], Budget(0.05))
    assert len(tried) == 2 and best is tried[1]
    assert tried[0].increase.value > 0.05 >= best.increase.value
    assert best.plan.wer_increase <= 0.03 + 1e-9


def test_a_plan_that_is_far_off_is_followed_by_one_that_dares_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best, tried = rounds(monkeypatch, [0.5, 0.0], Budget(0.05))
    assert best.plan.wer_increase < tried[0].plan.wer_increase / 5


def test_what_fine_tuning_spares_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    best, tried = rounds(monkeypatch, [-0.02, -0.02, -0.02], Budget(0.05), bolder=True)
    assert len(tried) > 1 and best.plan.wer_increase > 0.05
    assert best.increase.value <= 0.05
    mj = [t.plan.modelled_mj_per_audio_s["small"] for t in tried]
    assert mj[-1] < mj[0]


def test_a_plan_that_misses_is_not_tried_again_though_nothing_was_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Levels up to 0.4 seem to cost nothing, so no smaller budget leads away from them."""
    problem = alike(lambda level: 0.0 if level <= 0.4 else 0.01)
    best, tried = rounds(monkeypatch, [0.02, 0.02, 0.0], Budget(0.005), problem=problem)
    assert [t.plan.wer_increase for t in tried] == [0.0, 0.0, 0.0]
    assert len({str(t.plan.choices) for t in tried}) == 3 and best is tried[2]
    mj = [t.plan.modelled_mj_per_audio_s["one"] for t in tried]
    assert mj == sorted(mj) and mj[0] < mj[-1]


def test_a_budget_that_no_plan_keeps_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"none kept to .*\+5\.00 \(the nearest is \+\d"):
        rounds(monkeypatch, [0.2, 0.2, 0.2], Budget(0.05))


# -- measurements ------------------------------------------------------------------------------


def test_measurements_survive_the_disk_and_are_of_one_thing(tmp_path: Path) -> None:
    path, of = tmp_path / MEASURED, {"model": "a", "development set": "b"}
    kept = Measurements(path, of)
    point = Point("joiner", Choice("blocks", 0.1, 4, "int8"), True, Increase(0.1, (0.0, 0.2)))
    kept.add(point)
    again = Measurements(path, of)
    assert again.points == [point] and again.to_json() == kept.to_json()
    assert again.known == {("joiner", point.choice, True): point.increase}
    with pytest.raises(InputError, match="was measured with another development set; choose a new"):
        Measurements(path, of | {"development set": "c"})
    for text in ("{", "[]", '{"of": {}}', '{"of": {}, "settings": [], "points": [{}]}'):
        path.write_text(text)
        with pytest.raises(DataError, match="holds no measurements of offramp compress"):
            Measurements(path, of)


def test_the_trace_is_of_recordings_all_over_the_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer = StreamingRecognizer.load(folder / "m")
    utterances = read_manifest(folder / "dev.tsv")
    ear = Ear(recognizer.model, recognizer.pieces, utterances)
    whole = ear.trace(recognizer.model, StreamOptions())
    assert whole.audio_s == pytest.approx(10 * SECONDS)
    monkeypatch.setattr("offramp.bench.compress_measure.TRACED_S", 0.99 * SECONDS)
    assert ear.trace(recognizer.model, StreamOptions()).audio_s == SECONDS
    one = recognizer.open(StreamOptions())
    one.push(read_audio(utterances[0].path))
    one.finish()
    assert ear.trace(recognizer.model, StreamOptions()) == one.trace


def test_what_layers_hear_is_of_recordings_all_over_the_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer = StreamingRecognizer.load(folder / "m")
    model, utterances = recognizer.model, read_manifest(folder / "dev.tsv")
    ear = Ear(model, recognizer.pieces, utterances)
    monkeypatch.setattr("offramp.bench.compress_measure.GATHERED_S", 0.99 * SECONDS)
    found = ear.moments(model)
    plan = StreamPlan(model, ear.pieces, StreamOptions())
    with input_moments(model) as expected:
        plan.read_whole(read_audio(utterances[0].path))
    assert found.keys() == expected.keys() >= {"joiner.tokens", "encoder.layers.0.feed_forward.up"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    monkeypatch.setattr("offramp.bench.compress_measure.GATHERED_S", 10 * SECONDS)
    assert float(ear.moments(model)["joiner.tokens"].sum()) > float(found["joiner.tokens"].sum())


def test_models_of_several_seeds_are_told_together(folder: Path) -> None:
    loaded, own = StreamingRecognizer.load(folder / "m"), StreamOptions()
    ear = Ear(loaded.model, loaded.pieces, read_manifest(folder / "dev.tsv"))
    other = toy_streaming.model(seed=7, factorised_blank=True)
    alone = ear.increase(other, own)
    both = ear.increase_of([ear.own, ear.edits(other, own)])
    assert both.value == pytest.approx(alone.value / 2)


def test_the_wer_is_against_the_model_as_it_was(folder: Path) -> None:
    recognizer = StreamingRecognizer.load(folder / "m")
    ear = Ear(recognizer.model, recognizer.pieces, read_manifest(folder / "dev.tsv"))
    assert ear.wer == 0.0
    assert ear.increase(recognizer.model, StreamOptions()) == Increase(0.0, (0.0, 0.0))
    with pytest.raises(DataError, match="9 utterances are too few for a WER with an interval"):
        Ear(recognizer.model, recognizer.pieces, read_manifest(folder / "dev.tsv")[:9])
    found = ear.increase(toy_streaming.model(seed=7, factorised_blank=True), StreamOptions())
    assert found.value > 0.3 and found.ci95[0] <= found.value <= found.ci95[1]


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one budget"),
        (["--max-wer-increase", "1", "--energy-budget-mj", "3"], "give one budget"),
        (["--max-wer-increase", "1", "--plan", "{other}"], "give either one budget"),
        (["--max-wer-increase", "nan"], "the budget is nan"),
        (["--plan", "{other}"], "the plan was made for another model"),
        (["--plan", "{m}/config.json"], "config.json is no plan: it lacks"),
        (["--plan", "none.json"], "cannot read none.json"),
        (["--max-wer-increase", "1", "--hardware", "phone"], "no hardware profile 'phone'"),
        (["--max-wer-increase", "1", "-o", "{m}"], "holds the model that is to be compressed"),
        (["--max-wer-increase", "1", "-o", "{full}"], "holds note.txt and is no checkpoint"),
        (["--max-wer-increase", "1", "--finetune-steps", "5"], "give a recipe and steps, or"),
        (["--max-wer-increase", "1", "--recipe", "r.py"], "give a recipe and steps, or neither"),
        (["--max-wer-increase", "1", "--chunk-ms", "50"], "chunk_ms is 50"),
        (["--max-wer-increase", "1", "--data", "none.tsv"], "none.tsv is missing"),
        (["--max-wer-increase", "1", "--model", "lm-tiny"], "of type 'llama'"),
    ],
)
def test_errors_are_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    folder: Path,
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    plan = CompressionPlan(
        "exact", "0" * 64, {}, 240.0, None, 0.1, 0.0, (0.0, 0.0), 1, {"mcu": 1.0}, {"mcu": {}}
    )
    plan.save(tmp_path / "other.json")
    monkeypatch.chdir(tmp_path)
    places = {"m": folder / "m", "other": tmp_path / "other.json", "full": tmp_path / "full"}
    given = [word.format(**places) for word in words]
    for name, value in (("--model", folder / "m"), ("--data", folder / "dev.tsv"), ("-o", "out")):
        given += [] if name in given else [name, str(value)]
    status, _, err = offramp(capsys, "compress", *given)
    assert status == 2 and message in err, err
    assert err.startswith("offramp: ") and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_names_the_nearest_and_loses_nothing(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    small: tuple[Path, CompressReport, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compress, "GRIDS", GRIDS)
    out = tmp_path / "out"
    out.mkdir()
    (out / MEASURED).write_text((small[0] / MEASURED).read_text())
    for words, message in (
        (("--max-wer-increase", "-3"), "the nearest that can be met is +0.00"),
        (("--energy-budget-mj", "1e-9"), "on each of edge45; the nearest that can be met is"),
    ):
        status, _, err = offramp(
            capsys,
            *("compress", "--model", folder / "m", "--data", folder / "dev.tsv", "-o", out),
            *("--hardware", "edge45", *words),
        )
        assert status == 2 and message in err.splitlines()[-1]
    assert [p.name for p in out.iterdir()] == [MEASURED]
    kept, before = (json.loads((f / MEASURED).read_text())["points"] for f in (out, small[0]))
    assert kept == before


@pytest.mark.slow
def test_the_command_shows_plan_energy_and_a_closing_line(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    small: tuple[Path, CompressReport, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(compress, "GRIDS", GRIDS)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / MEASURED).write_text((small[0] / MEASURED).read_text())
    words = ["compress", "--model", folder / "m", "--data", folder / "dev.tsv", "-o"]
    words += [tmp_path / "o", "--max-wer-increase", "60", "--plot", tmp_path / "f.png"]
    status, shown, _ = offramp(capsys, *words)
    assert status == 0
    assert "modelled, memory-traffic energy; not measured" in shown
    bytes_of = ("kB of weights as they run", "kB of model.safetensors")
    for name in ("encoder", "joiner", "mJ per s, mcu", *bytes_of):
        assert name in shown
    assert shown.splitlines()[-1].startswith("modelled ")
    assert "not measured; WER +" in shown.splitlines()[-1]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds is 0"):
        options(rounds=0)
    with pytest.raises(InputError, match="curve_steps 3; give a recipe and steps, or neither"):
        options(curve_steps=3)
    with pytest.raises(InputError, match="give either one budget, or the file of a plan"):
        options(budget=None)


def test_a_model_that_is_compressed_already_is_refused_before_the_work(
    folder: Path, tmp_path: Path
) -> None:
    """And its folder is as it was, so that a later run may have it."""
    made = toy_streaming.model(factorised_blank=True)
    save_compressed(made, tmp_path / "c", {"tokenizer.json": toy_streaming.tokenizer().to_json()})
    data, out = AsrData(folder / "dev.tsv"), tmp_path / "out"
    with pytest.raises(InputError, match="is compressed already; give the model that it was made"):
        run(str(tmp_path / "c"), data, out, options())
    assert not out.exists()


def test_an_output_folder_is_looked_at_before_the_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    words = (str(folder / "m"), AsrData(folder / "dev.tsv"))
    with pytest.raises(CheckpointError, match=r"holds note\.txt and is no checkpoint"):
        run(*words, tmp_path, options())
    with pytest.raises(InputError, match="cannot write to"):
        run(*words, tmp_path / "note.txt", options())


# -- fine-tuning -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_is_fine_tuned_by_the_recipe(
    folder: Path, small: tuple[Path, CompressReport, Any], tmp_path: Path
) -> None:
    """With its teacher; and zeros stay zeros until the bits come."""
    source = StreamingRecognizer.load(folder / "m").model
    tokens = (folder / "m" / "tokenizer.json").read_text()
    alike = {"subsampling": 4, "vocab_size": source.config.vocab_size}
    teacher = toy_encoder.encoder(pad_edges=True, **alike)
    save_encoder(teacher, tmp_path / "teacher", files={"tokenizer.json": tokens})
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"""
from offramp.train.loop import TrainConfig
from offramp.train.speech import TransducerRecipe
from offramp.train.transducer import TransducerTraining
recipe = TransducerRecipe(
    name="toy", model="unused", sets=({str(folder / "train.tsv")!r},), prefetch=False,
    augmentation=None, batch_seconds=5.0, train=TrainConfig(9, 1e-2, 2),
    training=TransducerTraining(chunks=(3,), window=3, distill=0.5),
    teacher={str(tmp_path / "teacher")!r},
)
"""
    )
    heard = [replace(u, split="train", text="do re") for u in read_manifest(folder / "dev.tsv")]
    write_manifest(folder / "train.tsv", heard)
    choices = {"joiner": Choice("magnitude", 0.5), "encoder": Choice("feed_forward", 0.5)}
    plan = replace(small[1].best.plan, choices=choices, model=fingerprint(source))
    plan.save(tmp_path / "p.json")
    how = options(budget=None, plan=tmp_path / "p.json", recipe=recipe, finetune_steps=3)
    data, out = AsrData(folder / "dev.tsv"), tmp_path / "o"
    report = run(str(folder / "m"), data, out, how)
    tuned = StreamingRecognizer.load(out).model
    zero = tuned.joiner.tokens.weight == 0
    assert float(zero.float().mean()) == pytest.approx(0.5, abs=0.01)
    own = source.joiner.tokens.weight
    assert bool(((tuned.joiner.tokens.weight != own) | zero).all()), "the rest has learned"
    assert tuned.encoder.layers[0].feed_forward.up.out_features == 12
    assert not (out / "finetune").exists() and report.best.plan == plan
    with pytest.raises(ConfigError, match="defines a SpeechRecipe; give the recipe of a streaming"):
        run(
            str(folder / "m"),
            data,
            tmp_path / "o2",
            replace(how, recipe=Path(__file__).parents[2] / "recipes" / "splitformer_tiny.py"),
        )
