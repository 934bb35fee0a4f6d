"""The commands stream and profile: lines as they come, tables, figures, one-line errors."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import soundfile
import torch

import toy_streaming
from commands import offramp
from offramp.cli.parameters import ended_as_by_ctrl_c
from offramp.streaming import StreamingRecognizer
from toy_streaming import RATE, babble

SAMPLES = babble(1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model m, recordings a.wav and text.wav, which is none."""
    made = tmp_path_factory.mktemp("stream")
    toy_streaming.save(made / "m", factorised_blank=True, time_reduction=4)
    soundfile.write(made / "a.wav", SAMPLES.numpy(), RATE, subtype="FLOAT")
    (made / "text.wav").write_text("no recording")
    return made


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return StreamingRecognizer.load(folder / "m").transcribe(SAMPLES)


def test_lines_come_as_they_are_heard(
    capsys: pytest.CaptureFixture[str], folder: Path, text: str
) -> None:
    status, out, err = offramp(capsys, "stream", folder / "a.wav", "--model", folder / "m")
    *partials, final, end = out.splitlines()
    assert status == 0 and partials and all(line.startswith("partial ") for line in partials)
    assert final.startswith("final ") and final.endswith(f"  {text}")
    assert end.startswith("endpoint ") and end.endswith("  trailing silence")
    assert err.startswith("1 utterance in 1.50 s; a text came after its last token was heard: the ")
    assert "RTF" in err
    assert err.count("\n") == 1


def test_json_has_an_object_per_event_and_the_counts(
    capsys: pytest.CaptureFixture[str], folder: Path, text: str
) -> None:
    words = ("stream", folder / "a.wav", "--model", folder / "m", "--json")
    status, out, err = offramp(capsys, *words, "--chunk-ms", "80", "--hotword", "do")
    *events, done = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert {e["event"] for e in events} == {"partial", "final"}
    assert [w["text"] for w in events[-1]["words"]] == events[-1]["text"].split()
    assert done["event"] == "done" and done["trace"]["enc_chunks"] == 19
    assert done["latency_ms"]["first_partial_ms"] == events[0]["latency_ms"]
    assert offramp(capsys, *words)[1] != out


def test_a_terminal_shows_partial_texts_in_one_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, text: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = offramp(capsys, "stream", folder / "a.wav", "--model", folder / "m")
    *partials, final = out.split("\r\x1b[K")
    assert all(len(line) < 80 and "\n" not in line for line in partials)
    said, end, nothing = final.split("\n")
    assert said.endswith(f"  {text}") and end.startswith("endpoint ") and nothing == ""


