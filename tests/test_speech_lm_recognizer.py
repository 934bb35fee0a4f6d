"""Recordings through a Speech-LM: the same protocol as any recogniser's, and what only it has."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import offramp
import toy_hf
import toy_speech_lm
from offramp.audio.io import SAMPLE_RATE
from offramp.audio.vad import VadOptions
from offramp.config import EncoderConfig
from offramp.config_speech_lm import HeadsConfig, ProjectorConfig
from offramp.decoding.guard import Flag, GuardOptions
from offramp.decoding.speech_lm import DRAFTS, SpeechLMOptions
from offramp.energy.cost import encoder_mac_parts
from offramp.energy.hf_cost import shape_trail_macs
from offramp.errors import CheckpointError, InputError
from offramp.models.hf_ctc import PretrainedConfig
from offramp.models.hub import save_decoder
from offramp.models.speech_lm_checkpoint import SpeechLMParts, join_speech_lm
from offramp.recognizer import Recognizer, TranscribeOptions
from offramp.recognizers import is_speech_lm, options_for, transcriber
from offramp.results import DecoderCounts, TextFlag, Transcript
from offramp.speech_lm_recognizer import SpeechLMRecognizer, flagged_words
from offramp.transcript_formats import cues
from thinned import thinned
from toy import decoder as random_decoder

ENERGY = VadOptions(detector="energy")
OPTIONS = SpeechLMOptions(vad=ENERGY)


def recognizer(**changes: Any) -> SpeechLMRecognizer:
    return SpeechLMRecognizer(
        toy_speech_lm.varied(0, 1.0, **{"heads": HeadsConfig(), "ctc_exit": 3} | changes)
    )


@pytest.fixture(scope="module")
def toy() -> SpeechLMRecognizer:
    return recognizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy: SpeechLMRecognizer) -> Path:
    made = tmp_path_factory.mktemp("speech_lms") / "toy"
    toy_speech_lm.varied(0, 1.0, heads=HeadsConfig(), ctc_exit=3).save(made)
    return made


def puffs(seconds: float, seed: int) -> Tensor:
    """Noise in four puffs a second: steady noise would be no speech."""
    generator = torch.Generator().manual_seed(seed)
    swell = (torch.arange(round(seconds * SAMPLE_RATE)) * (4 * torch.pi / SAMPLE_RATE)).sin() ** 2
    return 0.1 * swell * torch.randn(len(swell), generator=generator)


def talk() -> Tensor:
    """Five stretches of noise, parted by silence."""
    silence = torch.zeros(round(1.2 * SAMPLE_RATE))
    return torch.cat([x for i in range(5) for x in (puffs(0.5 + 0.6 * (i % 3), i), silence)])


def wav(samples: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, samples.numpy().astype(np.float32), SAMPLE_RATE, "FLOAT", format="WAV")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def want(toy: SpeechLMRecognizer) -> Transcript:
    """What plain decoding writes, one utterance at a time."""
    return toy.transcribe(wav(talk()), replace(OPTIONS, draft="none", batch_size=1))


@pytest.mark.parametrize("draft", thinned(DRAFTS, keep=("none", "exit", "ctc+mtp")))
def test_every_draft_and_batch_size_makes_the_same_transcript(
    toy: SpeechLMRecognizer, want: Transcript, draft: Any
) -> None:
    made = toy.transcribe(wav(talk()), replace(OPTIONS, draft=draft, batch_size=3))
    assert [s.text for s in made.segments] == [s.text for s in want.segments]
    assert len(made.segments) == 5 and len({s.text for s in made.segments}) > 3
    for a, b in zip(made.words, want.words, strict=True):
        assert (a.text, a.start_s, a.end_s) == (b.text, b.start_s, b.end_s)
        assert a.confidence == pytest.approx(b.confidence, rel=1e-4)
    assert made.decoding is not None and made.decoding.draft == draft
    counts = [s.decoding.counts for s in made.segments if s.decoding is not None]
    assert made.decoding.counts == DecoderCounts.total(counts) and len(counts) == 5


def test_words_have_times_of_the_recording_and_make_up_the_text(toy: SpeechLMRecognizer) -> None:
    made = toy.transcribe(wav(talk()), OPTIONS)
    times = []
    for segment in made.segments:
        assert segment.text == " ".join(word.text for word in segment.words)
        assert segment.start_s + toy.reader.first_frame_s <= segment.words[0].start_s
        times += [segment.start_s]
        times += [t for w in segment.words for t in (w.start_s, w.end_s)] + [segment.end_s]
        assert segment.confidence is not None and 0.0 <= segment.confidence <= 1.0
    assert times == sorted(times) and times[-1] <= made.audio_s
    assert made.words, "or nothing is shown"


def test_json_says_what_was_drafted_and_what_each_part_took(toy: SpeechLMRecognizer) -> None:
    made = toy.transcribe(wav(talk()), replace(OPTIONS, draft="ctc+mtp"))
    told = json.loads(json.dumps(made.to_dict()))
    run = told["decoding"]
    assert (run["draft"], run["lossy"], run["unverified"]) == ("ctc+mtp", False, 0)
    assert run["calls"] == sum(s["decoding"]["calls"] for s in told["segments"]) > 0
    assert run["tokens"] == sum(s["decoding"]["tokens"] for s in told["segments"])
    for key in ("rounds", "drafted", "accepted"):
        of_segments = [s["decoding"]["sources"].values() for s in told["segments"]]
        total = sum(source[key] for sources in of_segments for source in sources)
        assert total == sum(source[key] for source in run["sources"].values())
    assert run["drafted"] == sum(source["drafted"] for source in run["sources"].values())
    assert run["acceptance_rate"] == round(run["accepted"] / run["drafted"], 4)
    parts = [run[name] for name in ("encoder_s", "ctc_s", "decoder_s")]
    assert min(parts) > 0 and sum(parts) <= told["seconds"]
    for segment in told["segments"]:
        assert segment["decoding"]["finish_reason"] in ("stop", "length")
        assert isinstance(segment["decoding"]["flags"], list)
    lossy = toy.transcribe(wav(talk()), replace(OPTIONS, draft="mtp", threshold=0.0)).to_dict()
    assert lossy["decoding"]["lossy"] and lossy["decoding"]["unverified"] > 0


def test_a_ctc_recogniser_says_nothing_of_decoding(recogniser_folder: Path) -> None:
    made = offramp.transcribe(
        wav(talk()), model=recogniser_folder, options=TranscribeOptions(vad=ENERGY)
    )
    told = made.to_dict()
    assert made.decoding is None and "decoding" not in told
    assert told["segments"] and not any("decoding" in s for s in told["segments"])


def test_silence_is_an_empty_transcript(toy: SpeechLMRecognizer) -> None:
    made = toy.transcribe(wav(torch.zeros(3 * SAMPLE_RATE)), OPTIONS)
    assert (made.text, made.segments, made.audio_s) == ("", (), 3.0)
    run = made.to_dict()["decoding"]
    assert (run["calls"], run["tokens"], run["tokens_per_call"]) == (0, 0, None)
    assert run["encoder_s"] == run["decoder_s"] == 0


def test_what_is_too_short_for_the_encoder_has_no_text() -> None:
    edges_cut = recognizer(encoder={"pad_edges": False})
    tight = replace(OPTIONS, vad=VadOptions(detector="energy", min_speech_s=0.0, padding_s=0.0))
    short, quiet = puffs(0.4, 0)[1536:2560], torch.zeros(40 * 512)
    assert edges_cut.transcribe(wav(short), tight).segments == ()
    both = edges_cut.transcribe(wav(torch.cat([short, quiet, puffs(0.4, 0)])), tight)
    assert len(both.segments) == 1


# -- as long as the decoder has room -------------------------------------------------------------


def test_the_longest_speech_is_the_one_whose_text_still_fits(toy: SpeechLMRecognizer) -> None:
    longest = round(toy.longest_s(60.0) * SAMPLE_RATE)

    def fits(num_samples: int) -> bool:
        num_inputs = toy.reader.num_inputs(num_samples)
        frames = toy.model.encoder.config.output_frames(num_inputs)
        return toy.model.room(num_inputs) > frames

    assert fits(longest) and not fits(longest + 1)
    assert 2 * SAMPLE_RATE < longest < 10 * SAMPLE_RATE
    assert toy.longest_s(1.5) == 1.5


def test_longer_speech_is_cut_into_pieces_that_fit(toy: SpeechLMRecognizer) -> None:
    made = toy.transcribe(wav(puffs(12.0, 3)), OPTIONS)
    limit = toy.longest_s(60.0)
    assert len(made.segments) >= 12 / limit
    for before, after in zip(made.segments, made.segments[1:], strict=False):
        assert before.end_s == after.start_s, "nothing is lost between them"
    for segment in made.segments:
        assert segment.end_s - segment.start_s <= limit
        assert segment.decoding is not None and segment.text


def test_a_context_too_short_for_speech_is_refused() -> None:
    small = recognizer(decoder={"max_positions": 24})
    message = r"context of 24 positions holds 0\.\d+ s of speech with its text"
    with pytest.raises(InputError, match=message) as caught:
        small.plan(OPTIONS)
    assert "\n" not in str(caught.value)


# -- what is not there ---------------------------------------------------------------------------


def test_without_a_ctc_of_the_decoders_tokens_a_text_has_no_times() -> None:
    deaf = recognizer(ctc_exit=None)
    made = deaf.transcribe(wav(talk()), OPTIONS)
    assert made.text and made.words == ()
    assert all(s.confidence is None and s.decoding and not s.decoding.flags for s in made.segments)
    assert [(c.start_s, c.end_s, c.text) for c in cues(made)] == [
        (s.start_s, s.end_s, s.text) for s in made.segments
    ]
    assert made.decoding is not None and made.decoding.draft == "mtp"


@pytest.mark.parametrize(("ctc_exit", "heads_read"), [(None, 0), (3, 1), (5, 1)])
def test_macs_are_those_of_the_encoder(ctc_exit: int | None, heads_read: int) -> None:
    one = recognizer(ctc_exit=ctc_exit, encoder={"feedback": False})
    config = one.model.encoder.config
    assert isinstance(config, EncoderConfig)
    (segment,) = one.transcribe(wav(puffs(0.9, 2)), OPTIONS).segments
    samples = round((segment.end_s - segment.start_s) * SAMPLE_RATE)
    parts = encoder_mac_parts(config, one.reader.num_inputs(samples), 5)
    assert segment.macs == parts.total - parts.heads + heads_read * parts.heads
    assert segment.exit_layer == 5


def test_a_transformers_encoder_serves_with_its_own_reader(tmp_path: Path) -> None:
    """The toy has 800 frames a second, so the decoder's context is a long one."""
    encoder = toy_hf.save_checkpoint(tmp_path / "encoder", "wav2vec2 layer norm first")
    words = toy_speech_lm.tokenizer()
    settings = toy_speech_lm.config(decoder={"max_positions": 3_000}).decoder
    save_decoder(random_decoder(**asdict(settings)), tmp_path / "decoder", words)
    parts = SpeechLMParts(
        str(encoder), str(tmp_path / "decoder"), ProjectorConfig(8, 24), HeadsConfig(3)
    )
    join_speech_lm(parts).save(tmp_path / "joined")
    one = SpeechLMRecognizer.load(tmp_path / "joined")
    made = one.transcribe(wav(puffs(0.4, 1)), OPTIONS)
    (segment,) = made.segments
    assert made.decoding is not None and made.decoding.draft == "mtp" and segment.text
    plain = one.transcribe(wav(puffs(0.4, 1)), replace(OPTIONS, draft="none"))
    assert plain.text == made.text and segment.words == ()
    config = one.model.encoder.config
    assert isinstance(config, PretrainedConfig)
    samples = round((segment.end_s - segment.start_s) * SAMPLE_RATE)
    head = config.output_frames(samples) * config.d_model * config.vocab_size
    assert segment.macs == shape_trail_macs(config.shape, samples, [5]) - head


