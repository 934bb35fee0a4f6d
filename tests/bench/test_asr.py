"""Error rates and costs of a recogniser by policy, and calibration from the same pass."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toy_speech
from extras import needs_kenlm
from offramp import recognizer
from offramp.audio.io import read_audio
from offramp.bench import asr as module
from offramp.bench.asr import AsrData, AsrOptions, CalibrateOptions, calibrate_model, run
from offramp.bench.wer import character_edits, error_rate, word_edits
from offramp.data.manifest import read_manifest
from offramp.decoding.beam import beam_search
from offramp.decoding.calibration import Calibration
from offramp.decoding.ctc import text
from offramp.decoding.early_exit_ctc import EarlyExitOptions, early_exit
from offramp.decoding.exit_policies import Confidence, FixedExit
from offramp.decoding.ngram import train_ngram
from offramp.energy.cost import encoder_macs
from offramp.errors import ConfigError, DataError, InputError
from offramp.models.ctc_checkpoint import save_encoder
from offramp.recognizer import (
    CALIBRATION,
    Recognizer,
    TranscribeOptions,
    decoder,
)
from toy_encoder import randomize
from toy_speech import CONFIG, random_texts

FIGURES = {
    "wer",
    "wer_ci95",
    "cer",
    "mean_exit_layer",
    "macs_per_audio_s",
    "rtf",
    "exit_histogram",
}
OF_RULES = {"threshold", "calibrated"}
SHAKE = 0.25  # towards random weights
NAMES = ["exit_1", "exit_2", "exit_3", "confidence", "entropy", "agreement"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_speech.write_corpus(tmp_path_factory.mktemp("asr"), random_texts(11, seed=77))


@pytest.fixture
def folder(recogniser_folder: Path, tmp_path: Path) -> Path:
    """The trained recogniser, but its weights shaken: it makes mistakes, others at each exit."""
    model = Recognizer.load(recogniser_folder).encoder
    noisy = toy_speech.CTCEncoder(CONFIG)
    randomize(noisy, 1)
    with torch.no_grad():
        for ours, theirs in zip(noisy.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + SHAKE * (ours - theirs))
    files = {"tokenizer.json": toy_speech.tokenizer().to_json()}
    save_encoder(noisy.eval(), tmp_path / "shaken", files=files)
    return tmp_path / "shaken"


def test_every_exit_is_what_single_utterances_give(folder: Path, manifest: Path) -> None:
    report = run(folder, AsrData(manifest, "dev"))
    assert list(report.policies) == NAMES
    one, utterances = Recognizer.load(folder), read_manifest(manifest)
    references = [u.text for u in utterances]
    rates = set()
    for exit_layer in CONFIG.exits:
        texts, macs, audio_s = [], 0, 0.0
        for utterance in utterances:
            samples = read_audio(utterance.path)
            x, lengths = one.inputs([samples])
            (left,) = early_exit(one.encoder, CONFIG.exits, x, lengths, FixedExit(exit_layer))
            pieces = "".join(one.pieces[t] for t in left.hypothesis.tokens)
            texts.append(pieces.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").strip())
            macs += encoder_macs(CONFIG, int(lengths[0]), exit_layer)
            audio_s += len(samples) / 16_000
        made = report.policies[f"exit_{exit_layer}"]
        expected = error_rate(word_edits(references, texts))
        assert (made.wer, made.wer_ci95) == (expected.rate, expected.ci95)
        assert made.cer == error_rate(character_edits(references, texts)).rate
        assert made.macs_per_audio_s == pytest.approx(macs / audio_s)
        assert made.mean_exit_layer == exit_layer and made.rtf > 0
        assert made.exit_histogram == {str(e): 11 * (e == exit_layer) for e in CONFIG.exits}
        rates.add(made.wer)
    assert len(rates) > 1, "the recogniser makes mistakes, more at some exits than at others"


def test_json_has_the_keys_that_are_promised(recogniser_folder: Path, manifest: Path) -> None:
    report = run(recogniser_folder, AsrData(manifest))
    read = json.loads(json.dumps(report.to_dict()))
    assert set(read) == {"model", "data", "words", "left_out", "policies"}
    assert read["words"] == sum(len(u.text.split()) for u in read_manifest(manifest))
    assert list(read["policies"]) == NAMES
    for name, figures in read["policies"].items():
        assert set(figures) == (FIGURES if name.startswith("exit_") else FIGURES | OF_RULES)
        assert figures["wer"] == 0.0, "it has learned the two words"
        assert set(figures["exit_histogram"]) == {"1", "2", "3"}
        assert sum(figures["exit_histogram"].values()) == 11


@pytest.mark.slow
def test_thresholds_given_calibrated_or_common(folder: Path, manifest: Path) -> None:
    given = {"confidence": 0.0, "entropy": -1.0, "agreement": 0.0}
    made = run(folder, AsrData(manifest), AsrOptions(given)).policies
    assert [made[rule].mean_exit_layer for rule in given] == [1, 3, 1]
    Calibration("entropy", CONFIG.exits, -math.log(99.0), 0.1, 1.0, 50, 0.05, 0.0, 0.5, 1.0).save(
        folder / CALIBRATION
    )
    report = run(folder, AsrData(manifest))
    made, told = report.policies, report.to_dict()["policies"]
    assert told["entropy"]["calibrated"]
    assert told["entropy"]["threshold"] == made["entropy"].threshold
    assert not told["confidence"]["calibrated"] and told["confidence"]["threshold"] == 0.95
    assert [made[rule].calibrated for rule in given] == [False, True, False]
    assert [made[rule].threshold for rule in given] == [0.95, math.log(99.0), 1.0]
    assert made["entropy"].mean_exit_layer == 1
    again = run(folder, AsrData(manifest), AsrOptions({"entropy": -1.0})).policies["entropy"]
    assert (again.threshold, again.calibrated, again.mean_exit_layer) == (-1.0, False, 3)
    with pytest.raises(InputError, match="no rule 'patience'"):
        AsrOptions({"patience": 1.0})


@pytest.mark.slow
def test_features_tower_and_search_count_in_every_rtf(
    monkeypatch: pytest.MonkeyPatch, recogniser_folder: Path, manifest: Path
) -> None:
    inputs = Recognizer.inputs

    def slow(*given: Any) -> Any:
        time.sleep(0.2)
        return inputs(*given)

    searched: list[int] = []

    def slow_search(*given: Any) -> Any:
        searched.append(1)
        time.sleep(0.1)
        return beam_search(*given)

    monkeypatch.setattr(Recognizer, "inputs", slow)
    monkeypatch.setattr(recognizer, "beam_search", slow_search)
    made = run(recogniser_folder, AsrData(manifest, limit=4), AsrOptions(beam_size=2)).policies
    audio_s = sum(u.seconds for u in read_manifest(manifest)[:4])
    for name, figures in made.items():
        assert figures.rtf * audio_s >= (0.6 if name == "beam" else 0.2)
    assert len(searched) == 3 * 4, "in three turns"


def test_other_work_on_the_machine_hits_no_policy_alone(
    monkeypatch: pytest.MonkeyPatch, recogniser_folder: Path, manifest: Path
) -> None:
    """On a clock of our own, an exit takes its number in seconds; the first one that runs in each
    turn is held up."""
    now, ran = [0.0], []

    def slow(*given: Any) -> Any:
        policy = given[4]
        exit_layer = policy.exit_layer if isinstance(policy, FixedExit) else None
        first_of_turn = len(ran) % len(NAMES) == 1  # after the first run, which does not count
        ran.append(exit_layer)
        now[0] += (exit_layer or 5) + 100.0 * first_of_turn
        return early_exit(*given)

    monkeypatch.setattr(module, "early_exit", slow)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    made = run(recogniser_folder, AsrData(manifest)).policies
    audio_s = sum(u.seconds for u in read_manifest(manifest))
    for exit_layer in CONFIG.exits:
        spent = made[f"exit_{exit_layer}"].rtf * audio_s
        assert spent == pytest.approx(exit_layer, rel=1e-3)
    assert len(ran) == 1 + 3 * len(NAMES)


def test_a_large_set_is_timed_by_a_sample(
    monkeypatch: pytest.MonkeyPatch, recogniser_folder: Path, manifest: Path
) -> None:
    ran: list[int] = []

    def counted(*given: Any) -> Any:
        ran.append(len(given[2]))
        return early_exit(*given)

    monkeypatch.setattr(module, "early_exit", counted)
    monkeypatch.setattr(module, "_BATCH_FRAMES", 1)  # each utterance by itself
    made = run(recogniser_folder, AsrData(manifest)).policies
    assert ran == [1] * (1 + len(NAMES) * (4 * 3 + 7))
    assert all(figures.rtf > 0 for figures in made.values())


def test_progress_covers_every_utterance(recogniser_folder: Path, manifest: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(recogniser_folder, AsrData(manifest, limit=4), on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (4, 4)


@pytest.mark.slow
def test_references_are_normalised_and_what_has_no_reading_is_left_out(
    recogniser_folder: Path, tmp_path: Path
) -> None:
    toy_speech.write_corpus(tmp_path, ["do mi", "mi mi", "do"])
    manifest = tmp_path / "manifest.tsv"
    lines = manifest.read_text().replace("\tdo mi\n", "\tDo, MI!\n").replace("\tdo\n", "\t42\n")
    manifest.write_text(lines)
    report = run(recogniser_folder, AsrData(manifest))
    assert (report.words, report.utterances, report.left_out) == (4, 2, 1)
    assert report.to_dict()["left_out"] == 1
    assert report.policies["exit_3"].wer == 0.0
    manifest.write_text(lines.replace("Do, MI!", "1").replace("mi mi", "2"))
    with pytest.raises(DataError, match="no text that can be normalised"):
        run(recogniser_folder, AsrData(manifest))


def test_a_recording_that_is_too_short_counts_as_deleted_words(
    recogniser_folder: Path, tmp_path: Path
) -> None:
    toy_speech.write_corpus(tmp_path, ["do mi"])
    toy_speech.write(tmp_path / "short.wav", torch.zeros(800))
    with (tmp_path / "manifest.tsv").open("a") as file:
        file.write("short.wav\t0.05\ts\tdev\tdo mi\n")
    made = run(recogniser_folder, AsrData(tmp_path / "manifest.tsv")).policies["exit_1"]
    assert made.wer == 0.5 and made.exit_histogram == {"1": 1, "2": 0, "3": 0}


def test_beam_searches_are_policies_too(folder: Path, manifest: Path) -> None:
    """What they write is what transcription writes with the same options."""
    made = run(folder, AsrData(manifest), AsrOptions(beam_size=4)).policies
    assert list(made) == [*NAMES, "beam"]
    utterances, one = read_manifest(manifest), Recognizer.load(folder)
    decode = decoder(one.pieces, TranscribeOptions(beam_size=4), CONFIG.blank_id)
    written = []
    for utterance in utterances:
        x, lengths = one.inputs([read_audio(utterance.path)])
        ends = EarlyExitOptions(CONFIG.blank_id, decode=decode)
        (left,) = early_exit(one.encoder, CONFIG.exits, x, lengths, FixedExit(), ends)
        written.append(text(left.hypothesis.tokens, one.pieces))
    expected = error_rate(word_edits([u.text for u in utterances], written))
    assert (made["beam"].wer, made["beam"].mean_exit_layer) == (expected.rate, 3)
    assert made["beam"].wer != made["exit_3"].wer, "the search changes something here"


@needs_kenlm
@pytest.mark.slow
def test_a_language_model_has_its_own_figures(folder: Path, manifest: Path, tmp_path: Path) -> None:
    train_ngram(["do mi do", "mi do"] * 3, 2, tmp_path / "lm.arpa")
    found = run(folder, AsrData(manifest), AsrOptions(beam_size=4, lm=tmp_path / "lm.arpa"))
    assert list(found.policies) == [*NAMES, "beam", "beam_lm"]
    assert set(found.to_dict()["policies"]["beam_lm"]) == FIGURES
    forced = AsrOptions(lm=tmp_path / "lm.arpa", lm_weight=30.0)
    heavy = run(folder, AsrData(manifest), forced).policies
    assert list(heavy) == [*NAMES, "beam_lm"]
    assert heavy["beam_lm"].wer > found.policies["beam_lm"].wer


def test_contradicting_searches_are_refused() -> None:
    with pytest.raises(InputError, match="lm_weight needs the lm"):
        AsrOptions(lm_weight=1.0)
    with pytest.raises(ConfigError, match="beam_size is 0"):
        AsrOptions(beam_size=0)


def test_all_that_is_wrong_with_a_manifest_is_named_at_once(
    recogniser_folder: Path, tmp_path: Path
) -> None:
    manifest = toy_speech.write_corpus(tmp_path, ["do mi", "mi mi", "do"])
    (tmp_path / "1.wav").write_text("no recording")
    with manifest.open("a") as file:
        file.write("0.wav\t99\ts\tdev\tdo\ngone.wav\t1\ts\tdev\tdo\n2.wav\tlong\ts\tdev\t \n")
    with pytest.raises(DataError) as caught:
        run(recogniser_folder, AsrData(manifest))
    said = str(caught.value)
    for fault in (
        "line 3: " + str(tmp_path / "1.wav") + " is not a recording",
        "line 5: path 0.wav is already in line 2",
        "lasts 1.250 s, but seconds is 99",
        "line 6: " + str(tmp_path / "gone.wav") + " is missing",
        "line 7: seconds is 'long'",
    ):
        assert fault in said
    assert "\n" not in said


# -- calibration ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["confidence", "entropy", "agreement"])
def test_a_calibrated_policy_does_on_its_data_what_it_says(
    folder: Path, manifest: Path, rule: str
) -> None:
    found = calibrate_model(folder, AsrData(manifest), CalibrateOptions(40.0, rule))
    assert found.threshold is not None and found.bound <= 0.4 and found.utterances == 11
    assert found.weights == Recognizer.load(folder).weights_sha256()
    found.save(folder / CALIBRATION)
    made = run(folder, AsrData(manifest)).policies
    assert made[rule].calibrated
    assert made[rule].mean_exit_layer == pytest.approx(found.mean_exit_layer)
    never = AsrOptions({rule: 2.0 if rule != "entropy" else -1.0})
    full = run(folder, AsrData(manifest), never)
    spent = made[rule].macs_per_audio_s / full.policies[rule].macs_per_audio_s
    assert 1 - spent == pytest.approx(found.saving)


def test_a_split_must_be_chosen_where_there_are_several(tmp_path: Path) -> None:
    path = toy_speech.write_corpus(tmp_path, ["do mi", "mi mi", "do"])
    path.write_text("train".join(path.read_text().rsplit("dev", 1)))
    with pytest.raises(InputError, match="has the splits dev, train; choose one with --split"):
        AsrData(path).utterances()
    assert [u.text for u in AsrData(path, "dev").utterances()[0]] == ["do mi", "mi mi"]


def test_a_limit_draws_always_the_same_utterances_from_all(manifest: Path) -> None:
    everything, _ = AsrData(manifest).utterances()
    some, _ = AsrData(manifest, limit=4).utterances()
    assert some == AsrData(manifest, limit=4).utterances()[0]
    assert len(some) == 4 and some != everything[:4]
    assert [u for u in everything if u in some] == some  # in the order of the manifest
    assert AsrData(manifest, limit=99).utterances()[0] == everything


def test_too_few_utterances_certify_nothing(recogniser_folder: Path, manifest: Path) -> None:
    found = calibrate_model(recogniser_folder, AsrData(manifest), CalibrateOptions(0.5))
    assert found.threshold is None and found.guarantee.startswith("cannot certify +0.5 % WER")
    capped = CalibrateOptions(0.5, cap=5.0)
    found = calibrate_model(recogniser_folder, AsrData(manifest), capped)
    assert found.threshold is not None and found.bound == pytest.approx(0.05 / 12)
    assert found.mean_exit_layer == 1, "the first exit makes no more errors than the last"
    assert found.policy(CONFIG.exits) == Confidence(found.threshold)


def test_what_is_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allowed: confidence, entropy, agreement"):
        CalibrateOptions(0.5, "patience")
    for wrong in ((0.0, 100.0), (0.5, -1.0)):
        with pytest.raises(ConfigError, match="greater than 0"):
            CalibrateOptions(wrong[0], cap=wrong[1])
    for cap in (0.5, 0.4):  # before anything is read or decoded
        with pytest.raises(InputError, match=rf"cap is {cap} % and .*: choose a larger cap"):
            CalibrateOptions(0.5, cap=cap)
    with pytest.raises(ConfigError, match="limit is 0"):
        AsrData(tmp_path / "m.tsv", limit=0)
