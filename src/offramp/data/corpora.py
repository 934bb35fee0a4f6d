"""Text corpora as they lie on disk: novels for language modelling, utterances with their parses.

Each function takes the folder that holds the corpora (`data_root()` by default) and returns
plain Python data. Where a corpus may be fetched from is in `sources.py`.
"""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path

from offramp.errors import DataError

LABEL = re.compile(r"\[(?:IN|SL):[A-Z_]+")


def data_root() -> Path:
    """OFFRAMP_DATA if it is set, else ../shared/data beside the checkout."""
    return Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; set OFFRAMP_DATA to the folder that holds the corpora, or get "
            f"what is public with offramp fetch"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def unwrap(text: str) -> str:
    """Undo hard line breaks: one paragraph per line, an empty line between paragraphs."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    lines = (" ".join(p.split()) for p in paragraphs)
    return "\n\n".join(line for line in lines if line) + "\n"


def books(split: str, root: Path | None = None) -> dict[str, str]:
    """Title -> unwrapped text of the Gutenberg novels of `split` (train or dev)."""
    folder = (root or data_root()) / "gutenberg_books" / split
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(
            f"{folder} holds no .txt file; set OFFRAMP_DATA to the folder that holds the corpora"
        )
    return {f.stem: novel(f) for f in files}


def novel(path: Path) -> str:
    """The unwrapped text of one file."""
    return unwrap(_read(path))


@dataclass(frozen=True)
class Parse:
    """An utterance and its bracketed semantic parse (TOP, arXiv 1810.07942)."""

    utterance: str
    parse: str

    @property
    def supported(self) -> bool:
        """Whether the intent is one that TOP means to parse; the paper leaves the others out."""
        return not self.parse.startswith("[IN:UNSUPPORTED")


def parses(path: Path) -> list[Parse]:
    """The parses of one TSV file with columns `utterance` and `semantic_parse`."""
    lines = _read(path).split("\n")  # not splitlines: an utterance may hold U+2028 and the like
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if rows.fieldnames is None or not {"utterance", "semantic_parse"} <= set(rows.fieldnames):
        raise DataError(
            f"{path} has columns {rows.fieldnames}; it needs utterance and semantic_parse"
        )
    found = []
    for number, row in enumerate(rows, start=2):
        utterance, parse = row["utterance"], row["semantic_parse"]
        if not utterance or not parse or parse.count("[") != parse.count("]"):
            raise DataError(f"{path} line {number}: no utterance, or brackets that do not match")
        found.append(Parse(" ".join(utterance.split()), " ".join(parse.split())))
    return found


def top(split: str, root: Path | None = None) -> list[Parse]:
    """TOP v1 (navigation and events); its dev split keeps UNSUPPORTED items, its train does not."""
    return parses((root or data_root()) / "top_v1" / f"{split}.tsv")


def topv2(split: str, root: Path | None = None) -> list[Parse]:
    """The English side of Hinglish-TOP: a sample of TOPv2, eight domains."""
    return parses((root or data_root()) / "topv2_english" / f"{split}.tsv")


def labels(items: list[Parse]) -> list[str]:
    """Every intent and slot opening in `items`, sorted: `[IN:GET_EVENT`, `[SL:DATE_TIME`, ..."""
    return sorted({label for item in items for label in LABEL.findall(item.parse)})


def parse_prompt(utterance: str) -> str:
    """The prompt that `parse-tiny` was trained on; its answer begins with a space."""
    return f"Parse: {utterance} =>"