# -- the guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "words"),
    [
        (0, 1, (0, 1)),
        (0, 2, (0, 1)),
        (1, 2, (0, 1)),
        (2, 3, (1, 2)),
        (1, 5, (0, 3)),
        (3, 5, (2, 3)),
    ],
)
def test_flagged_tokens_are_the_words_that_they_have_a_part_in(
    start: int, stop: int, words: tuple[int, int]
) -> None:
    parts = ["he", "llo", " you", " th", "ere"]
    assert flagged_words(Flag("unheard", start, stop), parts) == TextFlag("unheard", *words)


def test_flags_name_words_and_a_guard_may_stop_there(toy: SpeechLMRecognizer) -> None:
    strict = replace(OPTIONS, guard_options=GuardOptions(max_unheard=2, min_odds=0.9))
    flagged = toy.transcribe(wav(talk()), strict)
    stopped = toy.transcribe(wav(talk()), replace(strict, guard="stop"))
    seen = 0
    for whole, cut in zip(flagged.segments, stopped.segments, strict=True):
        assert whole.decoding is not None and cut.decoding is not None
        for flag in whole.decoding.flags:
            assert 0 <= flag.start < flag.stop <= len(whole.words)
        if whole.decoding.flags:
            seen += 1
            assert cut.decoding.flags[0].start == whole.decoding.flags[0].start
            assert len(cut.words) == cut.decoding.flags[0].stop
    assert seen, "or nothing is shown"


