"""What a newcomer does wrong at first: one line each that says what to do instead."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import toy_speech
from commands import offramp
from offramp.models import hub

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transcribe", ""], "an argument is empty"),
        (["transcribe", "a.wav", "--hotword", ""], "--hotword is empty"),
        (["transcribe", "a.wav", "--hotword="], "--hotword is empty"),
        (["generate", "a", "--model", ""], "--model is empty"),
        (["transcribe", "a.wav", "--nonsense"], "unknown option --nonsense"),
        (["stream", "--nonsense"], "unknown option --nonsense"),
        (["generate", "a", "--model", "runs/my-lm"], "there is no folder runs/my-lm; give"),
        (["generate", "a", "--model", "./my-lm"], "there is no folder ./my-lm; give"),
        (["transcribe", "a.wav", "--model", "/no/such/asr"], "there is no folder /no/such/asr"),
        (["train", "{recipes}/splitformer_tiny.py", "--set", "sets=[m/a.tsv]"], "--set 'sets=["),
        (["train", "{recipes}/splitformer_tiny.py", "--set", "steps=[9"], "present value, 5200"),
    ],
)
def test_one_line_says_what_to_do(
    capsys: pytest.CaptureFixture[str], here: Path, words: list[str], message: str
) -> None:
    places = {"recipes": RECIPES}
    status, out, err = offramp(capsys, *[w.format(**places) for w in words])
    assert (status, out) == (2, ""), err
    assert err.startswith("offramp: ") and err.count("\n") == 1, err
    assert message in err
    assert list(here.iterdir()) == []


def test_only_lists_are_said_to_have_lost_quotes(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    for value in ("steps=[9", "sets=9"):
        words = ("train", RECIPES / "splitformer_tiny.py", "--set", value)
        assert "a shell takes quotes away" not in offramp(capsys, *words)[2]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("splitformer_tiny", "encoder"),
        ("splitformer_tiny_longer", "encoder.folder"),
        ("stream_tiny", "model"),
    ],
)
def test_a_recipe_says_that_another_comes_first(
    capsys: pytest.CaptureFixture[str], here: Path, name: str, setting: str
) -> None:
    words = ("train", RECIPES / f"{name}.py", "--set", f"{setting}=runs/a")
    status, _, err = offramp(capsys, *words)
    assert status == 2 and err.count("\n") == 1
    assert "there is no folder runs/a; the recipe needs it: train" in err
    assert err.endswith(f"--set {setting}=FOLDER\n")


def test_names_may_begin_with_a_hyphen_after_two(
    capsys: pytest.CaptureFixture[str], here: Path, recogniser_folder: Path
) -> None:
    toy_speech.write(here / "-a.wav", toy_speech.speak("do mi"))
    words = ("transcribe", "--model", recogniser_folder, "--detector", "energy")
    assert offramp(capsys, *words, "--", "-a.wav") == (0, "do mi\n", "")
    assert offramp(capsys, *words, "./-a.wav") == (0, "do mi\n", "")
    status, _, err = offramp(capsys, *words, "-a.wav")
    assert status == 2 and "a file of that name is ./-a.wav" in err
    _, _, err = offramp(capsys, "stream", "--model", "no-such", "--", "-a.wav")
    assert "no-such" in err, "the file was no fault"


def test_what_needs_no_torch_is_refused_without_it(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("")
    lines = {
        "transcribe a.wav b.wav --format srt": "several files as srt",
        "transcribe a.wav --trail": "trail goes into json only",
        f"transcribe a.wav -o {shlex.quote(str(tmp_path / 'o'))}": "cannot write to ",
        "transcribe a.wav --lm a.arpa": "flashlight-text: pip install 'offramp[lm]'",
        "transcribe a.wav --detector silero": "silero-vad: pip install 'offramp[vad]'",
        "stream --mic": "sounddevice: pip install 'offramp[mic]'",
        "eval asr --data a.tsv": "jiwer: pip install 'offramp[wer]'",
        "calibrate --data a.tsv --max-wer-increase 1": "jiwer: pip install",
        "compress --data a.tsv -o o --max-wer-increase 1": "jiwer: pip install",
        "eval exits --model lm-tiny --json no/r.json": "no folder you may write to",
        "profile a.wav --plot a.pdf": "ends in .png",
        "transcribe a.wav --threads 0": "threads is 0",
        "train a.py --set steps": "it takes key=value",
    }
    code = (
        "import contextlib, json, shlex, sys\n"
        "for name in ('flashlight', 'silero_vad', 'sounddevice', 'jiwer'):\n"
        "    sys.modules[name] = None\n"
        "from offramp.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(shlex.split(line))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    words = [sys.executable, "-c", code, json.dumps(list(lines))]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    for told, (line, message) in zip(made.stderr.splitlines(), lines.items(), strict=True):
        assert told.startswith("offramp: ") and message in told, line


# -- Ctrl-C ----------------------------------------------------------------------------------------


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.demo.run", interrupted)
    assert offramp(capsys, "demo") == (130, "", "offramp: interrupted\n")


RECIPE = """
from dataclasses import dataclass
from offramp.train.loop import STATE_FILE, TrainConfig

