"""Synthetic speech: equal requests give equal samples, whatever was said before and wherever."""

from __future__ import annotations

import ctypes.util
import os
import pickle
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from offramp.data import corpora, synthetic
from offramp.data.speech import normalize_text
from offramp.data.synthetic import (
    HELD_OUT_VARIANTS,
    VARIANTS,
    VOICES,
    Espeak,
    Sentence,
    Speaker,
    SyntheticSpeech,
    book_sentences,
    espeak,
    normalize,
    split_sentences,
    synthesize,
    transcript_sentences,
)
from offramp.errors import ConfigError, DataError, InputError
from thinned import thinned

TEXT = "He walked slowly, and said nothing at all."
SENTENCES = [
    Sentence("Good morning, Mister Darcy.", "good morning mister darcy"),
    Sentence("It was a dark night.", "it was a dark night"),
    Sentence("Nothing was said.", "nothing was said"),
]


def has_espeak() -> bool:
    try:
        espeak()
    except ConfigError:
        return False
    return True


needs_espeak = pytest.mark.skipif(
    not has_espeak(), reason="needs espeak-ng: the Debian package or the wheel espeakng-loader"
)
needs_books = pytest.mark.skipif(
    not (corpora.data_root() / "gutenberg_books").is_dir(),
    reason="needs gutenberg_books in the folder OFFRAMP_DATA",
)


# -- speech --------------------------------------------------------------------------------------


@needs_espeak
def test_samples_are_16_khz_mono_in_range() -> None:
    samples = synthesize(TEXT, Speaker())
    assert samples.dtype == torch.float32 and samples.ndim == 1
    assert 1.5 < len(samples) / 16_000 < 4.0  # eight words at 175 a minute
    assert 0.05 < float(samples.abs().max()) <= 1.0
    power = torch.fft.rfft(samples).abs().square()
    hz = torch.fft.rfftfreq(len(samples), 1 / 16_000)
    assert float(power[hz < 4000].sum() / power.sum()) > 0.8  # a voice, at the right rate


@needs_espeak
@pytest.mark.parametrize(  # breath is random
    "variant", thinned(["", "f3", "Alicia", "sandro", "victor"], keep=("", "victor"))
)
def test_equal_requests_give_equal_samples_whatever_was_said_before(variant: str) -> None:
    speaker = Speaker(variant=variant)
    first = synthesize(TEXT, speaker)
    for i in range(3):
        synthesize(f"Something else, number {'abc'[i]}.", Speaker.draw(0, i))
        assert torch.equal(synthesize(TEXT, speaker), first)
    fresh = Espeak()
    samples, rate = fresh.speak(TEXT, speaker)
    fresh.close()
    again, _ = espeak().speak(TEXT, speaker)
    assert rate == 22_050 and np.array_equal(samples, again)


@needs_espeak
@pytest.mark.slow
def test_every_voice_and_variant_speaks_and_none_is_clipped() -> None:
    for voice in VOICES:
        assert espeak().speak("Hello there.", Speaker(voice))[0].any(), voice
    peaks = {}
    for variant in (*VARIANTS, *HELD_OUT_VARIANTS):
        samples, _ = espeak().speak("Hello there, all of you.", Speaker(variant=variant))
        peaks[variant] = int(np.abs(samples.astype(np.int32)).max())
    assert min(peaks.values()) > 500
    assert [v for v, peak in peaks.items() if peak >= 32_767] == []
    assert len(set(peaks.values())) > len(peaks) // 2  # they do not all fall back to one voice


