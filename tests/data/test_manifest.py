"""Manifests come back as they were written, and all that is wrong with one is named at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from offramp.data.manifest import Utterance, read_manifest, write_manifest
from offramp.errors import DataError

HEADER = "path\tseconds\tspeaker\tsplit\ttext\n"


def recording(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * 8_000)), 8_000)
    return path


def tsv(folder: Path, rows: str, header: str = HEADER) -> Path:
    for name in ("a", "b", "c"):
        recording(folder / "audio" / f"{name}.wav")
    path = folder / "manifest.tsv"
    path.write_bytes((header + rows).encode())
    return path


def utterances(folder: Path) -> list[Utterance]:
    here = recording(folder / "audio" / "a.wav")
    other = recording(folder.parent / "elsewhere" / "b.flac", 0.25)
    return [
        Utterance(here, 0.5, "ann", "train", 'say "hello" — it\'s  fine'),
        Utterance(other, 1 / 3, "", "dev", "naïve \u2028 \x85 text"),
    ]


@pytest.mark.parametrize("name", ["m.tsv", "m.jsonl"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    expected = utterances(tmp_path / "set")
    path = tmp_path / "set" / name
    write_manifest(path, expected)
    assert read_manifest(path) == expected
    assert read_manifest(path, "dev") == expected[1:]
    assert "audio/a.wav" in path.read_text().split("\n")[name == "m.tsv"]
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_set_may_be_moved_with_its_manifest(tmp_path: Path) -> None:
    recording(tmp_path / "old" / "audio" / "a.wav")
    found = [Utterance(tmp_path / "old" / "audio" / "a.wav", 0.5, "", "", "a")]
    write_manifest(tmp_path / "old" / "m.tsv", found)
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_manifest(tmp_path / "new" / "m.tsv")[0].path == tmp_path / "new/audio/a.wav"


def test_columns_may_come_in_any_order_with_others_between(tmp_path: Path) -> None:
    header = "\ufefftext\tnote\tpath\tseconds\r\n"
    path = tsv(tmp_path, "one\tx\taudio/a.wav\t0.5\r\n\r\ntwo\t\taudio/b.wav\t5e-1\r\n", header)
    assert read_manifest(path, check_audio=True) == [
        Utterance(tmp_path / "audio/a.wav", 0.5, "", "", "one"),
        Utterance(tmp_path / "audio/b.wav", 0.5, "", "", "two"),
    ]


def test_only_what_is_asked_for_must_exist(tmp_path: Path) -> None:
    path = tsv(tmp_path, "audio/a.wav\t0.5\t\tdev\ta\naudio/gone.wav\t1\t\ttrain\t\n")
    assert [u.text for u in read_manifest(path, "dev")] == ["a"]
    with pytest.raises(DataError, match=r"2 problems: line 3: text is empty; line 3: .*gone\.wav"):
        read_manifest(path, "train")


FAULTY = (
    "audio/a.wav\t0.5\tann\tdev\tfine\n"
    "audio/gone.wav\t0.5\tann\tdev\tgone\n"
    "audio/b.wav\t0.9\tann\tdev\ttoo long\n"
    "audio/a.wav\t0.5\tann\ttrain\tagain\n"
    "audio/c.wav\tlong\tann\tdev\ta word for a number\n"
    "audio/c.wav\t0.5\tann\tdev\t \n"
    "audio/d.wav\t0.5\tann\tdev\ta tab\there\n"
    "audio/e.wav\t0.5\n"
    "\t0.5\tann\tdev\tno path\n"
)


def test_all_problems_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    path = tsv(tmp_path, FAULTY)
    with pytest.raises(DataError) as error:
        read_manifest(path, check_audio=True)
    message = str(error.value)
    assert message.startswith(f"{path} has 9 problems: ")
    for part in (
        f"line 3: {tmp_path}/audio/gone.wav is missing",
        f"line 4: {tmp_path}/audio/b.wav lasts 0.500 s, but seconds is 0.9",
        f"line 5: {tmp_path}/audio/a.wav is already",
        "line 6: seconds is 'long'; it must be a number greater than 0",
        "line 7: path audio/c.wav is already in line 6",
        "line 7: text is empty",
        "line 8: 6 fields for 5 columns",
        "line 9: text is null; it must be text",
        'line 10: path is ""; it must be text',
    ):
        assert part.replace(f"{tmp_path}/audio/a.wav", "path audio/a.wav") in message
    assert "\n" not in message
    with pytest.raises(DataError, match="has 8 problems"):
        read_manifest(path)


@pytest.mark.parametrize("again", ["./audio/a.wav", "audio//a.wav", "audio/../audio/a.wav"])
def test_a_recording_is_the_same_however_its_path_is_written(tmp_path: Path, again: str) -> None:
    path = tsv(tmp_path, f"audio/a.wav\t0.5\t\t\ta\n{again}\t0.5\t\t\tb\n")
    with pytest.raises(DataError, match=r"line 3: path .*a\.wav is already in line 2"):
        read_manifest(path)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "", "1,5"])
def test_seconds_are_a_number_above_0(tmp_path: Path, seconds: str) -> None:
    with pytest.raises(DataError, match=r"1 problem: line 2: seconds is '.*'; it must be a num"):
        read_manifest(tsv(tmp_path, f"audio/a.wav\t{seconds}\t\t\ta\n"))


def test_many_problems_are_counted_rather_than_listed(tmp_path: Path) -> None:
    rows = "".join(f"{i}.wav\t1\t\t\ta\n" for i in range(5_000))
    with pytest.raises(DataError, match=r"has 5000 problems: .*; and 4975 more") as error:
        read_manifest(tsv(tmp_path, rows))
    assert str(error.value).count("is missing") == 25


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = {"path": str(recording(tmp_path / "a.wav")), "seconds": 0.5, "text": "a", "id": "x"}
    other = {"path": str(recording(tmp_path / "b.wav")), "seconds": True, "text": 3, "id": "x"}
    rows = [json.dumps(good), "{", "", "[1]", "null", json.dumps("a"), json.dumps(other)]
    path.write_text("\n".join(rows))
    with pytest.raises(DataError) as error:
        read_manifest(path)
    message = str(error.value)
    for part in (
        "line 2: not JSON: Expecting property name",
        "line 4: not a JSON object",
        "line 5: not a JSON object",
        "line 6: not a JSON object",
        "line 7: text is 3; it must be text",
        "line 7: seconds is True",
        "line 7: id x is already in line 1",
    ):
        assert part in message
    assert "7 problems" in message


def test_recordings_without_text_are_read_on_request(tmp_path: Path) -> None:
    path = tsv(tmp_path, "audio/a.wav\t0.5\n", "path\tseconds\n")
    with pytest.raises(DataError, match="has no column text; it has path, seconds"):
        read_manifest(path)
    assert read_manifest(path, text_required=False)[0].text == ""


def test_a_damaged_recording_is_a_problem_like_others(tmp_path: Path) -> None:
    path = tsv(tmp_path, "audio/a.wav\t0.5\t\t\ta\naudio/b.wav\t0.5\t\t\tb\n")
    (tmp_path / "audio" / "a.wav").write_text("not audio")
    with pytest.raises(DataError, match=r"1 problem: line 2: .*a\.wav is not a recording"):
        read_manifest(path, check_audio=True)


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m\.tsv is missing"):
        read_manifest(tmp_path / "m.tsv")
    with pytest.raises(DataError, match=r"m\.csv is no manifest by its name; it must end in"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"not UTF-8 text: .* at byte 0"):
        read_manifest(tmp_path / "m.tsv")
    (tmp_path / "m.tsv").write_bytes(b"")
    with pytest.raises(DataError, match="has no column path, seconds, text; it has none"):
        read_manifest(tmp_path / "m.tsv")
    with pytest.raises(DataError, match="has no utterances; add some"):
        read_manifest(tsv(tmp_path, ""))
    path = tsv(tmp_path, "audio/a.wav\t0.5\t\tdev\ta\naudio/b.wav\t0.5\t\ttrain\ta\n")
    with pytest.raises(DataError, match="no utterances of split test; its splits: dev, train"):
        read_manifest(path, "test")


def test_what_does_not_fit_into_tsv_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    bad = [Utterance(recording(tmp_path / "a.wav"), 0.5, "", "", "two\nlines")]
    with pytest.raises(DataError, match=r"utterance 1, .*a\.wav: a tab or line break in it"):
        write_manifest(tmp_path / "m.tsv", bad)
    assert not (tmp_path / "m.tsv").exists()
    write_manifest(tmp_path / "m.jsonl", bad)
    assert read_manifest(tmp_path / "m.jsonl") == bad
