"""What `offramp transcribe` does with recordings and places that are not what they should be."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import toy_speech
from offramp.cli import main
from thinned import thinned


def transcribe(capsys, recogniser_folder: Path, *words: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error); the toy's tones are no speech to Silero."""
    model = ["--model", str(recogniser_folder), "--detector", "energy"]
    try:
        main(["transcribe", *map(str, words), *model])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def text_named_wav(path: Path) -> None:
    path.write_text("dear diary\n" * 50)


def no_bytes(path: Path) -> None:
    path.touch()


def cut_flac(path: Path) -> None:
    said = toy_speech.speak("do mi do mi").numpy()
    soundfile.write(path, said + 0.01 * np.random.default_rng(0).standard_normal(len(said)), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_samples(path: Path) -> None:
    soundfile.write(path, np.zeros(0, np.float32), 16_000)


def not_a_number(path: Path) -> None:
    samples = toy_speech.speak("do mi").numpy()
    samples[9_000] = np.nan
    soundfile.write(path, samples, 16_000, "FLOAT")


def folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    pass


BAD = {
    "text.wav": (text_named_wav, "is not a recording that can be read"),
    "no_bytes.wav": (no_bytes, "is not a recording that can be read"),
    "cut.flac": (cut_flac, "is truncated or damaged after"),
    "empty.wav": (no_samples, "holds no samples"),
    "nan.wav": (not_a_number, "NaN"),
    "folder.wav": (folder, "is a folder"),
    "gone.wav": (nothing, "is missing"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("format", thinned(["txt", "json"], keep=["json"]))
def test_a_bad_recording_is_one_line_and_leaves_nothing(
    capsys, tmp_path, recogniser_folder, name, format
):
    make, fault = BAD[name]
    make(tmp_path / name)
    for where in ((), ("-o", tmp_path / "out")):
        words = (tmp_path / name, "--format", format, *where)
        status, out, err = transcribe(capsys, recogniser_folder, *words)
        assert (status, out) == (2, "")
        assert err.startswith(f"offramp: {tmp_path / name} ") and err.count("\n") == 1, err
        assert fault in err
    assert [p.name for p in tmp_path.iterdir() if p.name != name] == []


def test_fifty_good_recordings_survive_the_bad_ones(capsys, tmp_path, recogniser_folder):
    good = [tmp_path / f"{n:02}.wav" for n in range(50)]
    for path in good:
        toy_speech.write(path, toy_speech.speak("mi"))
    bad = []
    for name, (make, _) in BAD.items():
        bad.append(tmp_path / name)
        make(bad[-1])
    files = [*good[:20], *bad[:3], *good[20:], *bad[3:]]
    out = tmp_path / "out"
    status, shown, err = transcribe(capsys, recogniser_folder, *files, "-o", out)
    assert (status, shown) == (1, "")
    assert sorted(p.name for p in out.iterdir()) == [f"{n:02}.txt" for n in range(50)]
    assert {p.read_text() for p in out.iterdir()} == {"mi\n"}
    *lines, last = err.splitlines()
    assert last == f"offramp: {len(bad)} of {len(files)} files failed"
    for line, path in zip(lines, bad, strict=True):
        assert line.startswith(f"offramp: {path} ") and BAD[path.name][1] in line


def test_eight_channels_at_192_khz_are_read(capsys, tmp_path, recogniser_folder):
    samples = toy_speech.speak("mi", rate=192_000)[:, None].repeat(1, 8)
    path = toy_speech.write(tmp_path / "a.wav", samples, 192_000)
    assert transcribe(capsys, recogniser_folder, path) == (0, "mi\n", "")


def test_silence_is_an_empty_transcript(capsys, tmp_path, recogniser_folder):
    path = toy_speech.write(tmp_path / "a.wav", torch.zeros(48_000))
    assert transcribe(capsys, recogniser_folder, path) == (0, "", "")
    empty = {"txt": "", "srt": "", "vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n"}
    for format, written in empty.items():
        words = (path, "--format", format, "-o", tmp_path)
        assert transcribe(capsys, recogniser_folder, *words) == (0, "", "")
        assert (tmp_path / f"a.{format}").read_text() == written
    _, out, _ = transcribe(capsys, recogniser_folder, path, "--format", "json")
    made = json.loads(out)
    assert (made["text"], made["segments"], made["audio_s"]) == ("", [], 3.0)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    capsys, tmp_path, recogniser_folder
):
    path = toy_speech.write(tmp_path / "a.wav", toy_speech.speak("mi"))
    for place in (path, path / "below", Path("/proc/nowhere")):
        status, out, err = transcribe(capsys, recogniser_folder, path, "-o", place)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("offramp: cannot write") and str(place) in err
    (tmp_path / "out" / "a.txt").mkdir(parents=True)
    status, out, err = transcribe(capsys, recogniser_folder, path, "-o", tmp_path / "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_failures_are_named_even_if_the_work_stops(capsys, tmp_path, recogniser_folder):
    path = toy_speech.write(tmp_path / "a.wav", toy_speech.speak("mi"))
    (tmp_path / "out" / "a.txt").mkdir(parents=True)
    words = (tmp_path / "gone.wav", path, "-o", tmp_path / "out")
    status, _, err = transcribe(capsys, recogniser_folder, *words)
    assert status == 2
    assert [line.split()[1] for line in err.splitlines()] == [
        str(tmp_path / "gone.wav"),
        "1",
        "cannot",
    ]


def test_names_that_standard_output_cannot_hold_are_escaped(
    capsys, tmp_path, recogniser_folder, monkeypatch
):
    names = [tmp_path / os.fsdecode(b"caf\xe9.wav"), tmp_path / "b.wav"]
    for name in names:
        toy_speech.write(tmp_path / "b.wav", toy_speech.speak("mi"))
        name.write_bytes((tmp_path / "b.wav").read_bytes())
    strict = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    status, _, err = transcribe(capsys, recogniser_folder, *names)
    assert (status, err) == (0, "")
    strict.seek(0)
    assert f"==> {tmp_path}/caf\\udce9.wav <==\n" in strict.read()


def test_closed_standard_input_is_one_line(capsys, recogniser_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, out, err = transcribe(capsys, recogniser_folder, "-")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("offramp: standard input is closed")