@dataclass(frozen=True)
class Interrupted:
    name: str = "toy"
    train: TrainConfig = TrainConfig(1, 1e-3)
    saved: bool = True

    def run(self, out, device="cpu"):
        out.mkdir(parents=True)
        if self.saved:
            (out / STATE_FILE).touch()
        raise KeyboardInterrupt
        yield

recipe = Interrupted()
"""


@pytest.mark.parametrize(
    ("saved", "says"),
    [("true", "goes on from the last saved step"), ("false", "starts anew: none was saved")],
)
def test_an_interrupted_training_says_how_it_goes_on(
    capsys: pytest.CaptureFixture[str], here: Path, saved: str, says: str
) -> None:
    (here / "toy.py").write_text(RECIPE)
    made = offramp(capsys, "train", "toy.py", "--set", f"saved={saved}")
    assert made == (130, "", f"offramp: interrupted; the same command {says}\n")


# -- what comes next is said -----------------------------------------------------------------------


def test_nothing_is_written_into_what_was_installed(
    capsys: pytest.CaptureFixture[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    recogniser_folder: Path,
) -> None:
    """The calibration of a model that ships lies in the present folder."""
    monkeypatch.setitem(hub.SHIPPED, "asr-tiny", recogniser_folder)
    manifest = toy_speech.write_corpus(here / "dev", toy_speech.random_texts(12, 3))
    for model in ("asr-tiny", recogniser_folder):
        words = ["calibrate", "--model", model, "--data", manifest, "--max-wer-increase", "10"]
        status, out, _ = offramp(capsys, *words)
        assert status == 0 and "--calibration calibration.json FILE" in out
        assert not (recogniser_folder / "calibration.json").exists()
        (here / "calibration.json").unlink()


@pytest.mark.parametrize("given", [True, False])
def test_calibrate_says_what_uses_its_result(
    capsys: pytest.CaptureFixture[str], here: Path, recogniser_folder: Path, given: bool
) -> None:
    model = here / "my model"
    model.mkdir()
    for file in recogniser_folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    manifest = toy_speech.write_corpus(here / "dev", toy_speech.random_texts(12, 3))
    target = here / "my thresholds.json" if given else model / "calibration.json"
    words = ["calibrate", "--model", model, "--data", manifest, "--max-wer-increase", "10"]
    status, out, _ = offramp(capsys, *words, *(["--out", target] if given else []))
    *_, written, line = out.splitlines()
    assert status == 0 and written.startswith(f"Written to {target}; ") and target.exists()
    name, *uses, file = shlex.split(line)
    assert (name, file) == ("offramp", "FILE") and ("--calibration" in uses) == given
    recording = toy_speech.write(here / "a.wav", toy_speech.speak("do mi"))
    words = (*uses, recording, "--detector", "energy", "--format", "json")
    status, out, err = offramp(capsys, *words)
    assert status == 0 and json.loads(out)["mean_exit_layer"] == 1, err