@needs_espeak
def test_a_speakers_settings_are_heard() -> None:
    def pitch_hz(samples: Tensor) -> float:
        spectrum = torch.fft.rfft(samples, n=2 * len(samples)).abs().square()
        correlation = torch.fft.irfft(spectrum)
        return 16_000 / (40 + int(correlation[40:320].argmax()))  # 50 to 400 Hz

    plain = synthesize(TEXT, Speaker())
    assert len(synthesize(TEXT, Speaker(rate_wpm=120))) > 1.2 * len(plain)
    assert len(synthesize(TEXT, Speaker(word_gap=20))) > 1.1 * len(plain)
    low, high = (synthesize(TEXT, Speaker(pitch=p, pitch_range=0)) for p in (20, 80))
    assert pitch_hz(high) > 1.3 * pitch_hz(low)
    for other in (Speaker("gmw/en"), Speaker(variant="f3"), Speaker(pitch_range=90)):
        changed = synthesize(TEXT, other)
        assert changed.shape != plain.shape or not torch.equal(changed, plain)


@needs_espeak
def test_threads_take_turns() -> None:
    speakers = [Speaker.draw(1, i) for i in range(4)]
    expected = [synthesize(TEXT, s) for s in speakers]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(synthesize, [TEXT] * 12, speakers * 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 3, strict=True))


@needs_espeak
def test_what_cannot_be_spoken_is_named() -> None:
    with pytest.raises(InputError, match=r"no voice 'gmw/en-XX'"):
        synthesize(TEXT, Speaker("gmw/en-XX"))
    for text in ("", "  ", "..."):
        with pytest.raises(InputError, match="no words"):
            synthesize(text, Speaker())
    assert synthesize(TEXT, Speaker()).any()  # and it goes on afterwards


@needs_espeak
def test_text_is_text_and_nothing_else() -> None:
    """No option, markup or line of ours can be smuggled in by a text."""
    for text in ("-v nothing", '"quoted" \\ text', "two\nlines\n\nand more", "naïve café"):
        assert synthesize(text, Speaker()).any()


def test_without_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"offramp\[synthetic\]"):
        Espeak()
    with pytest.raises(ConfigError, match=r"does not start from /nowhere\.so"):
        Espeak("/nowhere.so")
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ConfigError, match="fork"):
        Espeak()


@needs_espeak
def test_a_process_that_died_is_reported() -> None:
    running = Espeak()
    running._process.kill()
    for _ in range(2):  # before and after the pipe is known to be broken
        with pytest.raises(ConfigError, match="has ended"):
            running.speak(TEXT, Speaker())
        running._process.wait()
    running.close()


@needs_espeak
@pytest.mark.peer
def test_it_says_what_the_espeak_program_says(tmp_path: Path) -> None:
    """The command of the same name, of the same version, from a fresh start."""
    import shutil
    import subprocess

    program = shutil.which("espeak-ng")
    if program is None or espeak().version not in subprocess.getoutput(f"{program} --version"):
        pytest.skip("needs the program espeak-ng, as old as the library")
    path = tmp_path / "out.wav"
    options = ["-v", "gmw/en-US+m3", "-s", "160", "-p", "40", "-a", "50", "-w", str(path)]
    subprocess.run([program, *options, TEXT], check=True)
    with wave.open(str(path)) as file:
        theirs = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    samples, _ = espeak().speak(TEXT, Speaker(variant="m3", rate_wpm=160, pitch=40))
    assert np.array_equal(samples, theirs[: len(samples)])


# -- speakers ------------------------------------------------------------------------------------


def test_speakers_are_drawn_from_seed_and_index() -> None:
    drawn = [Speaker.draw(3, i) for i in range(400)]
    assert drawn == [Speaker.draw(3, i) for i in range(400)]
    assert drawn != [Speaker.draw(4, i) for i in range(400)]
    assert {s.voice for s in drawn} == set(VOICES)
    assert {s.variant for s in drawn} == set(VARIANTS)
    assert len({(s.rate_wpm, s.pitch) for s in drawn}) > 350
    held_out = {Speaker.draw(3, i, held_out=True).variant for i in range(100)}
    assert held_out == set(HELD_OUT_VARIANTS) and not held_out & set(VARIANTS)


def test_settings_out_of_range_are_named() -> None:
    for name, value in (("rate_wpm", 20), ("pitch", 100), ("pitch_range", -1), ("word_gap", 101)):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            Speaker(**{name: value})


# -- sentences -----------------------------------------------------------------------------------


