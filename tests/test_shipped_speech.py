"""The recogniser that ships: it loads, fits its place, and still writes what it wrote."""

from __future__ import annotations

from offramp.audio.vad import VadOptions
from offramp.data.speech import normalize_text
from offramp.decoding.exit_policies import edit_distance
from offramp.demo import RECORDING, SAID
from offramp.models.hub import SHIPPED
from offramp.recognizer import Recognizer, TranscribeOptions

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
