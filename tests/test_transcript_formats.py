"""Formats of transcripts: times rise and stay inside, and what is written reads back."""

from __future__ import annotations

import html
import itertools
import json
import re

import numpy as np
import pytest

from offramp.results import DecodeStats, ExitText, Generation, Transcript, TranscriptSegment, Word
from offramp.transcript_formats import FORMATS, cues

SPELLINGS = ("a", "the", "it's", "recognition", "antidisestablishmentarianism")


def random_transcript(seed: int) -> Transcript:
    """Segments with gaps between them, some without words, the last up to the very end."""
    draw = np.random.default_rng(seed)
    at, segments = 0.0, []
    for _ in range(draw.integers(0, 6)):
        start = at = at + draw.exponential(1.0)
        words = []
        for _ in range(draw.integers(0, 60)):
            begin = at + draw.choice([0.0, 0.1, 2.0], p=[0.3, 0.6, 0.1])
            at = begin + draw.choice([0.0, 0.04, 0.4], p=[0.1, 0.5, 0.4])
            words.append(Word(str(draw.choice(SPELLINGS)), begin, at, draw.uniform()))
        at += draw.choice([0.0, 0.2])
        text = " ".join(word.text for word in words)
        segments.append(TranscriptSegment(start, at, text, tuple(words), 0.5, 2, 10))
    return Transcript(tuple(segments), at, 0.1)


def seconds(clock: str) -> float:
    h, m, s = clock.replace(",", ".").split(":")
    return int(h) * 3600 + int(m) * 60 + float(s)


def read_srt(text: str) -> list[tuple[float, float, str]]:
    found = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n"), start=1):
        head, times, shown = block.split("\n")
        assert int(head) == number
        start, end = re.fullmatch(
            r"(\d\d+:\d\d:\d\d,\d{3}) --> (\d\d+:\d\d:\d\d,\d{3})", times
        ).groups()
        found.append((seconds(start), seconds(end), shown))
    return found


def read_vtt(text: str) -> list[tuple[float, float, str]]:
    head, *blocks = text.removesuffix("\n\n").split("\n\n")
    assert head == "WEBVTT"
    found = []
    for block in blocks:
        times, shown = block.split("\n")
        start, end = re.fullmatch(
            r"(\d\d+:\d\d:\d\d\.\d{3}) --> (\d\d+:\d\d:\d\d\.\d{3})", times
        ).groups()
        found.append((seconds(start), seconds(end), html.unescape(shown)))
    return found


def read_tsv(text: str) -> list[tuple[float, float, str]]:
    head, *lines = text.splitlines()
    assert head == "start\tend\ttext"
    rows = [line.split("\t") for line in lines]
    return [(int(start) / 1000, int(end) / 1000, shown) for start, end, shown in rows]


READERS = {"srt": read_srt, "vtt": read_vtt, "tsv": read_tsv}


