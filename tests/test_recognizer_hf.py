"""Transformers models with exits behind `transcribe`, `eval asr` and `calibrate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from offramp.audio.io import read_audio
from offramp.audio.vad import VadOptions
from offramp.bench.asr import AsrData, CalibrateOptions, calibrate_model, run
from offramp.decoding import encoder_cost
from offramp.decoding.ctc import greedy, text
from offramp.decoding.encoder_cost import measured_cost
from offramp.energy.hf_cost import shape_trail_macs
from offramp.models.hf_checkpoint import PretrainedSpeech
from offramp.recognizer import Recognizer, TranscribeOptions
from thinned import thinned
from toy_encoder import randomize
from toy_hf import L, save_checkpoint
from toy_speech import speak, write, write_corpus

pytest.importorskip("transformers")


@pytest.fixture(
    scope="module",
    params=thinned(["wav2vec2 layer norm first", "parakeet"], keep=["wav2vec2 layer norm first"]),
)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with exit heads that all differ."""
    root = tmp_path_factory.mktemp("hf")
    made = PretrainedSpeech.load(save_checkpoint(root / "m", request.param), untrained=True)
    randomize(made.encoder.heads, 1)
    made.save(root / "exits")
    return root / "exits"


def energy(**more: Any) -> TranscribeOptions:
    return TranscribeOptions(vad=VadOptions(detector="energy"), **more)


def test_a_recording_is_written_as_the_model_writes_it(folder: Path, tmp_path: Path) -> None:
    it, speech = Recognizer.load(folder), PretrainedSpeech.load(folder)
    config = speech.encoder.config
    path = write(tmp_path / "a.wav", speak("do mi"))
    for exit_layer in (2, 4, L):
        (segment,) = it.transcribe(path, energy(exit_layer=exit_layer)).segments
        start, end = round(16_000 * segment.start_s), round(16_000 * segment.end_s)
        samples = read_audio(path)[start:end]
        state = speech.encoder.run(
            speech.encoder.embed(*speech.reader.inputs([samples])), 0, exit_layer
        )
        log_probs = speech.encoder.log_probs(state, exit_layer)
        (own,) = greedy(log_probs, state.lengths, config.blank_id)
        assert segment.text == text(own.tokens, speech.reader.pieces)
        length = speech.reader.num_inputs(len(samples))
        assert segment.macs == shape_trail_macs(config.shape, length, (exit_layer,))
        for word in segment.words:
            assert segment.start_s <= word.start_s <= word.end_s <= segment.end_s


def test_budgets_and_policies_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_cost, "_PROBE_S", (1, 2))  # the toy has 800 frames a second
    it = Recognizer.load(folder)
    path = write(tmp_path / "a.wav", speak("do mi do"))
    (least,) = it.transcribe(path, energy(budget_macs=1.0)).segments
    assert least.exit_layer == 2
    (most,) = it.transcribe(path, energy(budget_ms=1e9)).segments
    assert most.exit_layer == L
    never = energy(exit_policy="confidence", threshold=1.1)
    assert it.transcribe(path, never).segments[0].exit_layer == L
    assert 0.0 < measured_cost(it.encoder)(0, 2, 20) < math.inf


def test_an_exit_that_writes_blanks_alone_is_not_left_at(folder: Path, tmp_path: Path) -> None:
    it = Recognizer.load(folder)
    blank_id, log_probs = it.config.blank_id, it.encoder.log_probs

    def lost_at_two(state: Any, exit_layer: int) -> Any:
        found = log_probs(state, exit_layer)
        if exit_layer == 2:
            found[..., blank_id] += 50.0
        return found.log_softmax(-1)

    it.encoder.log_probs = lost_at_two
    path = write(tmp_path / "a.wav", speak("do mi do"))
    (segment,) = it.transcribe(path, energy(exit_policy="confidence", threshold=0.01)).segments
    assert segment.exit_layer > 2 and segment.text


def test_other_exit_heads_are_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    before = Recognizer.load(folder).weights_sha256()
    made = PretrainedSpeech.load(folder)
    randomize(made.encoder.heads, 2)
    made.save(tmp_path / "m")
    assert Recognizer.load(tmp_path / "m").weights_sha256() != before


def test_it_is_evaluated_and_calibrated(folder: Path, tmp_path: Path) -> None:
    data = AsrData(write_corpus(tmp_path / "c", ["do", "mi do", "do mi", "mi", "do do"]))
    report = run(folder, data)
    assert {"exit_2", "exit_4", f"exit_{L}", "confidence"} <= report.policies.keys()
    macs = [report.policies[f"exit_{e}"].macs_per_audio_s for e in (2, 4, L)]
    assert macs == sorted(macs, key=lambda m: m or 0.0) and all(macs)
    found = calibrate_model(folder, data, CalibrateOptions(max_wer_increase=50.0))
    assert found.exits == (2, 4, L)