@pytest.mark.slow
def test_samples_may_come_through_a_pipe(folder: Path) -> None:
    """Cut off in the midst of a sample."""
    pcm = (SAMPLES * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()[:-1]
    words = [sys.executable, "-m", "offramp", "stream", "-", "--model", str(folder / "m")]
    made = subprocess.run(words, input=pcm, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr
    assert b"\nfinal " in made.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_stream_with_its_final_text(folder: Path, number: signal.Signals) -> None:
    pcm = (SAMPLES * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()
    words = [sys.executable, "-m", "offramp", "stream", "-", "--model", str(folder / "m")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe) as running:
        assert running.stdin is not None and running.stdout is not None
        running.stdin.write(pcm[: len(pcm) // 2])  # and more may come
        running.stdin.flush()
        assert running.stdout.readline().startswith(b"partial ")
        running.send_signal(number)
        out, err = running.communicate()
    assert running.returncode == 130, err
    assert out.splitlines()[-1].startswith(b"final ")
    assert b"1 utterance in 0." in err and err.splitlines()[-1].startswith(b"offramp: ")


def test_signals_are_as_they_were_before() -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"), ended_as_by_ctrl_c():
            signal.raise_signal(signal.SIGHUP)  # nohup offramp ...
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ignored)


def test_a_beam_shows_what_else_was_perhaps_said(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    words = (
        "stream",
        folder / "a.wav",
        "--model",
        folder / "m",
        *("--beam-size", 8, "--n-best", 8),
    )
    status, out, _ = offramp(capsys, *words)
    *_, final, other = out.splitlines()
    assert status == 0 and final.startswith("final ") and other.startswith("or "), out
    assert final[26:] != other[26:]
    _, out, _ = offramp(capsys, *words, "--json")
    (told,) = (e for e in map(json.loads, out.splitlines()) if e["event"] == "final")
    (alternative,) = told["alternatives"]
    assert [told["text"], alternative["text"]] == [final[26:], other[26:]]
    assert alternative["score"] < 0
    assert float(other[2:26]) == pytest.approx(alternative["score"], abs=0.01)


def test_the_microphone_may_be_streamed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, text: str
) -> None:
    heard = iter(torch.split(SAMPLES, 1600))

    def microphone(sample_rate: int) -> object:
        assert sample_rate == RATE
        return heard

    sounddevice = ModuleType("sounddevice")
    sounddevice.__spec__ = ModuleSpec("sounddevice", None)  # it is installed
    monkeypatch.setitem(sys.modules, "sounddevice", sounddevice)
    monkeypatch.setattr("offramp.audio.live.microphone", microphone)
    status, out, _ = offramp(capsys, "stream", "--mic", "--model", folder / "m")
    assert status == 0 and f"  {text}\nendpoint " in out


def test_what_was_said_comes_before_the_fault(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    """A FLAC file of which the end is missing."""
    soundfile.write(tmp_path / "whole.flac", torch.cat((SAMPLES, SAMPLES)).numpy(), RATE)
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) * 2 // 3])
    status, out, err = offramp(capsys, "stream", tmp_path / "cut.flac", "--model", folder / "m")
    assert status == 2 and "\nfinal " in out
    summary, fault = err.splitlines()
    assert summary.startswith("1 utterance in ")
    assert fault.startswith("offramp: ") and "is truncated or damaged" in fault


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stream", "--model", "{m}"], "give either a recording"),
        (["stream", "{wav}", "--mic", "--model", "{m}"], "give either a recording"),
        (["stream", "{wav}", "--sample-rate", "8000", "--model", "{m}"], "sample_rate is 8000"),
        (["stream", "{wav}", "--chunk-ms", "50", "--model", "{m}"], "chunk_ms is 50"),
        (["stream", "{wav}", "--beam-size", "0", "--model", "{m}"], "beam_size is 0"),
        (["stream", "{wav}", "--hotword", "xyz", "--model", "{m}"], "hotword 'xyz'"),
        (["stream", "{wav}", "--model", "no-such-model"], "no-such-model"),
        (["stream", "{wav}", "--model", "lm-tiny"], "of type 'llama'"),
        (["stream", "{text}", "--model", "{m}"], "not a recording"),
        (["stream", "none.wav", "--model", "{m}"], "none.wav is missing"),
        (["stream", "{wav}", "--nonsense"], "--nonsense"),
        (["stream", "--nonsense", "--model", "{m}"], "--nonsense"),
        (["stream", "-", "--sample-rate", "10", "--model", "{m}"], "sample_rate is 10"),
        (["stream", "-", "--sample-rate", "0", "--model", "{m}"], "sample_rate is 0"),
        (["stream", "-", "--model", "{m}"], "standard input holds no samples"),
        (["stream", "{wav}", "--n-best", "2", "--model", "{m}"], "n_best is 2"),
        (["stream", "{wav}", "--max-symbols", "0", "--model", "{m}"], "max_symbols is 0"),
        (
            ["stream", "{wav}", "--max-symbols", "2", "--beam-size", "2", "--model", "{m}"],
            "max_symbols is 2 with beam_size 2",
        ),
        (["generate", "a", "--model", "{m}"], "give it to offramp stream"),
        (["transcribe", "{wav}", "--model", "{m}"], "of type 'offramp-transducer'"),
        (["profile", "{wav}", "--hardware", "phone", "--model", "{m}"], "no hardware profile 'ph"),
        (["profile", "{wav}", "--hardware", "mcu,mcu", "--model", "{m}"], "twice"),
        (["profile", "none.wav", "--model", "{m}"], "none.wav is missing"),
        (["profile", "{wav}", "--model", "{m}", "--json", "no/p.json"], "no folder you may"),
        (["profile", "{wav}", "--model", "{m}", "--plot", "p.pdf"], "ends in .png"),
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
    places = {"m": folder / "m", "wav": folder / "a.wav", "text": folder / "text.wav"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    status, out, err = offramp(capsys, *[w.format(**places) for w in words])
    assert (status, out) == (2, ""), err
    assert err.startswith("offramp: ") and err.count("\n") == 1, err
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_profile_shows_and_writes_every_hardware(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    words = ("profile", folder / "a.wav", "--model", folder / "m", "--json", tmp_path / "p.json")
    status, out, _ = offramp(capsys, *words, "--hardware", "mobile-low, mcu")
    assert status == 0
    for name in ("mobile-low", "mcu"):
        assert f"modelled, memory-traffic energy, profile {name} version 1; not measured" in out
    for name in ("encoder", "predictor", "joiner", "blank_head", "all"):
        assert name in out
    made = json.loads((tmp_path / "p.json").read_text())
    assert list(made["modelled"]) == ["mobile-low", "mcu"]
    assert made["trace"]["audio_s"] == 1.5 and made["model"] == str(folder / "m")
    assert ("Not measured: " in out) == (made["measured"] is None)


@pytest.mark.slow
def test_profile_draws_a_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    words = ("profile", folder / "a.wav", "--model", folder / "m", "--plot", tmp_path / "p.png")
    assert offramp(capsys, *words)[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_extra_that_a_figure_needs_is_named_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ("profile", "none.wav", "--model", "none", "--plot", tmp_path / "p.png")
    status, out, err = offramp(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'offramp[plot]'" in err
