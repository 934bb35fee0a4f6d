"""A Speech-LM on the command line: one text with every draft, and mistakes in one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy_speech
import toy_speech_lm
from commands import offramp
from offramp.bench import speech_lm_quality
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.speech_lm import DRAFTS
from thinned import thinned


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    whole = toy_speech_lm.varied(0, 1.0, heads=HeadsConfig(), ctc_exit=3)
    whole.save(folder / "whole")
    toy_speech_lm.varied(0, 1.0, ctc_exit=3).save(folder / "headless")
    toy_speech_lm.varied(0, 1.0, heads=HeadsConfig()).save(folder / "deaf")
    toy_speech_lm.varied(0, 1.0, decoder={"max_positions": 24}).save(folder / "short")
    samples = toy_speech.speak("do mi do mi do")
    toy_speech.write(folder / "a.wav", torch.cat([samples, torch.zeros(16_000), samples]))
    toy_speech.write(folder / "silence.wav", torch.zeros(16_000))
    toy_speech.write_corpus(folder, ["do mi", "mi"])
    names = ("whole", "headless", "deaf", "short", "a.wav", "silence.wav", "manifest.tsv")
    return {name.split(".")[0]: folder / name for name in names}


def transcribe(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path], *more: object
) -> tuple[int, str, str]:
    words = ("transcribe", places["a"], "--model", places["whole"], "--detector", "energy")
    return offramp(capsys, *words, *more)


@pytest.mark.parametrize("draft", thinned(DRAFTS, keep=("none", "mtp")))
def test_every_draft_prints_the_same_text(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path], draft: str
) -> None:
    want = transcribe(capsys, places)
    assert want[0] == 0 and len(want[1].splitlines()) == 2 and want[2] == ""
    assert transcribe(capsys, places, "--draft", draft) == want


def test_json_says_how_it_was_decoded(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path]
) -> None:
    _, out, _ = transcribe(capsys, places, "--format", "json")
    assert json.loads(out)["decoding"]["draft"] == "ctc+mtp"
    for name in ("--beam-size", "--beam"):
        _, out, _ = transcribe(capsys, places, "--format", "json", name, 3)
        run = json.loads(out)["decoding"]
        assert (run["draft"], run["lossy"], run["sources"]) == ("ctc", False, {})
    status, out, err = transcribe(
        capsys, places, "--format", "json", "--draft", "mtp", "--threshold", "0"
    )
    assert (status, json.loads(out)["decoding"]["lossy"]) == (0, True)
    assert err == "threshold 0 is lossy: tokens are not verified, and the text may change\n"


def test_silence_prints_nothing(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path]
) -> None:
    words = ("transcribe", places["silence"], "--model", places["whole"])
    assert offramp(capsys, *words) == (0, "", "")


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("headless", "--draft mtp", "draft 'mtp' needs heads for more than one token"),
        ("headless", "--draft ctc+mtp", "draft 'ctc+mtp' needs heads"),
        ("deaf", "--draft ctc", "draft 'ctc' needs a CTC exit that writes the decoder's tokens"),
        ("deaf", "--guard stop", "guard 'stop' needs a CTC exit"),
        ("short", "", "the decoder's context of 24 positions holds 0."),
        ("whole", "--threshold 0.5", "threshold 0.5 is for draft 'mtp'"),
        ("whole", "--draft exit --beam-size 2", "draft 'exit' cannot draft for a beam"),
        ("whole", "--draft mtp --threshold 0.5 --beam-size 2", "exclude each other"),
        ("whole", "--exit-layer 2", "exit_layer 2 is for draft 'exit'"),
        ("whole", "--exit-policy entropy", "exit_policy is of no use to"),
        ("whole", "--budget-ms 9", "a Speech-LM; leave it out"),
        ("whole", "--trail --format json", "trail is of no use to"),
        ("whole", "--draft ngram", "ngram"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str],
    places: dict[str, Path],
    model: str,
    words: str,
    message: str,
) -> None:
    given = ("transcribe", places["a"], "--model", places[model], *words.split())
    status, out, err = offramp(capsys, *given)
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("offramp: ") and message in err


def test_a_ctc_recogniser_takes_no_drafts(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path], recogniser_folder: Path
) -> None:
    words = ("transcribe", places["a"], "--model", recogniser_folder)
    for option in (("--draft", "mtp"), ("--guard", "stop")):
        status, out, err = offramp(capsys, *words, *option)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{option[0][2:]} is of no use to {recogniser_folder}, a CTC recogniser" in err


def test_eval_asr_shows_every_draft(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path], tmp_path: Path
) -> None:
    words = ("eval", "asr", "--model", places["whole"], "--data", places["manifest"])
    target = tmp_path / "r.json"
    status, out, err = offramp(capsys, *words, "--split", "dev", "--json", target)
    assert (status, err) == (0, "")
    assert "2 utterances, 3 words" in out
    told = json.loads(target.read_text())
    assert list(told["drafts"]) == ["none", "exit", "mtp", "ctc", "ctc+mtp"] and told["identical"]
    assert all(f" {name} " in out for name in told["drafts"])
    for option in (("--lm", "a.arpa"), ("--confidence", "0.5")):
        status, _, err = offramp(capsys, *words, *option)
        assert status == 2 and err.count("\n") == 1
    for name in ("--beam-size", "--beam"):
        status, _, err = offramp(capsys, *words, name, "0")
        assert status == 2 and "beam_size is 0" in err


def test_eval_asr_fails_where_a_draft_changes_the_text(
    capsys: pytest.CaptureFixture[str],
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    found = speech_lm_quality.quality

    def lying(tally, plain, references):
        if tally is not plain:
            texts = {row: replace(text, tokens=()) for row, text in plain.written.items()}
            plain = speech_lm_quality.Tally(texts)
        return found(tally, plain, references)

    monkeypatch.setattr(speech_lm_quality, "quality", lying)
    words = ("eval", "asr", "--model", places["headless"], "--data", places["manifest"])
    status, out, err = offramp(capsys, *words, "--json", tmp_path / "r.json")
    assert status == 1 and " NO " in out
    assert "ctc: 2 texts differ from those of plain decoding" in err
    assert not json.loads((tmp_path / "r.json").read_text())["identical"]


@pytest.mark.slow
def test_bench_takes_any_folder_and_manifest(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = ("--json", tmp_path / "r.json", "--plot", tmp_path / "f.png")
    words = ("bench", "speech-llm", "--model", places["whole"], "--data", places["manifest"])
    status, out, err = offramp(capsys, *words, "--rounds", 1, *files)
    assert (status, err) == (0, "")
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["utterances"] == 2 and set(told["identical"].values()) == {True}
    assert told["details"]["recognizer"]["wer"] > 0.5, "asr-tiny does not know these words"
    assert all(f" {name} " in out for name in told["wer"])
    assert (tmp_path / "f.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model {whole} --limit 0", "limit is 0"),
        ("--model {whole} --rounds 0", "rounds is 0"),
        ("--model {whole} --threads 0", "threads is 0"),
        ("--model {whole} --data nonsense", "there is no set 'nonsense' with transcripts"),
        ("--model {whole} --data none.tsv", "none.tsv is missing"),
        ("--model {short} --data {manifest}", "and the decoder's context holds 0."),
        ("--model {whole} --plot f.pdf", "ends in .png"),
        ("--model {whole} --json no/r.json", "no folder you may"),
        ("--model lm-tiny", "of type 'llama', not 'offramp-speech-lm'"),
        ("--model no-such-model", "there is no checkpoint no-such-model"),
    ],
)
def test_mistakes_of_bench_are_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    places: dict[str, Path],
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = words.format(**places).split()
    status, out, err = offramp(capsys, "bench", "speech-llm", *given)
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("offramp: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_bench_says_which_extra_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ("bench", "speech-llm", "--model", places["whole"], "--data", places["manifest"])
    status, out, err = offramp(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "bench speech-llm needs transformers: pip install 'offramp[hf]'" in err