@pytest.mark.parametrize("format", READERS)
@pytest.mark.parametrize("seed", range(12))
def test_cues_rise_stay_inside_and_hold_every_word(format: str, seed: int) -> None:
    transcript = random_transcript(seed)
    written = FORMATS[format](transcript)
    if not transcript.words:
        assert written in ("", "WEBVTT\n\n", "start\tend\ttext\n")
        return
    found = READERS[format](written)
    assert " ".join(text for _, _, text in found) == transcript.text
    times = [time for start, end, _ in found for time in (start, end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= transcript.audio_s
    assert len(found) == len(cues(transcript))
    for cue, (start, end, text) in zip(cues(transcript), found, strict=True):
        assert text == cue.text
        assert 0 <= cue.start_s - start < 0.001 and 0 <= cue.end_s - end < 0.001


@pytest.mark.parametrize("seed", range(12))
def test_a_cue_is_short_and_inside_its_segment(seed: int) -> None:
    transcript = random_transcript(seed)
    inside = [s for s in transcript.segments if s.words]
    starts = {word.start_s for word in transcript.words}
    for cue in cues(transcript):
        assert len(cue.text) <= 84
        assert cue.start_s in starts, "it begins with a word"
        assert any(s.start_s <= cue.start_s and cue.end_s <= s.end_s for s in inside)


def spoken(*times: tuple[str, float, float]) -> Transcript:
    words = tuple(Word(*time, 1.0) for time in times)
    text = " ".join(word.text for word in words)
    return Transcript((TranscriptSegment(0.0, 20.0, text, words, 1.0, 2, 1),), 20.0, 1.0)


def test_a_pause_ends_a_cue_and_silence_does_not_hold_it() -> None:
    shown = cues(spoken(("one", 1.0, 1.5), ("two", 2.0, 2.5), ("three", 5.0, 5.5)))
    assert [(c.start_s, c.end_s, c.text) for c in shown] == [
        (1.0, 3.0, "one two"),
        (5.0, 6.0, "three"),
    ]


def test_a_text_without_times_of_words_is_one_cue() -> None:
    """As from a Speech-LM whose CTC has other tokens."""
    untimed = TranscriptSegment(1.0, 9.0, "one two", (), None, 2, 1)
    empty = TranscriptSegment(9.0, 10.0, "", (), None, 2, 1)
    timed = TranscriptSegment(10.0, 20.0, "three", (Word("three", 11.0, 12.0, 1.0),), 1.0, 2, 1)
    shown = cues(Transcript((untimed, empty, timed), 20.0, 1.0))
    assert [(c.start_s, c.end_s, c.text) for c in shown] == [
        (1.0, 9.0, "one two"),
        (11.0, 12.5, "three"),
    ]


def test_long_speech_is_cut_by_time() -> None:
    shown = cues(spoken(*((f"w{i}", float(i), i + 0.5) for i in range(20))))
    assert all(c.end_s - c.start_s <= 7.5 for c in shown)
    for cue, following in itertools.pairwise(shown):
        assert cue.end_s <= following.start_s


def test_times_are_as_players_expect_them() -> None:
    transcript = spoken(("x", 3_723.57, 3_724.0))
    shifted = Transcript(
        (TranscriptSegment(3_723.0, 3_725.0, "x", transcript.words, 1.0, 2, 1),), 3_725.0, 1.0
    )
    assert "01:02:03,570 --> 01:02:04,500" in FORMATS["srt"](shifted)
    assert "01:02:03.570 --> 01:02:04.500" in FORMATS["vtt"](shifted)
    assert "3723570\t3724500\tx" in FORMATS["tsv"](shifted)


def test_signs_that_vtt_would_take_for_markup_are_escaped() -> None:
    written = FORMATS["vtt"](spoken(("a<b>&c", 1.0, 2.0)))
    assert "a&lt;b&gt;&amp;c" in written and read_vtt(written)[0][2] == "a<b>&c"


def test_plain_text_has_a_line_per_segment_with_text() -> None:
    transcript = random_transcript(3)
    lines = FORMATS["txt"](transcript).splitlines()
    assert lines == [s.text for s in transcript.segments if s.text] != []
    assert FORMATS["txt"](Transcript((), 5.0, 0.1)) == ""


def test_json_has_words_costs_and_the_trail_if_there_is_one() -> None:
    transcript = spoken(("one", 1.0, 1.5))
    read = json.loads(FORMATS["json"](transcript))
    assert read == json.loads(json.dumps(transcript.to_dict()))
    assert read["text"] == "one" and read["rtf"] == 0.05 and read["mean_exit_layer"] == 2
    (segment,) = read["segments"]
    assert segment["words"] == [{"text": "one", "start_s": 1.0, "end_s": 1.5, "confidence": 1.0}]
    assert (segment["exit_layer"], segment["macs"], read["macs"]) == (2, 1, 1)
    assert "trail" not in segment
    with_trail = TranscriptSegment(0, 1, "", (), None, 2, 1, (ExitText(2, "", 0.5),))
    read = Transcript((with_trail,), 1.0, 1.0).to_dict()
    assert read["segments"][0]["trail"] == ({"exit_layer": 2, "text": "", "score": 0.5},)


def test_silence_has_no_mean_exit_and_no_audio_no_rtf() -> None:
    assert Transcript((), 5.0, 0.1).mean_exit_layer is None
    assert Transcript((), 0.0, 0.1).rtf is None


def test_json_is_rounded_and_the_values_are_not() -> None:
    word = Word("one", 1.00049, 1.50051, 0.987654)
    segments = tuple(
        TranscriptSegment(1.00049, 2.12345678, "one", (word,), 0.987654, layer, 10_000_001)
        for layer in (2, 2, 4)
    )
    made = Transcript(segments, 3.123456, 0.0123456)
    read = made.to_dict()
    segment = read["segments"][0]
    assert (segment["start_s"], segment["end_s"], segment["confidence"]) == (1.0, 2.123, 0.9877)
    assert segment["words"][0] == {
        "text": "one",
        "start_s": 1.0,
        "end_s": 1.501,
        "confidence": 0.9877,
    }
    assert (read["audio_s"], read["seconds"], read["rtf"]) == (3.123, 0.012, 0.003953)
    assert (read["mean_exit_layer"], read["macs"]) == (2.667, 30_000_003)
    assert made.words[0] == word and made.rtf == 0.0123456 / 3.123456
    empty = Transcript((TranscriptSegment(0.0, 1.0, "", (), None, 2, 1),), 0.0, 0.1).to_dict()
    assert empty["segments"][0]["confidence"] is None and empty["rtf"] is None


def test_results_print_as_their_texts() -> None:
    made = spoken(("one", 1.0, 1.5), ("two", 2.0, 2.5))
    assert str(made) == made.text == "one two" and "Word(" in repr(made)
    generated = Generation("one", " two", (2,), "stop", DecodeStats(*[0] * 9, 0.0, 0.0))
    assert str(generated) == " two" and "prompt='one'" in repr(generated)
