"""Corpora in the layouts of their downloads, digit strings, and transcripts made targets."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import pytest
import soundfile

from offramp.audio.io import read_audio
from offramp.data.corpora import data_root
from offramp.data.manifest import Utterance, read_manifest
from offramp.data.speech import (
    HELD_OUT_SPEAKER,
    SPEECH_SETS,
    connected_digits,
    normalize_text,
    normalized,
    prepare_common_voice,
    prepare_librispeech,
    prepare_ljspeech,
    shared_speech,
    speech_set,
    write_digit_strings,
)
from offramp.errors import DataError

on_disk = pytest.mark.skipif(
    not (data_root() / "fsdd").is_dir(), reason=f"no speech at {data_root()}: set OFFRAMP_DATA"
)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def recording(path: Path, seconds: float = 0.1, level: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * 16_000), level), 16_000)
    return path


# -- transcripts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the danger trail, Philip Steels, etc.", "the danger trail philip steels et cetera"),
        ('DON\'T say "hello" -- it\u2019s late.', "don't say hello it's late"),
        ("'Tis the boys' own; rock 'n' roll!", "tis the boys own rock n roll"),
        ("Mr. Dent, Mrs Dent and MR. DENT", "mister dent missus dent and mister dent"),
        ("twenty-five per cent (or so)", "twenty five per cent or so"),
        ("naïve café, Æsop, Straße, coöperate", "naive cafe aesop strasse cooperate"),
        ("the U.S. at 'home'…", "the u s at home"),
        ("one\u00a0two\tthree\nfo\u00adur\u200b", "one two three four"),
        ("the smr and etch", "the smr and etch"),
        ("", ""),
        ("...", ""),
    ],
)
def test_transcripts_become_lower_case_words(text: str, expected: str) -> None:
    assert normalize_text(text) == expected
    assert normalize_text(expected) == expected


@pytest.mark.parametrize(
    ("text", "char"),
    [
        ("in 1984", "1"),
        ("50% more", "5"),
        ("more %", "%"),
        ("for $ and £", r"\$"),
        ("Smith & Sons", "&"),
        ("one ½ two", "½"),
        ("chapter Ⅳ", "Ⅳ"),
        ("me@home", "@"),
        ("x²", "²"),
        ("acme™", "™"),
        ("Кот sat", "к"),
        ("日本", "日"),
    ],
)
def test_what_has_no_single_reading_is_refused_rather_than_invented(text: str, char: str) -> None:
    with pytest.raises(DataError, match=f"has (the letter )?'{char}', "):
        normalize_text(text)


def test_utterances_without_a_reading_are_left_out_and_given_back() -> None:
    texts = ["A cat.", "In 1984", "?!", "it's"]
    utterances = [Utterance(Path(f"{i}.wav"), 1.0, "s", "dev", t) for i, t in enumerate(texts)]
    kept, left_out = normalized(utterances)
    assert [(u.path.name, u.text) for u in kept] == [("0.wav", "a cat"), ("3.wav", "it's")]
    assert left_out == utterances[1:3]


# -- layouts -----------------------------------------------------------------------------------


def librispeech(root: Path) -> Path:
    for subset, chapter in (("train-clean-5", "19/198"), ("dev-other", "116/288045")):
        lines = []
        for number in range(3):
            name = f"{chapter.replace('/', '-')}-{number:04d}"
            recording(root / subset / chapter / f"{name}.flac", 0.1 + number / 10)
            lines.append(f"{name} IT'S NUMBER {'ABC'[number]}\n")
        folder = root / subset / chapter
        (folder / f"{chapter.replace('/', '-')}.trans.txt").write_text("".join(lines))
    (root / "README.TXT").write_text("not a subset")
    (root / "train-clean-100-notes").mkdir()
    return root


def test_librispeech_is_read_with_speakers_splits_and_lengths(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    found = prepare_librispeech(root)
    assert len(found) == 6
    assert found[5] == Utterance(
        root / "train-clean-5/19/198/19-198-0002.flac", 0.3, "19", "train", "IT'S NUMBER C"
    )
    assert {(u.split, u.speaker) for u in found} == {("train", "19"), ("dev", "116")}
    assert [u.split for u in prepare_librispeech(root, ["dev-other"])] == ["dev"] * 3


def test_what_librispeech_lacks_is_named_at_once(tmp_path: Path) -> None:
    root = librispeech(tmp_path)
    (root / "dev-other/116/288045/116-288045-0001.flac").unlink()
    recording(root / "train-clean-5/19/198/19-198-0009.flac")
    (root / "train-clean-5/19/198/19-198-0000.flac").write_text("no audio")
    with pytest.raises(DataError) as error:
        prepare_librispeech(root, ["train-clean-5", "dev-other", "dev-clean"])
    message = str(error.value)
    assert "has 4 problems" in message
    for part in (
        "116-288045-0001.flac is missing",
        "19-198.trans.txt has no line for 19-198-0009",
        "19-198-0000.flac is not a recording",
        "dev-clean has no transcripts",
    ):
        assert part in message
    with pytest.raises(DataError, match="has no subset of LibriSpeech, such as dev-clean"):
        prepare_librispeech(root / "dev-other")
    with pytest.raises(DataError, match="is no folder"):
        prepare_librispeech(root / "gone")


def common_voice(root: Path) -> Path:
    for split, count in (("train", 3), ("dev", 1)):
        rows = ["client_id\tpath\tsentence_id\tsentence\tup_votes"]
        for i in range(count):
            clip = recording(root / "clips" / f"common_voice_en_{split}{i}.mp3", 0.5)
            rows.append(f'{split}{"f" * 124}\t{clip.name}\t\t"Say" {i}, she said.\t2')
        (root / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return root


def test_common_voice_is_read_with_or_without_its_table_of_lengths(tmp_path: Path) -> None:
    root = common_voice(tmp_path)
    found = prepare_common_voice(root)
    assert [u.split for u in found] == ["train"] * 3 + ["dev"]
    assert found[1].text == '"Say" 1, she said.'
    assert found[1].path == root / "clips/common_voice_en_train1.mp3"
    assert found[1].speaker == "trainfffffffffff"
    assert found[1].seconds == pytest.approx(0.5, abs=0.1)
    table = "clip\tduration[ms]\ncommon_voice_en_train1.mp3\t4608\nother.mp3\tx\n"
    (root / "clip_durations.tsv").write_text(table)
    again = prepare_common_voice(root)
    assert again[1].seconds == 4.608
    assert again[0] == found[0]


def test_what_common_voice_lacks_is_named_at_once(tmp_path: Path) -> None:
    root = common_voice(tmp_path)
    (root / "clips/common_voice_en_train0.mp3").unlink()
    with (root / "dev.tsv").open("a") as file:
        file.write("someone\t\t\tno clip\t2\n")
    with pytest.raises(DataError, match=r"has 2 problems: .*train0\.mp3 is missing; .*line 3: no"):
        prepare_common_voice(root)
    with pytest.raises(DataError, match=r"has no train\.tsv, dev\.tsv or test\.tsv"):
        prepare_common_voice(root / "clips")


def test_ljspeech_is_read_with_its_normalised_text_and_a_split_that_stays(tmp_path: Path) -> None:
    names = [f"LJ{book:03d}-{i:04d}" for book in (1, 2) for i in range(100)]
    for name in names:
        recording(tmp_path / "wavs" / f"{name}.wav", 0.01)
    lines = [f'{name}|In "1455"|In "fourteen fifty-five' for name in names]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = prepare_ljspeech(tmp_path)
    assert [u.path.stem for u in found] == names
    assert {u.text for u in found} == {'In "fourteen fifty-five'}
    dev = {u.path.stem for u in found if u.split == "dev"}
    assert 1 <= len(dev) <= 12
    (tmp_path / "metadata.csv").write_text("\n".join(lines[::2]))
    fewer = prepare_ljspeech(tmp_path)
    assert {u.path.stem for u in fewer if u.split == "dev"} == dev & set(names[::2])
    (tmp_path / "metadata.csv").write_text(f"{lines[0]}\nLJ001-0001|two\nLJ9|a|a\nLJ001-0002|a|")
    with pytest.raises(DataError, match=r"3 problems: .* line 2: 2 columns; .*LJ9\.wav is missing"):
        prepare_ljspeech(tmp_path)


# -- the data folder ---------------------------------------------------------------------------


@on_disk
@pytest.mark.parametrize("name", SPEECH_SETS)
def test_every_set_is_read_and_its_transcripts_have_readings(name: str) -> None:
    found = speech_set(name)
    kept, left_out = normalized(found)
    if SPEECH_SETS[name]:
        assert len(kept) == len(found)
        assert set("".join(u.text for u in kept)) <= set(string.ascii_lowercase + "' ")
    else:
        assert left_out == found
    assert all(u.seconds > 0 and u.speaker for u in found)


@on_disk
def test_the_transcribed_sentences_are_those_that_we_count_on() -> None:
    train, dev = shared_speech("train"), shared_speech("dev")
    assert "librispeech_test_other_100" not in train
    assert sum(u.seconds for found in train.values() for u in found) / 3600 == pytest.approx(
        6.6, abs=0.1
    )
    assert {name: len(found) for name, found in dev.items()} == {
        "mini_librispeech_train_clean_5": 117,
        "kathleen_arctic": 76,
        "ljspeech_excerpt": 20,
        "ljspeech_part_1": 22,
        "vctk_p239": 22,
        "common_voice_en_100": 13,
        "librispeech_test_other_100": 50,
    }
    for name in ("mini_librispeech_train_clean_5", "common_voice_en_100"):
        assert not {u.speaker for u in train[name]} & {u.speaker for u in dev[name]}


def test_an_unknown_or_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no speech set 'timit'; known are mini_librispeech"):
        speech_set("timit")
    with pytest.raises(DataError, match=r"vctk_p239.manifest\.tsv is missing; set OFFRAMP_DATA"):
        speech_set("vctk_p239", root=tmp_path)


# -- connected digits --------------------------------------------------------------------------


@pytest.fixture
def takes(tmp_path: Path) -> Path:
    """A folder with an FSDD of two speakers: the level of a take tells which digit it is."""
    rows = ["path\tseconds\tspeaker\tsplit\ttext"]
    for speaker in ("ann", HELD_OUT_SPEAKER):
        for digit, word in enumerate(DIGITS):
            for take, split in enumerate(("dev", "train", "train")):
                name = f"flac/{digit}_{speaker}_{take}.flac"
                recording(tmp_path / "fsdd" / name, 0.05, (digit + 1) / 20)
                rows.append(f"{name}\t0.05\t{speaker}\t{split}\t{word}")
    (tmp_path / "fsdd" / "manifest.tsv").write_text("\n".join(rows))
    return tmp_path


def test_digit_strings_say_what_their_text_says(takes: Path) -> None:
    for found in connected_digits("train", 20, root=takes):
        words, at, samples = found.text.split(), 0, found.samples()
        assert 3 <= len(words) <= 7
        for word, pause in zip(words, found.pauses_s, strict=False):
            quiet = round(pause * 16_000)
            assert not samples[at : at + quiet].any()
            spoken = samples[at + quiet : at + quiet + 800]
            assert spoken.mean().item() == pytest.approx((DIGITS.index(word) + 1) / 20, abs=1e-3)
            at += quiet + 800
        assert len(samples) == at + round(found.pauses_s[-1] * 16_000)
        assert not samples[at:].any()


def test_splits_of_digits_share_no_take_and_the_held_out_speaker_is_in_one(takes: Path) -> None:
    used = {}
    for split in ("train", "dev", "held_out"):
        strings = connected_digits(split, 200, root=takes)
        assert {s.split for s in strings} == {split}
        speakers = {s.speaker for s in strings}
        assert speakers == ({HELD_OUT_SPEAKER} if split == "held_out" else {"ann"})
        used[split] = {take for s in strings for take in s.takes}
        assert all(s.speaker in take.name for s in strings for take in s.takes)
    assert not used["train"] & used["dev"]
    assert len(used["train"]) == 20
    assert len(used["dev"]) == 10
    assert len(used["held_out"]) == 30


def test_digit_strings_are_the_same_for_the_same_seed(takes: Path) -> None:
    first = connected_digits("train", 30, seed=3, root=takes)
    assert connected_digits("train", 30, seed=3, root=takes) == first
    assert connected_digits("train", 10, seed=3, root=takes) == first[:10]
    assert connected_digits("train", 30, seed=4, root=takes) != first
    assert len({s.text for s in first}) > 25
    with pytest.raises(DataError, match=r"no split 'test' of digits; known are train, dev, held"):
        connected_digits("test", 1, root=takes)


def test_digit_strings_are_written_with_a_manifest(takes: Path, tmp_path: Path) -> None:
    strings = connected_digits("held_out", 4, root=takes)
    for _ in range(2):  # also over what is there
        manifest = write_digit_strings(strings, tmp_path / "digits")
    found = read_manifest(manifest, "held_out", check_audio=True)
    assert [u.text for u in found] == [s.text for s in strings]
    for utterance, digits in zip(found, strings, strict=True):
        assert utterance.path.parent == tmp_path / "digits"
        away = read_audio(utterance.path) - digits.samples()
        assert away.abs().max() < 1e-4


@on_disk
def test_connected_digits_of_real_speech() -> None:
    for split in ("train", "dev", "held_out"):
        found = connected_digits(split, 3)
        assert all(set(s.text.split()) <= set(DIGITS) for s in found)
        samples = found[0].samples()
        assert 1 < len(samples) / 16_000 < 12
        assert 0.01 < samples.abs().max() <= 1.1