def texts(text: str, least: int = 1, most: int = 180) -> list[str]:
    return [s.text for s in split_sentences(text, least, most)]


def test_normalized_text() -> None:
    assert normalize("“It\u2019s Mr. O'Brien!” — said Zoë.") == "it's mister o'brien said zoe"
    assert normalize("'Tis the boys' well-known café; Dr. St. John's.") == (
        "tis the boys well known cafe doctor saint john's"
    )
    for text in ("A b, c.", "It's  not\tso -- is it?", "Æneas"):
        once = normalize(text)
        assert normalize(once) == once
    assert normalize("... -- !") == ""
    # Unlike `normalize_text`: what checkpoints were trained on stays as it is.
    assert normalize("Mr Hubble, etc.") == "mr hubble etc"
    assert normalize_text("Mr Hubble, etc.") == "mister hubble et cetera"


def test_sentences_end_where_they_end() -> None:
    text = (
        "Mr. Darcy came. \"Is it you?\" he asked. 'No!' She left... Then J. Smith spoke.\nThe end"
    )
    assert texts(text) == [
        "mister darcy came",
        "is it you he asked",
        "no",
        "she left",
        "then j smith spoke",
        "the end",
    ]


def test_what_is_read_otherwise_than_written_is_left_out() -> None:
    text = (
        "In 1805 he left. It cost 5. CHAPTER ONE was long. Book IV. He came.  See p. 5 & more. Yes."
    )
    assert texts(text) == ["he came", "yes"]
    assert texts("I saw. It was I. You and I.") == ["i saw", "it was i", "you and i"]


def test_long_sentences_are_cut_at_clauses_and_lose_nothing() -> None:
    text = (
        "One two three four, five six seven; eight nine -- ten eleven: twelve, thirteen fourteen."
    )
    whole = texts(text)[0]
    for most in (25, 30, 45, 60):
        parts = texts(text, 1, most)
        assert " ".join(parts) == whole and all(len(p) <= most for p in parts)
        # As few parts as that takes: no two neighbours would have fitted in one.
        assert all(len(a) + 1 + len(b) > most for a, b in pairwise(parts))
    assert texts(text, 1, 10) == ["eight nine", "ten eleven", "twelve"]  # no other is that short
    assert texts("Too short. Long enough.", 10) == ["long enough"]


@needs_books
def test_sentences_of_a_book() -> None:
    (novel,) = corpora.books("dev").values()
    novel = novel[:150_000].rpartition("\n")[0]
    found = [*split_sentences(novel)]
    assert sum(len(s.text) for s in found) > 0.8 * len(normalize(novel))
    for sentence in found:
        assert 15 <= len(sentence.text) <= 180
        assert sentence.text == normalize(sentence.spoken)
        assert set(sentence.text) <= set("abcdefghijklmnopqrstuvwxyz' ")


def test_books_give_each_sentence_once_and_keep_their_split(tmp_path: Path) -> None:
    for split, title, text in (
        ("train", "a", "It was a dark night.\n\nNobody came\nto the old house."),
        ("train", "b", "It was a DARK night. It was a dark night! Somebody came after all."),
        ("dev", "c", "Whatever happens happens."),
    ):
        folder = tmp_path / "gutenberg_books" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{title}.txt").write_text(text)
    assert [s.text for s in book_sentences("train", tmp_path)] == [
        "it was a dark night",
        "nobody came to the old house",
        "somebody came after all",
    ]
    assert [s.text for s in book_sentences("dev", tmp_path)] == ["whatever happens happens"]


@pytest.mark.skipif(
    not (corpora.data_root() / "librispeech_transcripts_text").is_dir(),
    reason="needs librispeech_transcripts_text in the folder OFFRAMP_DATA",
)
def test_transcripts_are_held_out_by_chapter() -> None:
    train, dev = transcript_sentences("train"), transcript_sentences("dev")
    assert len(train) + len(dev) == 2687
    assert 0.03 < len(dev) / 2687 < 0.2
    # They are normalised as we do it, but for one stray quotation mark.
    assert sum(s.text != s.spoken for s in (*train, *dev)) <= 1


