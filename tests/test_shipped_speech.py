"""The speech models that ship: they load, fit their place, and still write what they wrote."""

from __future__ import annotations

import torch

from offramp.audio.io import read_audio
from offramp.audio.vad import VadOptions
from offramp.data.speech import normalize_text
from offramp.decoding.exit_policies import edit_distance
from offramp.decoding.speech_lm import DRAFTS, SpeechLMOptions, available_drafts
from offramp.demo import RECORDING, SAID
from offramp.models.hub import SHIPPED
from offramp.recognizer import Recognizer, TranscribeOptions
from offramp.speech_lm_recognizer import SpeechLMRecognizer
from offramp.stream_events import Final, Latency
from offramp.streaming import StreamingRecognizer

LARGEST = 16 * 2**20  # bytes of a file in the repository


def options(exit_layer: int) -> TranscribeOptions:
    return TranscribeOptions(exit_layer=exit_layer, vad=VadOptions(detector="energy"))


def test_asr_tiny_hears_the_sentence_of_the_demo() -> None:
    """At the last exit at most a third of the words are wrong; at the first some are right."""
    folder = SHIPPED["asr-tiny"]
    assert all(path.stat().st_size <= LARGEST for path in folder.iterdir())
    recognizer = Recognizer.load("asr-tiny")
    words = normalize_text(SAID).split()
    wrong = {}
    for exit_layer in recognizer.config.exits:
        made = recognizer.transcribe(RECORDING, options(exit_layer))
        wrong[exit_layer] = edit_distance(made.text.split(), words)
    assert wrong[recognizer.config.exits[-1]] <= len(words) / 3
    assert wrong[recognizer.config.exits[0]] < len(words)


def test_stream_tiny_writes_the_sentence_of_the_demo_as_it_comes_in() -> None:
    """At most half of the words are wrong, and the stream writes what hearing it at once gives."""
    folder = SHIPPED["stream-tiny"]
    assert all(path.stat().st_size <= LARGEST for path in folder.iterdir())
    recognizer, samples = StreamingRecognizer.load("stream-tiny"), read_audio(RECORDING)
    whole, words = recognizer.transcribe(samples), normalize_text(SAID).split()
    assert edit_distance(whole.split(), words) <= len(words) / 2
    events = list(recognizer.stream(torch.split(samples, 1600)))
    assert " ".join(e.text for e in events if isinstance(e, Final)) == whole
    assert Latency.of(events).first_partial_ms is not None


def test_speech_llm_tiny_writes_the_sentence_of_the_demo_in_fewer_calls() -> None:
    """At most half of the words are wrong, the same text with every draft; those by default save
    at least half of the decoder's calls."""
    folder = SHIPPED["speech-llm-tiny"]
    assert all(path.stat().st_size <= LARGEST for path in folder.iterdir())
    recognizer, vad = SpeechLMRecognizer.load("speech-llm-tiny"), VadOptions(detector="energy")
    assert available_drafts(recognizer.model) == DRAFTS
    made = {
        draft: recognizer.transcribe(RECORDING, SpeechLMOptions(draft, vad=vad)) for draft in DRAFTS
    }
    words = normalize_text(SAID).split()
    assert edit_distance(made["none"].text.split(), words) <= len(words) / 2
    assert len({transcript.text for transcript in made.values()}) == 1
    calls = {draft: t.decoding.counts.calls for draft, t in made.items() if t.decoding}
    assert max(calls.values()) == calls["none"] >= 2 * calls["ctc+mtp"]