# -- which recogniser ----------------------------------------------------------------------------


def test_the_folder_says_which_recogniser_it_holds(
    folder: Path, recogniser_folder: Path, want: Transcript
) -> None:
    assert is_speech_lm(folder) and not is_speech_lm(recogniser_folder)
    made = offramp.transcribe(wav(talk()), model=folder, options=OPTIONS)
    assert made.text == want.text
    assert isinstance(offramp.SpeechLMRecognizer.load(folder), SpeechLMRecognizer)
    with pytest.raises(CheckpointError, match="offramp-speech-lm"):
        Recognizer.load(folder)
    with pytest.raises(CheckpointError, match="choose the folder of a Speech-LM"):
        SpeechLMRecognizer.load(recogniser_folder)


def test_options_of_the_other_kind_are_refused(folder: Path, recogniser_folder: Path) -> None:
    with pytest.raises(InputError, match="is a Speech-LM, which takes SpeechLMOptions"):
        transcriber(folder, TranscribeOptions())
    with pytest.raises(InputError, match="is no Speech-LM, and takes TranscribeOptions"):
        transcriber(recogniser_folder, SpeechLMOptions())
    with pytest.raises(InputError, match=r"lm is of no use to .*, a Speech-LM; leave it out"):
        options_for(folder, {"beam_size": 2, "lm": Path("a.arpa")})
    with pytest.raises(InputError, match=r"draft is of no use to .*, a CTC recogniser"):
        options_for(recogniser_folder, {"draft": "mtp"})
    assert options_for(folder, {"beam_size": 2}) == SpeechLMOptions(beam_size=2)
    assert options_for(recogniser_folder, {"beam_size": 2}) == TranscribeOptions(beam_size=2)


def test_what_the_model_lacks_shows_before_the_recording(folder: Path, tmp_path: Path) -> None:
    toy_speech_lm.checkpoint(ctc_exit=3).save(tmp_path / "headless")
    with pytest.raises(InputError, match="draft 'mtp' needs heads for more than one token"):
        transcriber(tmp_path / "headless", SpeechLMOptions("mtp"))
    with pytest.raises(InputError, match="of type int; give a path"):
        transcriber(folder, OPTIONS)(3)  # type: ignore[arg-type]
