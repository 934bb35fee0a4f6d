"""The Splitformer ablation: its arms, what "equal time" picks, and the bench on toy runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from offramp.audio.features import encoder_input
from offramp.bench import splitformer
from offramp.bench.equal_time import (
    ArmFigures,
    ExitFigures,
    Wer,
    affordable,
    best_at,
    edits_by_word,
    gap,
    pooled,
)
from offramp.bench.splitformer import SplitformerOptions, find_runs, take_edits
from offramp.bench.splitformer_arms import (
    ARMS,
    WORDS,
    ArmRecipe,
    arm_encoder,
    widen,
)
from offramp.bench.wer import Edits, word_edits
from offramp.cli import main
from offramp.config import EncoderConfig
from offramp.data.speech import HELD_OUT_SPEAKER, connected_digits
from offramp.decoding.early_exit_ctc import early_exit
from offramp.decoding.exit_policies import Confidence
from offramp.energy.cost import encoder_macs
from offramp.errors import CheckpointError, ConfigError, DataError
from offramp.models.ctc import CTCEncoder, early_exit_baseline, improved
from offramp.models.ctc import splitformer as published
from offramp.models.ctc_checkpoint import save_encoder
from offramp.recognizer import Recognizer
from offramp.tokenizer import BLANK, ctc_words
from offramp.train.loop import Evaluated, TrainConfig
from offramp.train.recipes import load_recipe
from offramp.train.speech import SpeechRecipe
from toy_encoder import randomize

RECIPE = Path(__file__).parents[2] / "recipes" / "splitformer_ablation.py"
TINY = EncoderConfig(16, 3, 2, 24, 5, len(WORDS) + 1, exits=(1, 2, 3))
TOY_ARMS = {
    "early_exit": TINY,
    "splitformer": replace(TINY, branches=(1, 3)),
    "ours": replace(improved(TINY), subsampling=8),
}
SEEDS = (0, 3)


def params(config: EncoderConfig) -> int:
    return sum(p.numel() for p in CTCEncoder(config).parameters())


# -- arms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_builds_and_is_trained_at_its_own_exits(arm: str) -> None:
    config = arm_encoder(arm)
    model = CTCEncoder(config)
    model.init_weights(0)
    state = model.eval().embed(torch.randn(1, 90, 80), torch.tensor([90]))
    state = model.run(state, 0, config.num_layers)
    assert model.log_probs(state, config.num_layers).shape[2] == len(WORDS) + 1
    depth = int(arm[-1]) if arm.startswith("single") else 6
    assert config.exits == ((depth,) if arm.startswith("single") else (2, 4, 6))


def test_the_controls_of_the_claim_are_equal_where_they_say_so() -> None:
    theirs = arm_encoder("splitformer")
    assert params(arm_encoder("full_rate")) == params(theirs)
    assert arm_encoder("full_rate").branch_factor == 1
    goal = encoder_macs(theirs, 300, 6)
    assert encoder_macs(arm_encoder("widened"), 300, 6) == pytest.approx(goal, rel=0.005)
    for frames in (150, 500):
        macs = encoder_macs(arm_encoder("widened"), frames, 6)
        assert macs == pytest.approx(encoder_macs(theirs, frames, 6), rel=0.01)
    narrow = replace(arm_encoder("widened"), d_ff=arm_encoder("early_exit").d_ff)
    assert narrow == arm_encoder("early_exit")
    for arm in ("ours", "early_exit_12hz"):
        assert arm_encoder(arm).output_frames(800) in (99, 100)


def test_the_published_sizes_can_be_widened_too() -> None:
    wide = widen(early_exit_baseline(), published(), 1500)
    goal = encoder_macs(published(), 1500, 12)
    assert encoder_macs(wide, 1500, 12) == pytest.approx(goal, rel=0.001)


def test_the_recipe_takes_arm_and_seed_as_settings() -> None:
    made: Any = load_recipe(RECIPE, {"arm": "widened", "seed": "2", "steps": "7"})
    assert (made.arm, made.train.seed, made.train.steps) == ("widened", 2, 7)
    with pytest.raises(ConfigError, match="arm is 'theirs'; allowed: single_2, single_4"):
        load_recipe(RECIPE, {"arm": "theirs"})
    told = RECIPE.read_text()
    assert all(f" {arm} " in told.replace(";", " ").replace("\n", " ") for arm in ARMS)


def test_words_are_tokens() -> None:
    tokenizer = ctc_words(WORDS)
    assert tokenizer.vocab_size == 11 and tokenizer.token_id(BLANK) == 0
    assert tokenizer.encode("nine zero zero") == [10, 1, 1]
    assert tokenizer.decode([10, 1, 1]) == "nine zero zero"
    recipe = SpeechRecipe("toy", TINY, TrainConfig(1, 1e-3), digit_strings=1, words=WORDS)
    with pytest.raises(ConfigError, match="vocab_size is 11 for 2 words; it must be 3"):
        replace(recipe, words=("yes", "no"))
    with pytest.raises(ConfigError, match="a checkpoint brings its own"):
        replace(recipe, encoder="asr-tiny")


# -- equal time ----------------------------------------------------------------------------------


def figures(*exits: tuple[int, float, float]) -> ArmFigures:
    """(exit, CPU seconds, WER) each."""
    sets = [{"main": Wer(wer, 0.0), "other": Wer(1.0 - wer, 0.0)} for _, _, wer in exits]
    made = zip(exits, sets, strict=True)
    return ArmFigures(1, {e: ExitFigures(wer, 1.0, t) for (e, t, _), wer in made})


def test_the_deepest_exit_in_the_time_counts_not_the_best() -> None:
    times = {2: 1.0, 4: 2.0, 6: 3.0}
    assert affordable(times, 2.5) == 4
    assert affordable(times, 1.96) == 4, "5 % more is equal"
    assert affordable(times, 1.9) == 2
    assert affordable(times, 0.9) is None
    arms = {
        "early_exit": figures((2, 1.0, 0.3), (4, 2.0, 0.2)),
        "single_2": figures((2, 1.02, 0.25)),
        "ours": figures((2, 0.6, 0.26), (4, 1.04, 0.27), (6, 1.5, 0.1)),
        "slow": figures((2, 9.0, 0.0)),
    }
    best = best_at(1.0, arms)
    assert (best.arm, best.exit_layer, best.wer_mean) == ("single_2", 2, 0.25)
    best = best_at(2.0, arms)
    assert (best.arm, best.exit_layer, best.cpu_s_per_audio_s) == ("ours", 6, 2.0)


def test_edits_at_words_add_up_to_the_edits_of_the_string() -> None:
    draw = random.Random(0)
    for _ in range(200):
        reference, hypothesis = (
            [draw.choice(WORDS[:3]) for _ in range(draw.randint(least, 6))] for least in (1, 0)
        )
        (whole,) = word_edits([" ".join(reference)], [" ".join(hypothesis)])
        found = edits_by_word(reference, hypothesis)
        assert [e.length for e in found] == [1] * len(reference)
        assert sum(e.errors for e in found) == whole.errors
    found = edits_by_word(["one", "two", "six"], ["nine", "one", "five", "six"])
    assert found == [Edits(0, 0, 1, 1), Edits(1, 0, 0, 1), Edits(0, 0, 0, 1)]
    assert edits_by_word(["one", "two"], ["one", "six", "two"])[0] == Edits(0, 0, 1, 1)
    assert edits_by_word(["one"], []) == [Edits(0, 1, 0, 1)]


def test_more_seeds_on_the_same_strings_do_not_make_the_interval_narrower() -> None:
    draw = random.Random(1)
    ours = [Edits(int(draw.random() < 0.1), 0, 0, 5) for _ in range(100)]
    theirs = [Edits(int(draw.random() < 0.3), 0, 0, 5) for _ in range(100)]
    once = gap((ours, theirs), (ours, theirs))
    thrice = gap((pooled([ours] * 3), pooled([theirs] * 3)), (ours, theirs))
    assert thrice.difference == pytest.approx(once.difference) and once.difference < 0
    assert thrice.ci95 == pytest.approx(once.ci95)
    assert once.significant
    unsure = replace(once, ci95_takes=(-0.1, 0.01))
    assert not unsure.significant, "both intervals must leave out 0"


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FSDD of two voices, three takes per digit: a tone for each digit, and some noise."""
    root = tmp_path_factory.mktemp("data")
    (root / "fsdd" / "flac").mkdir(parents=True)
    noise = np.random.default_rng(0)
    rows = ["path\tseconds\tspeaker\tsplit\ttext"]
    for speaker in ("ann", HELD_OUT_SPEAKER):
        for digit, word in enumerate(WORDS):
            for take, split in enumerate(("dev", "dev", "train")):
                name = f"flac/{digit}_{speaker}_{take}.flac"
                times = np.arange(2000 + 200 * take) / 8000
                wave = 0.3 * np.sin(2 * np.pi * (200 + 150 * digit) * times)
                wave += 0.05 * noise.standard_normal(len(times))
                soundfile.write(root / "fsdd" / name, wave, 8000)
                rows.append(f"{name}\t{len(times) / 8000}\t{speaker}\t{split}\t{word}")
    (root / "fsdd" / "manifest.tsv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained runs of three arms, two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for arm, config in TOY_ARMS.items():
        for seed in SEEDS:
            model = CTCEncoder(config)
            randomize(model, seed)
            files = {"tokenizer.json": ctc_words(WORDS).to_json()}
            save_encoder(model, folder / f"{arm}-{seed}" / "checkpoint", files=files)
    return folder


@pytest.fixture
def options(data: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> SplitformerOptions:
    monkeypatch.setenv("OFFRAMP_DATA", str(data))
    return SplitformerOptions(runs, tuple(TOY_ARMS), strings=17, held_out_strings=3, rounds=2)


@pytest.mark.slow
def test_the_figures_are_those_of_single_strings(options: SplitformerOptions) -> None:
    seen: list[tuple[int, int]] = []
    report = splitformer.run(options, lambda *at: seen.append(at))
    assert seen[-1] == (2 + 2 + 1 + 2, 2 + 2 + 1 + 2), "batches of the three sets, two rounds"
    told = json.loads(json.dumps(report.to_dict()))
    assert {"suite", "device", "seeds", "arms", "best_arm_at_equal_time"} <= set(told)
    assert (told["suite"], told["device"], told["seeds"]) == ("splitformer", "cpu", [0, 3])
    strings = connected_digits("dev", 17, seed=1)
    samples = [s.samples() for s in strings]
    audio_s = sum(map(len, samples)) / 16_000
    words = sum(len(s.takes) for s in strings)
    assert (told["words"]["unseen_takes"], told["words"]["noisy"]) == (words, words)
    for arm, config in TOY_ARMS.items():
        made = told["arms"][arm]
        assert made["params"] == params(config) and set(made["exits"]) == {"1", "2", "3"}
        models = [Recognizer.load(options.runs / f"{arm}-{seed}/checkpoint") for seed in SEEDS]
        alone = [_texts_alone(model, samples) for model in models]
        for nth, exit_layer in enumerate(config.exits):
            edits = [word_edits([s.text for s in strings], texts[nth]) for texts in alone]
            rates = [sum(e.errors for e in found) / words for found in edits]
            frames = [1 + (len(one) - 400) // 160 for one in samples]
            macs = sum(encoder_macs(config, n, exit_layer) for n in frames)
            at = made["exits"][str(exit_layer)]
            assert at["wer_mean"] == pytest.approx(np.mean(rates))
            assert at["wer_std"] == pytest.approx(np.std(rates, ddof=1))
            assert at["macs_per_audio_s"] == pytest.approx(macs / audio_s)
            assert at["cpu_s_per_audio_s"] > 0
            assert at["wer_mean_noisy"] != at["wer_mean"] != at["wer_mean_held_out"]


def _texts_alone(model: Recognizer, samples: list[torch.Tensor]) -> list[list[str]]:
    """What each exit writes for each of the samples, one by one."""
    texts: list[list[str]] = [[] for _ in model.config.exits]
    for one in samples:
        x, lengths = encoder_input([one])
        (left,) = early_exit(model.encoder, model.config.exits, x, lengths, Confidence(2.0))
        for some, tested in zip(texts, left.trail, strict=True):
            some.append(ctc_words(WORDS).decode(tested.hypothesis.tokens))
    return texts


@pytest.mark.slow
def test_ours_is_set_beside_each_baseline_at_its_own_time(
    options: SplitformerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {
        "early_exit": {1: 1.0, 2: 2.0, 3: 3.0},
        "splitformer": {1: 1.3, 2: 2.3, 3: 3.6},
        "ours": {1: 1.1, 2: 1.35, 3: 2.9},
    }
    monkeypatch.setattr(splitformer, "cpu_times", lambda *given: times)
    told = splitformer.run(replace(options, strings=6)).to_dict()
    ours = {b: {e: p["our_exit"] for e, p in by.items()} for b, by in told["paired"].items()}
    assert ours == {"early_exit": {"2": 2, "3": 3}, "splitformer": {"1": 2, "2": 2, "3": 3}}
    exits = {arm: made["exits"] for arm, made in told["arms"].items()}
    for baseline, by_exit in told["paired"].items():
        for exit_layer, pair in by_exit.items():
            mine, theirs = exits["ours"][str(pair["our_exit"])], exits[baseline][exit_layer]
            for name in ("unseen_takes", "noisy", "held_out"):
                key = "wer_mean" if name == "unseen_takes" else f"wer_mean_{name}"
                found = pair[name]
                assert found["difference"] == pytest.approx(mine[key] - theirs[key])
                assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
                assert found["ci95_takes"][0] <= found["difference"] <= found["ci95_takes"][1]
                assert isinstance(found["significant"], bool)
    assert told["paired"]["early_exit"]["2"]["cpu_ratio"] == pytest.approx(1.35 / 2)
    best = told["best_arm_at_equal_time"]
    assert set(best) == {"1", "2", "3"} and best["1"]["arm"] == "early_exit"


def test_takes_gather_the_edits_of_all_strings_that_they_are_in(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFRAMP_DATA", str(data))
    strings = connected_digits("dev", 30)
    written = [s.text.replace("six", "two").replace("nine", "") for s in strings]
    takes = sorted({take for s in strings for take in s.takes})
    found = dict(zip(takes, take_edits(strings, written), strict=True))
    for take, edits in found.items():
        uses = sum(s.takes.count(take) for s in strings)
        wrong = uses if take.name[0] in "69" else 0
        assert (edits.length, edits.errors) == (uses, wrong)


def test_time_is_that_of_the_exit_alone() -> None:
    model = CTCEncoder(TOY_ARMS["splitformer"])
    randomize(model, 0)
    ran: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, at=index: ran.append(at))
    batch = (*encoder_input([torch.randn(16_000)]), 1.0)
    times = splitformer.cpu_times({"arm": model.eval()}, [batch], rounds=1)
    assert set(times["arm"]) == {1, 2, 3} and min(times["arm"].values()) > 0
    assert sorted(ran) == sorted(2 * [0, 0, 1, 0, 1, 2]), "a round that is not measured, and one"


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    runs: Path, tmp_path: Path, options: SplitformerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_runs(runs, tuple(TOY_ARMS))
    assert list(found) == list(TOY_ARMS)
    assert found["ours"] == {s: runs / f"ours-{s}" / "checkpoint" for s in SEEDS}
    with pytest.raises(CheckpointError, match=r"lacks widened-0, widened-3; .* arm=widened"):
        find_runs(runs, (*TOY_ARMS, "widened"))
    with pytest.raises(CheckpointError, match=r"lacks ours-0; .*ablation\.py .*--set seed=0 --out"):
        find_runs(tmp_path, ("ours",))
    monkeypatch.setenv("OFFRAMP_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"fsdd.manifest\.tsv is missing; set OFFRAMP_DATA"):
        splitformer.run(options)


def test_the_command_says_in_one_line_that_there_are_no_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "splitformer", "--runs", str(tmp_path)])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "lacks single_2-0, single_4-0" in said


@pytest.mark.slow
def test_the_command_shows_a_table_and_writes_json(
    options: SplitformerOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(splitformer, "SplitformerOptions", lambda runs: options)
    with pytest.raises(SystemExit) as left:
        main(["bench", "splitformer", "--json", str(tmp_path / "out.json")])
    assert not left.value.code
    shown = capsys.readouterr().out
    assert "WER of ours less theirs" in shown and "splitformer" in shown
    told = json.loads((tmp_path / "out.json").read_text())
    assert set(told["arms"]) == set(TOY_ARMS) and told["threads"] == torch.get_num_threads()


def test_a_run_of_the_recipe_is_one_that_the_bench_reads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFRAMP_DATA", str(data))
    recipe = ArmRecipe("toy", TrainConfig(2, 1e-3, 1), "ours", 4, 3.0, dev_digit_strings=2)
    events = list(recipe.run(tmp_path / "ours-0"))
    (last,) = (e.metrics for e in events if isinstance(e, Evaluated))
    assert {f"token_error_rate_exit_{e}" for e in (2, 4, 6)} < set(last)
    made = splitformer.run(SplitformerOptions(tmp_path, ("ours",), 3, 3, 1))
    assert made.seeds == (0,) and not made.paired and not made.best
    assert made.arms["ours"].exits[2].main_wer.std is None
