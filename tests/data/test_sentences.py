"""Sentences of text files, for language models."""

from __future__ import annotations

from pathlib import Path

import pytest

from offramp.data.sentences import file_sentences
from offramp.data.speech import normalize_text
from offramp.errors import DataError


def sentences(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    return list(file_sentences(path))


def test_paragraphs_of_a_book_are_unwrapped_and_cut_into_sentences(tmp_path: Path) -> None:
    book = "It was late.\r\nMr. Pike\r\nsaid: “No!” Why?\r\n\r\nHe\r\nleft_, it's said_\r\n"
    assert sentences(tmp_path, book) == [
        "it was late",
        "mister pike said no",
        "why",
        "he left it's said",
    ]


def test_a_file_without_empty_lines_has_a_sentence_per_line(tmp_path: Path) -> None:
    assert sentences(tmp_path, "\ndo mi\nmi do do\n\n") == ["do mi", "mi do do"]


def test_long_and_short_ones_stay_and_what_has_no_single_reading_goes(tmp_path: Path) -> None:
    long = "word, " * 300
    found = sentences(tmp_path, f"{long}end.\nYes.\nIt cost 5 pounds.\nThe BBC said so.\n")
    assert found == [normalize_text(f"{long}end"), "yes"]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        list(file_sentences(tmp_path / "none.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        list(file_sentences(tmp_path / "b.txt"))
