"""What the command line shows: colours, tables, places that can be written to."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

import toy_streaming
from offramp import demo, terminal
from offramp.api import DraftOptions, load
from offramp.audio.io import read_audio
from offramp.audio.vad import VadOptions
from offramp.bench.asr import AsrReport, PolicyResult, exit_candidates
from offramp.decoding.calibration import Calibration
from offramp.decoding.exit_policies import Confidence, edit_distance
from offramp.decoding.stopping import Stop
from offramp.errors import CheckpointError, InputError, OfframpError
from offramp.models import hub
from offramp.recognizer import CALIBRATION, Recognizer, TranscribeOptions
from offramp.results import Step
from offramp.streaming import StreamingRecognizer
from offramp.train.loop import Evaluated, StepDone


def capture(monkeypatch, name: str = "out", colours: bool = False) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=colours, width=200, highlight=False)
    monkeypatch.setattr(terminal, name, console)
    return written


def test_the_streamed_colours_are_the_text(monkeypatch, checkpoint):
    """Without a terminal no colour and no refused draft: the text alone."""
    model = load(str(checkpoint))
    shown = capture(monkeypatch)
    drafted = model.stream("the count", draft=DraftOptions("exit", 2), stop=Stop(16))
    terminal.stream_drafts(model, drafted)
    plain = model.generate("the count", draft=DraftOptions("none"), stop=Stop(16))
    assert shown.getvalue().strip() == model.tokenizer.decode(plain.tokens).strip()


def test_refused_drafts_show_where_there_are_colours(monkeypatch, checkpoint):
    model = load(str(checkpoint))
    ids = model.tokenizer.encode("the count of", special=False)
    step = Step(0, tuple(ids[:2]), "", tuple([ids[0], *ids[2:]]), 1, 2, None)
    refused = model.tokenizer.decode(ids[2:]).strip()
    for colours in (False, True):
        shown = capture(monkeypatch, colours=colours)
        terminal.out.print(terminal._coloured(model, step))
        assert (refused in shown.getvalue()) == colours
        assert ("\x1b[" in shown.getvalue()) == colours


def test_figures_that_do_not_exist_are_dashes():
    assert terminal.number(None) == "-"
    assert terminal.number(1234.567, 1) == "1,234.6"


def test_json_is_whole_or_absent(tmp_path):
    target = tmp_path / "r.json"
    terminal.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        terminal.write_json(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]
    terminal.write_json(None, {"a": 1})


def test_unwritable_places_are_refused(tmp_path):
    for path, message in ((tmp_path, "it is a folder"), (Path("/nowhere/r.json"), "no folder")):
        with pytest.raises(InputError, match=message):
            terminal.check_writable(path)
    terminal.check_writable(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("exit_losses", "audio_s_per_s", "expected"),
    [
        ({}, None, "loss 2.500  1,200 tokens/s"),
        ({2: 3.5, 4: 2.5}, 61.0, "loss 3.50 2.50  61 s of audio"),
        ({2: 3.5, 4: 2.6}, 61.0, "loss 2.500, exits 3.50 2.60  61 s of audio"),
    ],
)
def test_training_shows_loss_pace_and_evaluations(
    monkeypatch, exit_losses, audio_s_per_s, expected
):
    shown = capture(monkeypatch, "err", colours=True)
    done = StepDone(1, 2.5, exit_losses, 1.0, 1e-3, 1200.0, audio_s_per_s, 9.0)
    terminal.train_progress("toy", 2, [done, Evaluated(1, {"bpb@2": 1.25})])
    assert "step 1: bpb@2 1.250" in shown.getvalue() and expected in shown.getvalue()


def test_the_demo_shows_both_ways_and_fails_if_they_differ(monkeypatch, checkpoint):
    shown = capture(monkeypatch)
    model = load(str(checkpoint))
    demo._show(model, "toy", "the count", 12)
    assert "identical text, both ways" in shown.getvalue()
    assert "self-speculative" in shown.getvalue()

    class Broken:
        """A model whose two ways of decoding disagree."""

        tokenizer, stream = model.tokenizer, staticmethod(model.stream)

        def generate(self, prompt, **options):
            return model.generate(prompt, **(options | {"stop": Stop(3)}))

    with pytest.raises(OfframpError, match="a defect of ours"):
        demo._show(Broken(), "toy", "the count", 12)


def test_the_demo_shows_what_each_exit_wrote_of_the_recording(monkeypatch, recogniser_folder):
    shown = capture(monkeypatch)
    demo._speech(str(recogniser_folder))
    recognizer, text = Recognizer.load(recogniser_folder), shown.getvalue()
    whole = VadOptions(detector="energy")
    for exit_layer in recognizer.config.exits:
        options = TranscribeOptions(exit_layer=exit_layer, vad=whole)
        made = recognizer.transcribe(demo.RECORDING, options)
        assert len(made.segments) == 1 and made.audio_s > 3
        assert f"exit {exit_layer}  {made.text}\n" in text
    assert f"--threshold {Confidence().threshold:g}) left after" in text


def test_the_demo_fails_where_the_recogniser_does_not_ship(monkeypatch, tmp_path):
    monkeypatch.setitem(hub.SHIPPED, "asr-tiny", tmp_path / "none")
    with pytest.raises(CheckpointError, match="asr-tiny does not come with this version"):
        demo._speech()


def test_the_demo_shows_a_stream_and_fails_if_it_writes_something_else(monkeypatch, tmp_path):
    shown = capture(monkeypatch)
    toy_streaming.save(tmp_path / "m", factorised_blank=True, time_reduction=4, seed=5)
    demo._stream(str(tmp_path / "m"))
    whole = StreamingRecognizer.load(tmp_path / "m").transcribe(read_audio(demo.RECORDING))
    assert whole and f" s  {whole}\n" in shown.getvalue()
    assert "The same text as at once, " in shown.getvalue()
    monkeypatch.setattr(StreamingRecognizer, "transcribe", lambda *_: "something else")
    with pytest.raises(OfframpError, match=r"at once; this is a defect of ours"):
        demo._stream(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("rule", "threshold", "shown"),
    [
        ("entropy", -0.125, "entropy 0.125 nats: saves"),
        ("entropy", 0.5, "entropy never leaves early: saves"),
        ("entropy", -sys.float_info.max, "entropy always leaves at the first exit: saves"),
        ("confidence", 0.875, "confidence 0.875: saves"),
        ("confidence", math.nextafter(1.0, 2.0), "confidence never leaves early: saves"),
        ("agreement", -sys.float_info.max, "agreement always leaves at the first exit: saves"),
    ],
)
def test_a_calibration_shows_what_threshold_takes(monkeypatch, rule, threshold, shown):
    written = capture(monkeypatch)
    found = Calibration(rule, (1, 2, 3), threshold, 0.1, 1.0, 50, 0.05, 0.0, 0.5, 1.0)
    terminal.show_calibration(found)
    assert f"\n{shown}" in written.getvalue()


def test_an_evaluation_shows_what_threshold_takes(monkeypatch, tmp_path, recogniser_folder):
    folder = shutil.copytree(recogniser_folder, tmp_path / "toy")
    path, recognizer = folder / CALIBRATION, Recognizer.load(folder)
    for threshold, bound, name in (
        (-0.125, 0.05, "entropy 0.125 nats (calibrated)"),
        (-sys.float_info.max, 0.05, "entropy always leaves at the first exit (calibrated)"),
        (None, None, "entropy never leaves early (calibrated)"),
    ):
        Calibration("entropy", (1, 2, 3), threshold, 0.1, 1.0, 50, bound, 0.0, 0.5, 1.0).save(path)
        found = exit_candidates(recognizer, {})["entropy"]
        made = PolicyResult(
            wer=0.0,
            wer_ci95=None,
            cer=0.0,
            mean_exit_layer=1.0,
            macs_per_audio_s=None,
            rtf=None,
            exit_histogram={},
            threshold=found.threshold,
            calibrated=found.calibrated,
        )
        written = capture(monkeypatch)
        terminal.show_asr(AsrReport("m", "d", 1, 1, 0, {"entropy": made}))
        assert name in written.getvalue()


def test_word_errors_are_counted_by_word():
    assert edit_distance(["they", "obeyed", "him"], ["they", "obey", "him", "so"]) == 2
    assert edit_distance(["a"], []) == 1 and edit_distance([], []) == 0
