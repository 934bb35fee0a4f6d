"""From recordings to text: what is said comes out, at the right time, at the exit asked for."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import offramp
import toy_encoder
from offramp import transcription
from offramp.audio.features import FeatureConfig, log_mel_batch, normalize
from offramp.audio.io import SAMPLE_RATE
from offramp.audio.vad import VadOptions
from offramp.compress.checkpoint import companions, save_compressed
from offramp.compress.quantize import WeightQuantization
from offramp.decoding.beam import BeamOptions, beam_search
from offramp.decoding.calibration import Calibration
from offramp.decoding.ctc import text
from offramp.decoding.encoder_cost import measured_cost
from offramp.decoding.exit_policies import Confidence
from offramp.decoding.lm import WordScorer
from offramp.energy.cost import encoder_mac_parts, encoder_macs
from offramp.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
)
from offramp.models import hub
from offramp.models.ctc_checkpoint import save_encoder
from offramp.recognizer import Recognizer, TranscribeOptions
from offramp.streaming import StreamingRecognizer
from offramp.tokenizer import train_ctc_bpe
from offramp.transcription import length_batches
from toy_encoder import OURS, encoder
from toy_speech import CONFIG, EDGE_S, PAUSE_S, TONE_S, random_texts, speak, write

ENERGY = VadOptions(detector="energy")
GREEDY = TranscribeOptions(vad=ENERGY)
SILENCE = torch.zeros(round(1.2 * SAMPLE_RATE))
PIECES = ["", "\N{LOWER ONE EIGHTH BLOCK}a", "b", "c", " ", "d", "\N{LOWER ONE EIGHTH BLOCK}e"]


@pytest.fixture(scope="module")
def toy(recogniser_folder: Path) -> Recognizer:
    return Recognizer.load(recogniser_folder)


@pytest.fixture(scope="module")
def random_one() -> Recognizer:
    """Random weights: what it writes means nothing, and differs from exit to exit."""
    model = encoder(**OURS | {"pad_edges": False})
    return Recognizer(model, [*PIECES, *"fghi"])


def wav(samples: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, samples.numpy().astype(np.float32), SAMPLE_RATE, "FLOAT", format="WAV")
    file.seek(0)
    return file


def noise(seconds: float, seed: int = 0) -> Tensor:
    """In four puffs a second: steady noise would be no speech."""
    generator = torch.Generator().manual_seed(seed)
    puffs = (torch.arange(round(seconds * SAMPLE_RATE)) * (4 * torch.pi / SAMPLE_RATE)).sin() ** 2
    return 0.1 * puffs * torch.randn(len(puffs), generator=generator)


def talk(texts: list[str]) -> tuple[Tensor, list[float]]:
    """(utterances parted by silence, when each begins, its own edge of silence included)."""
    parts, starts, at = [], [], 0
    for said in texts:
        starts.append(at / SAMPLE_RATE)
        parts += [speak(said), SILENCE]
        at += len(parts[-2]) + len(SILENCE)
    return torch.cat(parts), starts


# -- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_layer", [*CONFIG.exits, None])
def test_what_is_said_is_written_at_its_time(toy: Recognizer, exit_layer: int | None) -> None:
    for said in random_texts(4, seed=99, longest=4):
        made = toy.transcribe(wav(speak(said)), replace(GREEDY, exit_layer=exit_layer))
        assert made.text == said
        assert made.mean_exit_layer == (exit_layer or CONFIG.num_layers)
        assert made.audio_s == pytest.approx(len(speak(said)) / SAMPLE_RATE, abs=1e-6)
        for nth, word in enumerate(made.words):
            tone = EDGE_S + nth * (TONE_S + PAUSE_S)
            assert tone - 0.1 <= word.start_s <= word.end_s <= tone + TONE_S + PAUSE_S
            assert 0.5 < word.confidence <= 1.0


def test_a_compressed_recogniser_serves_like_any_other(
    toy: Recognizer, recogniser_folder: Path, tmp_path: Path
) -> None:
    small = WeightQuantization(8, "int8").apply(toy.encoder)
    save_compressed(small, tmp_path / "small", companions(recogniser_folder))
    eco = Recognizer.load(tmp_path / "small")
    assert eco.pieces == toy.pieces and eco.weights_sha256() != toy.weights_sha256()
    (said,) = random_texts(1, seed=99, longest=4)
    for options in (GREEDY, replace(GREEDY, exit_layer=1), replace(GREEDY, beam_size=4)):
        assert eco.transcribe(wav(speak(said)), options).text == said
    with pytest.raises(CheckpointError, match="a compressed CTCEncoder, not a Transducer; give it"):
        StreamingRecognizer.load(tmp_path / "small")


def test_segments_come_in_order_with_times_of_the_recording(toy: Recognizer) -> None:
    texts = random_texts(5, seed=5)
    samples, starts = talk(texts)
    made = toy.transcribe(wav(samples), GREEDY)
    assert [segment.text for segment in made.segments] == texts
    assert made.text == " ".join(texts)
    for segment, start in zip(made.segments, starts, strict=True):
        assert start <= segment.start_s <= start + EDGE_S
    times = [t for s in made.segments for t in (s.start_s, *_times(s), s.end_s)]
    assert times == sorted(times) and times[-1] <= made.audio_s


def _times(segment: Any) -> list[float]:
    return [t for word in segment.words for t in (word.start_s, word.end_s)]


@pytest.mark.parametrize("pad_edges", [False, True])
def test_words_are_timed_where_the_frames_hear_them(pad_edges: bool) -> None:
    """A frame hears, evenly before and after its centre, the feature frames that change what the
    convolutions make of it; a word that it writes begins at that centre."""
    model = encoder(**OURS | {"pad_edges": pad_edges})
    one, at = Recognizer(model, [*PIECES, *"fghi"]), 5
    features = torch.randn(1, 90, model.config.num_mels, requires_grad=True)
    model.embed(features, torch.tensor([90])).h[0, at].square().sum().backward()
    assert features.grad is not None
    heard = features.grad[0].abs().sum(dim=1).nonzero()[:, 0]
    centre = (int(heard[0]) + int(heard[-1])) / 2
    reader = one.reader
    assert reader.first_frame_s + at * reader.frame_s == pytest.approx(centre / 100)
    samples = noise(1.5)
    (segment,) = one.transcribe(wav(samples), replace(GREEDY, exit_layer=2)).segments
    assert segment.words, "or nothing is shown"
    first, last = segment.words[0].start_s, segment.words[-1].end_s
    assert segment.start_s + reader.first_frame_s <= first <= last <= segment.end_s
    frames = (first - segment.start_s - reader.first_frame_s) / reader.frame_s
    assert frames == pytest.approx(round(frames), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batching_changes_nothing(random_one: Recognizer, batch_size: int) -> None:
    parts = [p for i in range(5) for p in (noise(0.4 + 0.7 * (i % 3), i), SILENCE)]
    samples = torch.cat(parts)
    never = TranscribeOptions("confidence", 1.1, vad=ENERGY, trail=True)
    sure = sorted(s.trail[0].score for s in random_one.transcribe(wav(samples), never).segments)
    options = replace(never, threshold=(sure[1] + sure[2]) / 2)
    whole = random_one.transcribe(wav(samples), options)
    some = random_one.transcribe(wav(samples), replace(options, batch_size=batch_size))
    assert len(whole.segments) == 5 and len({s.exit_layer for s in whole.segments}) > 1
    assert whole.text
    for a, b in zip(whole.segments, some.segments, strict=True):
        assert (a.text, a.exit_layer, a.macs) == (b.text, b.exit_layer, b.macs)
        assert _times(a) == _times(b)
        assert [(t.exit_layer, t.text) for t in a.trail] == [
            (t.exit_layer, t.text) for t in b.trail
        ]


def test_rows_of_like_length_go_together_and_none_is_lost() -> None:
    frames = [900, 10, 400, 300, 5000, 350]
    batches = length_batches(frames, 1000)
    assert sorted(row for rows in batches for row in rows) == list(range(6))
    assert [[frames[row] for row in rows] for rows in batches] == [
        [10, 300],
        [350, 400],
        [900],
        [5000],
    ]


def test_silence_is_an_empty_transcript(toy: Recognizer) -> None:
    made = toy.transcribe(wav(torch.zeros(3 * SAMPLE_RATE)), GREEDY)
    assert (made.text, made.segments, made.audio_s) == ("", (), 3.0)
    assert made.mean_exit_layer is None and made.macs == 0


def test_what_is_too_short_for_the_encoder_has_no_text(random_one: Recognizer) -> None:
    tight = VadOptions(detector="energy", min_speech_s=0.0, padding_s=0.0)
    options = TranscribeOptions(vad=tight)
    # Whole windows of the detector: 64 ms are 4 feature frames, and the encoder needs 7.
    short, long, quiet = noise(0.4)[1536:2560], noise(0.4), torch.zeros(40 * 512)
    assert random_one.transcribe(wav(short), options).segments == ()
    samples = torch.cat([quiet, short, quiet, long, quiet, short])
    made = random_one.transcribe(wav(samples), options)
    assert len(made.segments) == 1 and made.segments[0].start_s > 2.0


def test_segments_come_before_the_recording_has_ended(
    toy: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, _ = talk(["do mi"] * 12)
    blocks, read = torch.split(samples, 8_000), []

    def stream(source: object) -> Iterator[Tensor]:
        for number, block in enumerate(blocks):
            read.append(number)
            yield block

    monkeypatch.setattr(transcription, "stream_audio", stream)
    run = toy.stream("any", replace(GREEDY, batch_size=2))
    iterator = iter(run)
    assert next(iterator).text == "do mi"
    assert len(read) < len(blocks) / 2
    with pytest.raises(InputError, match="has not ended"):
        _ = run.transcript
    assert len(list(iterator)) == 11 and len(read) == len(blocks)
    assert run.transcript.audio_s == len(samples) / SAMPLE_RATE


def test_time_of_the_consumer_is_not_ours(toy: Recognizer) -> None:
    samples, _ = talk(["do", "mi", "do"])
    began = time.perf_counter()
    run = toy.stream(wav(samples), GREEDY)
    for _ in run:
        time.sleep(0.05)
    made = run.transcript
    assert 0 < made.seconds <= time.perf_counter() - began - 0.15
    assert made.rtf == made.seconds / made.audio_s


def test_any_rate_and_channel_count_will_do(toy: Recognizer, tmp_path: Path) -> None:
    stereo = speak("mi", rate=44_100)[:, None].repeat(1, 2)
    path = write(tmp_path / "a.flac", stereo, 44_100)
    assert offramp.transcribe(path, model=toy.folder, options=GREEDY).text == "mi"


def test_bad_recordings_are_audio_errors(toy: Recognizer, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not audio")
    for source in (tmp_path / "a.wav", tmp_path / "none.wav", tmp_path):
        with pytest.raises(AudioError):
            toy.transcribe(source, GREEDY)
    with pytest.raises(AudioError, match="NaN"):
        toy.transcribe(wav(torch.full((8_000,), torch.nan)), GREEDY)


@pytest.mark.parametrize("source", [b"RIFF", 3, None])
def test_what_is_no_recording_is_refused(toy: Recognizer, source: Any) -> None:
    name = type(source).__name__
    with pytest.raises(InputError, match=f"of type {name}; give a path") as caught:
        offramp.transcribe(source, model=toy.folder)
    assert "\n" not in str(caught.value)


# -- exits, costs --------------------------------------------------------------------------------


def frames_of(samples: Tensor, recognizer: Recognizer) -> int:
    return recognizer.reader.num_inputs(len(samples))


def test_the_trail_is_what_every_exit_writes(random_one: Recognizer) -> None:
    samples = noise(1.7)
    never = TranscribeOptions("confidence", 1.1, trail=True, vad=ENERGY)
    (segment,) = random_one.transcribe(wav(samples), never).segments
    assert [t.exit_layer for t in segment.trail] == list(random_one.config.exits)
    assert len({t.text for t in segment.trail}) > 1
    for tested in segment.trail:
        fixed = replace(GREEDY, exit_layer=tested.exit_layer, trail=True)
        (alone,) = random_one.transcribe(wav(samples), fixed).segments
        assert alone.text == tested.text
        assert [t.text for t in alone.trail] == [tested.text]
        frames = frames_of(samples, random_one)
        assert alone.macs == encoder_macs(random_one.config, frames, tested.exit_layer)


@pytest.mark.parametrize("feedback", [False, True])
def test_every_tested_head_counts_once(feedback: bool) -> None:
    model = encoder(**{**OURS, "feedback": feedback})
    one = Recognizer(model, [*PIECES, *"fghi"])
    samples = noise(1.1)
    (segment,) = one.transcribe(
        wav(samples), TranscribeOptions("confidence", 1.1, vad=ENERGY)
    ).segments
    frames = frames_of(samples, one)
    parts = encoder_mac_parts(one.config, frames, one.config.num_layers)
    head = one.config.output_frames(frames) * one.config.d_model * one.config.vocab_size
    others = parts.total - parts.heads
    assert segment.macs == others + len(one.config.exits) * head


@pytest.mark.parametrize(
    ("rule", "first", "last"), [("confidence", 0.0, 1.1), ("entropy", 99.0, -1.0)]
)
def test_extreme_thresholds_leave_first_or_last(
    random_one: Recognizer, rule: Any, first: float, last: float
) -> None:
    for threshold, layer in ((first, 2), (last, 5)):
        options = TranscribeOptions(rule, threshold, vad=ENERGY)
        made = random_one.transcribe(wav(noise(1.0)), options)
        assert made.mean_exit_layer == layer


def test_agreement_leaves_when_two_exits_write_the_same(toy: Recognizer) -> None:
    made = toy.transcribe(
        wav(speak("do mi do")), replace(GREEDY, exit_policy="agreement", threshold=1.0, trail=True)
    )
    (segment,) = made.segments
    assert segment.exit_layer == 2 and [t.text for t in segment.trail] == ["do mi do"] * 2


def test_a_policy_of_ones_own(toy: Recognizer) -> None:
    made = toy.transcribe(wav(speak("mi")), replace(GREEDY, exit_policy=Confidence(0.5)))
    assert made.mean_exit_layer == 1 and made.text == "mi"


def test_macs_stay_within_their_budget(random_one: Recognizer) -> None:
    samples = noise(1.3)
    frames = frames_of(samples, random_one)
    least, most = (encoder_macs(random_one.config, frames, e) for e in (2, 5))
    layers = []
    for budget in np.linspace(0.2 * least, 1.2 * most, 12):
        options = replace(GREEDY, budget_macs=float(budget))
        (segment,) = random_one.transcribe(wav(samples), options).segments
        assert segment.macs <= max(budget, least)
        layers.append(segment.exit_layer)
    assert layers == sorted(layers) and set(layers) == {2, 3, 5}


def test_a_budget_may_bound_a_rule(random_one: Recognizer) -> None:
    options = TranscribeOptions("confidence", 1.1, budget_macs=1.0, vad=ENERGY)
    assert random_one.transcribe(wav(noise(1.0)), options).mean_exit_layer == 2


def test_a_budget_of_time_reaches_the_first_exit_and_no_further_than_it_allows(
    random_one: Recognizer,
) -> None:
    samples = torch.cat([noise(0.5), SILENCE, noise(0.8)])
    for budget, layer in ((1e-6, 2), (1e6, 5)):
        made = random_one.transcribe(wav(samples), replace(GREEDY, budget_ms=budget))
        assert [s.exit_layer for s in made.segments] == [layer, layer]


def test_measured_costs_rise_with_depth_and_length(random_one: Recognizer) -> None:
    cost = measured_cost(random_one.encoder)
    assert 0 < cost(0, 2, 50) < cost(0, 5, 50) <= cost(0, 5, 500)
    assert cost(0, 2, 50) + cost(2, 3, 50) + cost(3, 5, 50) == pytest.approx(cost(0, 5, 50))


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layer": 2, "exit_policy": "entropy", "threshold": 1.0}, "exit_layer 2 fixes"),
        ({"exit_layer": 2, "budget_ms": 5.0}, "budget_ms was given too"),
        ({"exit_layer": 2, "max_wer_increase": 0.5}, "max_wer_increase was given too"),
        ({"budget_ms": 1.0, "budget_macs": 1.0}, "choose one"),
        ({"threshold": 0.5}, "a threshold needs the exit_policy"),
        ({"threshold": 0.5, "exit_policy": Confidence()}, "a threshold needs the exit_policy"),
        (
            {"threshold": 0.5, "exit_policy": "entropy", "max_wer_increase": 1.0},
            "exclude each other",
        ),
        ({"exit_policy": Confidence(), "max_wer_increase": 1.0}, "cannot be calibrated"),
        ({"calibration": Path("c.json")}, "give exit_policy or max_wer_increase"),
        ({"lm_weight": 0.5}, "lm_weight needs the lm"),
        ({"exit_policy": "patience"}, "allowed: confidence, entropy, agreement"),
        ({"exit_policy": "entropy", "threshold": float("nan")}, "threshold is nan"),
        ({"exit_layer": 4}, "exits at 1, 2, 3"),
        ({"hotwords": ("x-ray",)}, "hotword 'x-ray' cannot be recognised"),
        ({"hotwords": ("42",)}, "hotword '42' cannot be recognised"),
        ({"hotwords": (" ",)}, "hotword ' ' cannot be recognised"),
        ({"hotwords": "obeyed"}, "hotwords are 'obeyed'; give a tuple of phrases"),
        ({"hotwords": (3,)}, r"hotwords are \(3,\); give a tuple of phrases"),
        ({"exit_policy": object()}, "exit_policy is <object.*an ExitPolicy with tested and decide"),
        ({"max_wer_increase": 1.0, "beam_size": 4}, "beam_size was given together with"),
        ({"max_wer_increase": 1.0, "lm": Path("a.arpa")}, "lm was given together with"),
        ({"max_wer_increase": 1.0, "hotwords": ("do",)}, "hotwords was given together with"),
        ({"max_wer_increase": 1.0, "budget_ms": 5.0}, "budget_ms was given together with"),
        (
            {"exit_policy": "entropy", "calibration": Path("c.json"), "budget_macs": 1e9},
            "budget_macs was given together with.* greedy decoding without a budget",
        ),
    ],
)
def test_contradictions_are_refused(toy: Recognizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        toy.plan(TranscribeOptions(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"exit_layer": 0},
        {"beam_size": 0},
        {"batch_size": 0},
        {"budget_ms": 0.0},
        {"budget_macs": -1.0},
        {"max_wer_increase": float("inf")},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TranscribeOptions(**options)


def certified(**changes: Any) -> Calibration:
    values = {
        "rule": "confidence",
        "exits": CONFIG.exits,
        "threshold": 0.25,
        "max_wer_increase": 0.01,
        "cap": 1.0,
        "utterances": 200,
        "bound": 0.009,
        "mean_excess": 0.0,
        "saving": 0.5,
        "mean_exit_layer": 1.5,
    }
    return Calibration(**{**values, **changes})


def test_thresholds_come_from_the_calibration(toy: Recognizer, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    certified().save(path)
    for asked in (
        {"exit_policy": "confidence"},
        {"max_wer_increase": 1.0},
        {"exit_policy": "confidence", "max_wer_increase": 2.0},
    ):
        plan = toy.plan(TranscribeOptions(calibration=path, **asked))
        assert plan.policy == Confidence(0.25)
    for asked, message in (
        ({"exit_policy": "entropy"}, "is for the rule confidence, not entropy"),
        ({"max_wer_increase": 0.5}, r"certifies \+1 % WER, which is more than 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            toy.plan(TranscribeOptions(calibration=path, **asked))
    certified(exits=(1, 3)).save(path)
    with pytest.raises(ConfigError, match="calibrate anew"):
        toy.plan(TranscribeOptions(calibration=path, max_wer_increase=1.5))


def test_a_calibration_belongs_to_its_weights(toy: Recognizer, tmp_path: Path) -> None:
    assert toy.folder is not None
    own = toy.weights_sha256()
    assert own == hub.weights_sha256(toy.folder)
    options = TranscribeOptions(calibration=tmp_path / "c.json", max_wer_increase=1.0)
    certified(weights=own).save(tmp_path / "c.json")
    assert toy.plan(options).policy == Confidence(0.25)
    certified(weights="0" * 64).save(tmp_path / "c.json")
    with pytest.raises(ConfigError, match=r"calibrated for another checkpoint.*calibrate anew"):
        Recognizer.load(toy.folder).plan(options)


def test_without_a_calibration_a_rule_needs_a_threshold(
    toy: Recognizer, random_one: Recognizer
) -> None:
    with pytest.raises(InputError, match=r"calibration\.json is missing.*give a threshold"):
        toy.plan(TranscribeOptions(exit_policy="confidence"))
    with pytest.raises(InputError, match="has no folder"):
        random_one.plan(TranscribeOptions(max_wer_increase=1.0))


def test_equal_options_are_made_ready_once(toy: Recognizer) -> None:
    once = toy.plan(TranscribeOptions(hotwords=("do",)))
    assert toy.plan(TranscribeOptions(hotwords=("do",))) is once
    assert toy.plan(TranscribeOptions(hotwords=("mi",))) is not once


@pytest.mark.parametrize("hotwords", [(), ("ab", "ec")])
def test_beam_and_hotwords_decode_at_the_exit_taken(
    random_one: Recognizer, hotwords: tuple[str, ...]
) -> None:
    samples = noise(1.4, seed=4)
    options = replace(GREEDY, exit_layer=3, beam_size=6, hotwords=hotwords)
    made = random_one.transcribe(wav(samples), options)
    model = random_one.encoder
    features, lengths = log_mel_batch([samples], FeatureConfig(num_mels=8))
    state = model.run(model.embed(normalize(features, lengths), lengths), 0, 3)
    scorer = WordScorer(random_one.pieces, None, hotwords) if hotwords else None
    best = beam_search(model.log_probs(state, 3)[0], BeamOptions(6), scorer)[0]
    assert made.text == text(best.tokens, random_one.pieces)
    assert made.text != random_one.transcribe(wav(samples), replace(GREEDY, exit_layer=3)).text


def test_hotwords_are_spelled_as_the_model_writes(toy: Recognizer) -> None:
    options = replace(GREEDY, hotwords=("Do", "mi!"))
    assert toy.transcribe(wav(speak("do mi")), options).text == "do mi"


def test_a_language_model_decides_among_what_was_heard(toy: Recognizer, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="flashlight-text")
    from offramp.decoding.ngram import train_ngram

    train_ngram(["do mi do", "mi do"] * 3, 2, tmp_path / "lm.arpa")
    options = replace(GREEDY, lm=tmp_path / "lm.arpa", beam_size=4)
    assert toy.transcribe(wav(speak("mi do mi")), options).text == "mi do mi"
    heavy = replace(options, lm_weight=100.0)  # nothing ends so, for this model
    assert toy.transcribe(wav(speak("mi do mi")), heavy).text != "mi do mi"
    with pytest.raises(DataError, match=r"none\.arpa is missing"):
        toy.plan(TranscribeOptions(lm=tmp_path / "none.arpa"))


# -- checkpoints ---------------------------------------------------------------------------------


def test_models_of_another_kind_are_refused(checkpoint: Path, recogniser_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="of type 'llama', not 'offramp-ctc'"):
        Recognizer.load(checkpoint)
    with pytest.raises(CheckpointError, match=r"speech recogniser.*offramp transcribe"):
        offramp.load(recogniser_folder)


def test_the_default_says_when_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(hub.SHIPPED, "asr-tiny", tmp_path / "none")
    with pytest.raises(CheckpointError, match="asr-tiny does not come with this version"):
        offramp.transcribe("a.wav")
    assert "asr-tiny" not in hub.shipped() and "lm-tiny" in hub.shipped()


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    model = encoder()
    save_encoder(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        Recognizer.load(tmp_path / "a")
    larger = train_ctc_bpe(["the quick brown fox jumps over it"], 40).to_json()
    save_encoder(model, tmp_path / "b", files={"tokenizer.json": larger})
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        Recognizer.load(tmp_path / "b")


def test_pieces_that_the_tokenizer_lacks_write_nothing(tmp_path: Path) -> None:
    smaller = train_ctc_bpe(["ab"], 11)
    assert smaller.vocab_size < toy_encoder.SIZES["vocab_size"]
    save_encoder(encoder(), tmp_path / "m", files={"tokenizer.json": smaller.to_json()})
    loaded = Recognizer.load(tmp_path / "m")
    assert len(loaded.pieces) == 11 and loaded.pieces[-1] == ""
    for seed in range(3):
        assert set(loaded.transcribe(wav(noise(1.0, seed)), GREEDY).text) <= set("ab ")
