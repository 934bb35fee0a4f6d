"""The bar over files that are transcribed; the rest is tested through the command line."""

import io
import math
import os

import pytest
from rich.console import Console

import toy_speech
from offramp import terminal
from offramp.errors import InputError
from offramp.transcript_output import TranscriptOutput, files_progress, known_seconds


def capture(monkeypatch, name: str = "out", colours: bool = False) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=colours, width=200, highlight=False)
    monkeypatch.setattr(terminal, name, console)
    return written


@pytest.mark.parametrize("colours", [False, True])
def test_progress_of_files_shows_on_a_terminal_alone(monkeypatch, tmp_path, colours):
    path = str(toy_speech.write(tmp_path / "a.wav", toy_speech.speak("do mi")))
    shown = capture(monkeypatch, "err", colours)
    with files_progress([path, "-", "none.wav"]) as tells:
        for tell in tells:
            tell(0.5)
    assert ("3/3" in shown.getvalue()) == colours
    assert colours or shown.getvalue() == ""


def test_lengths_are_known_where_headers_say_them(tmp_path):
    path = toy_speech.write(tmp_path / "a.wav", toy_speech.speak("do"))
    assert known_seconds(str(path)) == pytest.approx(0.85)
    assert known_seconds("-") == known_seconds("none.wav") == math.inf


def test_looking_at_a_pipe_takes_nothing_from_it():
    reading, writing = os.pipe()  # what a shell makes of <(...)
    os.write(writing, b"sound")
    os.close(writing)
    try:
        assert known_seconds(f"/dev/fd/{reading}") == math.inf
        assert os.read(reading, 9) == b"sound"
    finally:
        os.close(reading)


def test_a_folder_that_is_called_like_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"one\.srt is to be a folder, and is called like a file"):
        TranscriptOutput(["a.wav"], "srt", tmp_path / "one.srt")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.srt").mkdir()
    TranscriptOutput(["a.wav"], "srt", tmp_path / "old.srt")
