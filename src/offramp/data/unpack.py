"""How a download becomes the folder that `corpora.py` reads: one function for each layout.

Each takes the folder of the downloads and the new folder. What is not as we know it is refused:
an archive that would write outside of its folder, a table with other columns, a book without the
markers of Project Gutenberg.
"""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from offramp.errors import DataError

MAX_BYTES = 1 << 28  # of an unpacked archive
START = re.compile(
    r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG E(?:BOOK|TEXT)\b[^*]*\*\*\*", re.I
)
END = re.compile(r"\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG E(?:BOOK|TEXT)\b", re.I)
PARSE_HEADER = "domain utterance semantic_parse"
DOMAINS = ("alarm", "event", "messaging", "music", "navigation", "reminder", "timer", "weather")
SPLITS = (("train", "train"), ("eval", "dev"), ("test", "test"))  # their name, ours


def unzip(archive: Path, to: Path) -> None:
    """All of `archive` below `to`; an archive that would write elsewhere is refused whole."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                _refuse_unsafe(member, archive)
            if sum(member.file_size for member in opened.infolist()) > MAX_BYTES:
                raise DataError(
                    f"{archive.name} unpacks to more than {MAX_BYTES} bytes; do not use it"
                )
            opened.extractall(to)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(
            f"{archive.name} is not a whole zip archive: {error}; fetch again, and if it stays so "
            "the address no longer serves the corpus"
        ) from error


def _refuse_unsafe(member: zipfile.ZipInfo, archive: Path) -> None:
    # zipfile itself would quietly drop "..", and write a link as a text file.
    name = member.orig_filename.replace("\\", "/")
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if name.startswith("/") or ".." in name.split("/") or ":" in name or is_link:
        raise DataError(
            f"{archive.name} holds {member.orig_filename!r}, which is a link or points outside of "
            "its folder; the archive is not safe: nothing was kept, do not use it"
        )


def _text(folder: Path, name: str) -> str:
    """The UTF-8 text of the only file called `name` anywhere below `folder`."""
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise DataError(
            f"the download holds {len(found)} files called {name}, not one; it is not the corpus "
            "that this version of offramp knows: get a newer offramp"
        )
    try:
        return found[0].read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} of the download is not UTF-8 text: {error.reason}; fetch again"
        ) from error


def _rows(text: str, name: str, columns: int) -> Iterator[list[str]]:
    """Rows of tab-separated text; no quoting, and only a line break ends a row."""
    for number, line in enumerate(text.split("\n"), start=1):
        row = line.removesuffix("\r").split("\t")
        if row == [""]:
            continue
        if len(row) != columns:
            raise DataError(
                f"{name} line {number} has {len(row)} columns, not {columns}; it is not the corpus "
                "that this version of offramp knows: get a newer offramp"
            )
        yield row


def _table(folder: Path, name: str, header: str) -> list[list[str]]:
    """The rows of the file `name` below `folder`, whose first line must be `header`."""
    rows = list(_rows(_text(folder, name), name, len(header.split())))
    if not rows or rows[0] != header.split():
        raise DataError(
            f"{name} of the download has columns {rows[0] if rows else 'none'}, not {header}; "
            "it is not the corpus that this version of offramp knows: get a newer offramp"
        )
    return rows[1:]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))  # bytes: line breaks stay what they are everywhere


def _write_tsv(path: Path, header: str, rows: Iterable[Iterable[str]]) -> None:
    lines = ["\t".join(row) for row in (header.split(), *rows)]
    _write(path, "\n".join(lines) + "\n")


def strip_gutenberg(raw: bytes, name: str) -> str:
    """The book between the START and END markers of Project Gutenberg, with \\n line breaks."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # the variants called -8.txt
    text = text.replace("\r\n", "\n")
    start = START.search(text)
    end = END.search(text, start.end()) if start else None
    if start is None or end is None:
        raise DataError(
            f"{name} has no *** {'END' if start else 'START'} OF THE PROJECT GUTENBERG EBOOK line; "
            "it is not a Project Gutenberg book: fetch again"
        )
    return text[start.end() : end.start()].strip() + "\n"


def novels(downloads: Path, new: Path) -> None:
    for book in sorted(downloads.rglob("*.txt")):
        name = book.relative_to(downloads)
        _write(new / name, strip_gutenberg(book.read_bytes(), str(name)))


def as_they_are(downloads: Path, new: Path) -> None:
    for file in downloads.iterdir():
        file.rename(new / file.name)


def top_v1(downloads: Path, new: Path) -> None:
    """Tokenized utterance and parse; UNSUPPORTED items leave train, as the paper has it."""
    unzip(downloads / "top.zip", downloads / "top")
    for theirs, ours in SPLITS:
        name = f"{theirs}.tsv"
        rows = (row[1:] for row in _rows(_text(downloads, name), name, 3))
        kept = (r for r in rows if ours != "train" or not r[1].startswith("[IN:UNSUPPORTED"))
        _write_tsv(new / f"{ours}.tsv", "utterance semantic_parse", kept)


def topv2(downloads: Path, new: Path) -> None:
    """The files of the eight domains, one after another."""
    unzip(downloads / "topv2.zip", downloads / "topv2")
    for theirs, ours in SPLITS:
        names = [f"{domain}_{theirs}.tsv" for domain in DOMAINS]
        rows = [row for name in names for row in _table(downloads, name, PARSE_HEADER)]
        _write_tsv(new / f"{ours}.tsv", PARSE_HEADER, rows)


def topv2_english(downloads: Path, new: Path) -> None:
    """The English columns; the Hindi-English ones (cs) go."""
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        rows = _table(downloads, name, "en_query cs_query en_parse cs_parse domain")
        kept = ((domain, query, parse) for query, _, parse, _, domain in rows)
        _write_tsv(new / name, PARSE_HEADER, kept)


def wikitext2_raw(downloads: Path, new: Path) -> None:
    unzip(downloads / "wikitext.zip", downloads / "wikitext")
    for theirs, ours in (("train", "train"), ("valid", "dev"), ("test", "test")):
        _write(new / f"{ours}.txt", _text(downloads, f"wiki.{theirs}.raw"))


def tinyshakespeare(downloads: Path, new: Path) -> None:
    """90 % train, 5 % dev, 5 % test, in the order of the file."""
    text = (downloads / "input.txt").read_bytes()
    dev, test = int(len(text) * 0.9), int(len(text) * 0.95)
    (new / "train.txt").write_bytes(text[:dev])
    (new / "dev.txt").write_bytes(text[dev:test])
    (new / "test.txt").write_bytes(text[test:])
