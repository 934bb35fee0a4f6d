"""Error rates of streams by chunk size, and how streams are timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import toy_streaming
from commands import offramp
from offramp.audio.io import read_audio
from offramp.bench.asr import AsrData
from offramp.bench.speech_latency import Aligner, Recording, SpeechLatency
from offramp.bench.stream_quality import StreamQualityOptions, run
from offramp.bench.stream_timing import one_thread, spread, timings
from offramp.data.manifest import Utterance, read_manifest, write_manifest
from offramp.decoding.speech_stream import Stream
from offramp.errors import ConfigError, InputError
from offramp.results import Word
from offramp.streaming import StreamingRecognizer
from toy_streaming import RATE, babble

SECONDS = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model m, and a development set of which it makes no errors in its own chunks."""
    made = tmp_path_factory.mktemp("streams")
    toy_streaming.save(made / "m", factorised_blank=True, time_reduction=4, seed=5)
    recognizer, utterances = StreamingRecognizer.load(made / "m"), []
    for i in range(6):
        samples = babble(SECONDS, seed=i)
        soundfile.write(made / f"{i}.wav", samples.numpy(), RATE, subtype="FLOAT")
        text = recognizer.transcribe(samples)
        utterances.append(Utterance(made / f"{i}.wav", SECONDS, "s", "dev", text))
    write_manifest(made / "dev.tsv", utterances)
    return made


def test_every_chunk_size_has_its_errors_and_its_streams_write_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def said(self: Aligner, samples: Any, text: str) -> tuple[Word, ...]:
        return tuple(Word(word, 0.0, 0.1, 1.0) for word in text.split())

    monkeypatch.setattr(Aligner, "words", said)
    options = StreamQualityOptions((120.0, 40.0), streamed=4, rounds=1)
    told: list[tuple[int, int]] = []
    found = run(
        str(folder / "m"),
        AsrData(folder / "dev.tsv"),
        options,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (found.utterances, found.streamed, found.left_out) == (6, 4, 0)
    assert list(found.chunks) == [120.0, 40.0]
    own, other = found.chunks.values()
    assert own.wer.rate == 0.0 and own.cer == 0.0, "its own chunks are of 3 frames of 40 ms"
    assert other.wer.rate is not None and other.wer.rate > 0.0
    for made in found.chunks.values():
        assert made.identical == 4 and made.timing.rtf > 0.0
        assert made.timing.after_emission.first_partial_ms is not None
        late = made.timing.after_speech
        assert late.first_partial_ms is not None and 0.0 < late.first_partial_ms < 5000.0
    late = own.timing.after_speech
    assert late.words >= 4 and late.median_ms is not None, "all of its words are right"


def test_a_stream_that_writes_something_else_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "finish", lambda self: [])  # the end is lost
    found = run(
        str(folder / "m"), AsrData(folder / "dev.tsv", limit=2), StreamQualityOptions(rounds=1)
    )
    assert [made.identical for made in found.chunks.values()] == [0]


def test_the_command_shows_and_writes_them(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    words = ("eval", "stream", "--model", folder / "m", "--data", folder / "dev.tsv")
    status, out, err = offramp(capsys, *words, "--limit", "3", "--json", tmp_path / "r.json")
    assert (status, err) == (0, "")
    assert "120 ms" in out and "3 of 3" in out
    made = json.loads((tmp_path / "r.json").read_text())
    assert list(made["chunk_ms"]) == ["120"] and made["utterances"] == 3
    row = made["chunk_ms"]["120"]
    assert (row["wer"], row["wer_ci95"], row["cer"], row["identical"]) == (0.0, None, 0.0, 3)
    assert row["rtf"] > 0.0 and row["wait_after_emission_ms"]["first_partial_ms"] > 0.0
    assert list(row["latency_ms"]) == ["first_partial_ms", "median_ms", "p90_ms", "words"]
    assert "latency, ms" in out and "since the end of a word in the audio" in out
    status, out, err = offramp(capsys, *words, "--chunk-ms", "50")
    assert status == 2 and "chunk_ms is 50; this model hears whole frames of 40 ms" in err


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"chunk_ms": (80.0, 80.0)}, InputError, "give each once"),
        ({"streamed": 0}, ConfigError, "streamed is 0"),
        ({"rounds": 0}, ConfigError, "rounds is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(changes: Any, kind: Any, says: str) -> None:
    with pytest.raises(kind, match=says):
        StreamQualityOptions(**changes)


# -- time --------------------------------------------------------------------------------------


def test_arms_take_turns_on_one_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = StreamingRecognizer.load(folder / "m")
    chosen = spread(read_manifest(folder / "dev.tsv"), 2)
    recordings = [Recording(read_audio(u.path), ()) for u in chosen]
    assert [len(r.samples) for r in recordings] == 2 * [round(SECONDS * RATE)]
    seen: list[tuple[int, int]] = []
    opened: list[StreamingRecognizer] = []
    original = StreamingRecognizer.open

    def counted(self: StreamingRecognizer, *options: Any) -> Any:
        assert torch.get_num_threads() == 1
        opened.append(self)
        return original(self, *options)

    monkeypatch.setattr(StreamingRecognizer, "open", counted)
    other = StreamingRecognizer(loaded.model, loaded.pieces)
    threads = torch.get_num_threads()
    arms = {"a": loaded.open, "b": other.open}
    found = timings(arms, recordings, 1, lambda *done: seen.append(done))
    assert seen == [(1, 1)] and torch.get_num_threads() == threads
    turns = [["a", "b"][self is other] for self in opened]
    assert turns == ["a", "b", "b", "a", "b", "a", "a", "b"], "an unmeasured round comes first"
    for timing in found.values():
        assert timing.rtf > 0 and (timing.after_emission.first_partial_ms or 0) > 0
        assert timing.after_speech == SpeechLatency(None, None, None, 0), "not known when said"


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="broken"), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("broken")
    assert torch.get_num_threads() == before
