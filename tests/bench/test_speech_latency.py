"""When words were said, and how long after that a stream's text has them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from offramp.bench.speech_latency import Aligner, SpeechLatency, standing
from offramp.data.speech import normalized, speech_set
from offramp.errors import DataError
from offramp.recognizer import Recognizer
from offramp.results import Word
from offramp.stream_events import Endpoint, Event, Final, Partial
from toy_speech import EDGE_S, PAUSE_S, TONE_S, speak


def text(kind: type[Partial | Final], said: str, told_s: float) -> Partial | Final:
    """Whose last word the model wrote at its own time, 0.1 s before `told_s`."""
    spelled = said.split()
    words = tuple(Word(w, 0.1 * n, 0.1 * (n + 1), 0.9) for n, w in enumerate(spelled))
    end_s = told_s - 0.1
    return kind(text=said, words=words, confidence=0.9, start_s=0.0, end_s=end_s, latency_ms=100.0)


def spoken(*words: tuple[str, float]) -> list[Word]:
    return [Word(word, end_s - 0.2, end_s, 1.0) for word, end_s in words]


EVENTS: list[Event] = [
    text(Partial, "the", 1.0),
    text(Partial, "the ca", 1.5),
    text(Partial, "the cat", 2.0),
    text(Partial, "the cat sat", 2.5),
    text(Final, "the cat sat", 3.0),
    Endpoint("silence", 3.2, 10.0),
    text(Partial, "no", 4.0),
    text(Final, "on it", 5.0),
]


def test_a_word_stands_since_it_last_changed() -> None:
    told = [("the", 1.0), ("cat", 2.0), ("sat", 2.5), ("on", 5.0), ("it", 5.0)]
    assert standing(EVENTS) == [(word, pytest.approx(at)) for word, at in told]
    back = [*EVENTS[:3], text(Partial, "the can", 2.2), text(Final, "the cat", 2.4)]
    assert standing(back)[1] == ("cat", pytest.approx(2.4)), "it was changed in between"
    assert standing(EVENTS[:3]) == [], "an utterance that does not end has no words for good"


def test_words_that_were_recognised_count_from_where_they_were_said() -> None:
    """`sat` was misheard, `mat` never said: neither has a latency."""
    said = spoken(("the", 0.4), ("cat", 1.2), ("sad", 2.0), ("on", 3.6), ("it", 4.9))
    found = SpeechLatency.over([(EVENTS, said)])
    # the 600, cat 800, on 1400, it 100 ms
    assert found.first_partial_ms == pytest.approx(600.0) and found.words == 4
    assert found.median_ms == pytest.approx(700.0) and found.p90_ms == pytest.approx(1400.0)


def test_a_model_that_writes_late_is_late() -> None:
    """However soon a text follows its writing, which is all that `latency_ms` tells."""
    said = spoken(("the", 0.4), ("cat", 1.2), ("sat", 2.0))
    soon = SpeechLatency.over([(EVENTS[:5], said)])
    late = [text(type(e), e.text, e.end_s + 1.1) for e in EVENTS[:5] if not isinstance(e, Endpoint)]
    slow = SpeechLatency.over([(late, said)])
    assert soon.median_ms is not None and slow.first_partial_ms is not None
    assert slow.median_ms == pytest.approx(soon.median_ms + 1000)
    assert slow.first_partial_ms == pytest.approx(1600.0)


def test_recordings_without_words_or_texts_have_none() -> None:
    nothing = SpeechLatency(None, None, None, 0)
    assert SpeechLatency.over([]) == SpeechLatency.over([(EVENTS, [])]) == nothing
    assert SpeechLatency.over([([], spoken(("the", 0.4)))]) == nothing
    wrong = SpeechLatency.over([(EVENTS[:1], spoken(("a", 0.4)))])
    assert wrong == SpeechLatency(pytest.approx(600.0), None, None, 0)


# -- when words were said ------------------------------------------------------------------------


def test_words_are_found_where_they_were_said(recogniser_folder: Path) -> None:
    aligner = Aligner(recogniser_folder)
    found = aligner.words(speak("do mi mi do"), "do mi mi do")
    assert [word.text for word in found] == ["do", "mi", "mi", "do"]
    for n, word in enumerate(found):
        start_s = EDGE_S + n * (TONE_S + PAUSE_S)
        assert start_s - 0.05 <= word.start_s < word.end_s <= start_s + TONE_S + 0.1
    assert aligner.words(torch.zeros(100), "do") == (), "too short for a frame"
    assert aligner.words(speak("do"), " ".join(40 * ["do"])) == (), "more text than frames"
    assert aligner.words(speak("do"), "do re") == (), "a word that it cannot write"


@pytest.mark.slow
def test_real_speech_is_aligned_as_it_is_recognised() -> None:
    """Words that asr-tiny recognises are where it writes them itself."""
    try:
        utterances = normalized(speech_set("kathleen_arctic", "dev"))[0][:6]
    except DataError as error:
        pytest.skip(f"the corpus is not here: {error}")
    aligner, recognizer, same = Aligner(), Recognizer.load(), 0
    for utterance in utterances:
        spoken = aligner.recording(utterance).spoken
        assert [word.text for word in spoken] == utterance.text.split()
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(spoken))
        (segment,) = recognizer.transcribe(utterance.path).segments
        own = {word.text: word.end_s for word in segment.words}
        same += sum(own.get(word.text) == pytest.approx(word.end_s, abs=0.09) for word in spoken)
    assert same > 0.6 * sum(len(u.text.split()) for u in utterances)
