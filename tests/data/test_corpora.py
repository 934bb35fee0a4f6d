"""Corpora: what is read, what is refused, and that the files on disk are those we count on."""

from __future__ import annotations

from pathlib import Path

import pytest

from offramp.data.corpora import Parse, books, data_root, labels, parse_prompt, parses, top, topv2
from offramp.data.corpora import unwrap as unwrapped
from offramp.errors import DataError

on_disk = pytest.mark.skipif(
    not data_root().is_dir(), reason=f"no corpora at {data_root()}: set OFFRAMP_DATA"
)
HEADER = "domain\tutterance\tsemantic_parse\n"


def tsv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.tsv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree\n", "one two\n\nthree\n"),
        ("one\r\ntwo\r\n\r\nthree", "one two\n\nthree\n"),
        ("  one\n  two  \n \t \n\n\nthree\n\n\n", "one two\n\nthree\n"),
        ("one", "one\n"),
    ],
)
def test_unwrap_undoes_line_breaks_and_keeps_paragraphs(text: str, expected: str) -> None:
    assert unwrapped(text) == expected
    assert unwrapped(expected) == expected


def test_parses_are_read_with_single_spaces(tmp_path: Path) -> None:
    path = tsv(tmp_path, HEADER + 'nav\tto  "the" bar \t[IN:GO  to [SL:PLACE "the" bar ] ]\n')
    assert parses(path) == [Parse('to "the" bar', '[IN:GO to [SL:PLACE "the" bar ] ]')]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_a_line_break_ends_a_line(tmp_path: Path, odd: str) -> None:
    path = tsv(tmp_path, f"{HEADER}nav\ta{odd}b\t[IN:GO a b ]\r\nnav\tc\t[IN:GO c ]\r\n")
    assert [p.utterance for p in parses(path)] == ["a b", "c"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"columns \[\]; it needs utterance and semantic_parse"),
        ("utterance\tparse\na\tb\n", r"columns \['utterance', 'parse'\]; it needs"),
        (HEADER + "nav\ta\t[IN:GO a ]\nnav\ta\t[IN:GO a\n", "line 3: .* brackets"),
        (HEADER + "nav\t\t[IN:GO a ]\n", "line 2: no utterance"),
        (HEADER + "nav\ta\n", "line 2: "),
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        parses(tsv(tmp_path, text))
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.tsv is missing; set OFFRAMP_DATA"):
        top("train", tmp_path)
    with pytest.raises(DataError, match=r"holds no \.txt file; set OFFRAMP_DATA"):
        books("train", tmp_path)
    (tmp_path / "latin.tsv").write_bytes(b"utterance\tsemantic_parse\ncaf\xe9\t[IN:A b ]\n")
    with pytest.raises(DataError, match=r"not UTF-8 text: .* at byte 28"):
        parses(tmp_path / "latin.tsv")


def test_labels_are_every_opening_once_and_sorted() -> None:
    items = [Parse("", "[IN:GO to [SL:PLACE [IN:GET_HOME home ] ] ]"), Parse("", "[IN:GO x ]")]
    assert labels(items) == ["[IN:GET_HOME", "[IN:GO", "[SL:PLACE"]


def test_unsupported_intents_are_told_apart() -> None:
    assert Parse("a", "[IN:GO a ]").supported
    assert not Parse("a", "[IN:UNSUPPORTED_NAVIGATION a ]").supported


def test_the_folder_of_corpora_may_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFRAMP_DATA", str(tmp_path))
    assert data_root() == tmp_path
    (tmp_path / "gutenberg_books" / "dev").mkdir(parents=True)
    (tmp_path / "gutenberg_books" / "dev" / "novel.txt").write_text("It\nwas.\n")
    assert books("dev") == {"novel": "It was.\n"}


def test_the_prompt_of_a_parse_is_stable() -> None:
    """parse-tiny was trained on it."""
    assert parse_prompt("drive home") == "Parse: drive home =>"


@on_disk
def test_top_has_the_utterances_that_its_paper_counts() -> None:
    train, dev = top("train"), top("dev")
    assert (len(train), len(dev)) == (27_976, 4_385)
    assert sum(p.supported for p in dev) == 3_956
    assert all(p.supported for p in train)


@on_disk
def test_topv2_and_its_labels() -> None:
    train, dev = topv2("train"), topv2("dev")
    assert (len(train), len(dev)) == (2_993, 1_390)
    found = labels(train)
    assert "[IN:CREATE_ALARM" in found
    assert all(label.startswith(("[IN:", "[SL:")) for label in found)
    assert all(p.parse.startswith("[IN:") for p in train + dev)


@on_disk
def test_the_novels_are_unwrapped() -> None:
    dev = books("dev")
    assert list(dev) == ["two_cities"]
    assert "it was the worst of times, it was the age of wisdom" in dev["two_cities"]