def test_transcripts_from_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train, dev"):
        transcript_sentences("test", tmp_path)
    with pytest.raises(DataError, match="OFFRAMP_DATA"):
        transcript_sentences("train", tmp_path)
    folder = tmp_path / "librispeech_transcripts_text"
    folder.mkdir()
    (folder / "dev_clean.tsv").write_text("subset\tid\ttext\ndev-clean\t1-2-3\t\n")
    with pytest.raises(DataError, match="without id or text"):
        transcript_sentences("train", tmp_path)


# -- the two together ----------------------------------------------------------------------------


@needs_espeak
def test_an_item_is_a_function_of_seed_and_index() -> None:
    speech = SyntheticSpeech(SENTENCES, seed=5, length=7)
    items = [*speech]
    assert len(speech) == len(items) == 7
    for index in (4, 0, 6):
        samples, text = pickle.loads(pickle.dumps(speech))[index]
        assert text == items[index][1] and torch.equal(samples, items[index][0])
    other = SyntheticSpeech(SENTENCES, seed=6, length=7)
    assert [other.item(i) for i in range(7)] != [speech.item(i) for i in range(7)]
    sentence, speaker = speech.item(2)
    assert torch.equal(speech[2][0], synthesize(sentence.spoken, speaker))


def test_every_pass_says_every_sentence_in_its_own_order_and_voices() -> None:
    many = [Sentence(f"number {i}", f"number {i}") for i in range(20)]
    speech = SyntheticSpeech(many, seed=0, length=60)
    passes = [[speech.item(i) for i in range(at, at + 20)] for at in (0, 20, 40)]
    said = [[sentence.text for sentence, _ in p] for p in passes]
    assert all(sorted(s) == sorted(said[0]) for s in said)
    assert said[0] != said[1] != said[2]
    assert len({speaker for p in passes for _, speaker in p}) == 60
    held_out = SyntheticSpeech(many, 0, 60, held_out=True)
    assert {held_out.item(i)[1].variant for i in range(60)} <= set(HELD_OUT_VARIANTS)
    for index in (-1, 60):
        with pytest.raises(IndexError):
            speech.item(index)
    with pytest.raises(DataError, match="no sentences"):
        SyntheticSpeech([], 0, 1)
    with pytest.raises(ConfigError, match="length"):
        SyntheticSpeech(many, 0, 0)


@needs_espeak
@pytest.mark.slow
def test_data_loading_processes_give_the_same() -> None:
    speech = SyntheticSpeech(SENTENCES, seed=5, length=6)
    expected = [speech[i] for i in range(6)]  # also starts ours, which they must not share
    loader = DataLoader(speech, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    found = [*loader]
    assert [text for _, text in found] == [text for _, text in expected]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, expected, strict=True))
    assert torch.equal(speech[0][0], expected[0][0])  # ours still answers


@needs_espeak
def test_settings_change_with_what_items_depend_on() -> None:
    settings = SyntheticSpeech(SENTENCES, 5, 7).settings()
    assert settings["espeak-ng"] == espeak().version
    assert settings == SyntheticSpeech(SENTENCES, 5, 70).settings()
    others = (
        SyntheticSpeech(SENTENCES[:2], 5, 7),
        SyntheticSpeech(SENTENCES, 6, 7),
        SyntheticSpeech(SENTENCES, 5, 7, held_out=True),
    )
    assert all(other.settings() != settings for other in others)


def test_one_process_runs_one_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Fake:
        def __init__(self) -> None:
            started.append(os.getpid())

        def close(self) -> None: ...

    monkeypatch.setattr(synthetic, "_running", {})
    monkeypatch.setattr(synthetic, "Espeak", Fake)
    with ThreadPoolExecutor(8) as pool:
        assert len({id(e) for e in pool.map(lambda _: espeak(), range(50))}) == 1
    assert started == [os.getpid()]
