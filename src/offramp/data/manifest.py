"""Manifests: which recordings there are, how long, by whom, for what, and what is said in them.

TSV with a header line, or JSONL: `path`, `seconds` and `text`, and if known `speaker` and `split`.
Paths are relative to the manifest's folder. A manifest is read whole or not at all, and all that
is wrong with it is named at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from offramp.audio.io import duration_s
from offramp.errors import AudioError, DataError
from offramp.files import replacing

Row = dict[str, Any] | str  # fields by column, or what is wrong with the line

_REQUIRED = ("path", "seconds", "text")
_OPTIONAL = ("speaker", "split")
_LISTED = 25  # problems that one message spells out
_TOLERANCE_S = 0.1  # of a recording's length; MP3 and Opus pad by some tens of milliseconds
_UNSAFE = ("\t", "\n", "\r")  # what a field of a TSV file cannot hold


@dataclass(frozen=True)
class Utterance:
    """A recording and its transcript; `text` is "" where nobody wrote it down."""

    path: Path
    seconds: float
    speaker: str
    split: str
    text: str


def read_manifest(
    path: Path,
    split: str | None = None,
    *,
    text_required: bool = True,
    check_audio: bool = False,
) -> list[Utterance]:
    """The utterances of `split`, or of all splits, in the manifest's order.

    Every line must be well formed and every recording named once. Those that are asked for must
    exist and have text (unless not `text_required`); with `check_audio` their headers must agree
    with `seconds` to 0.1 s. DataError names up to ten of the problems, by line, and counts them.
    """
    problems: list[str] = []
    found, splits = [], set()
    seen: dict[tuple[str, str], int] = {}  # (path or id, its value; paths in one form) -> line
    for line, row in _rows(path, text_required):
        utterance, wrong = _utterance(row, path.parent, text_required)
        for name, value in _names(row):
            same = os.path.abspath(path.parent / value) if name == "path" else value
            first = seen.setdefault((name, same), line)
            if first != line:
                wrong.append(f"{name} {value} is already in line {first}")
        if utterance is not None:
            splits.add(utterance.split)
            if split in (None, utterance.split):
                wrong += _check(utterance, text_required, check_audio)
                found.append(utterance)
        problems += [f"line {line}: {text}" for text in wrong]
    refuse(str(path), problems)
    if not found:
        known = ", ".join(sorted(splits)) or "none"
        raise DataError(
            f"{path} has no utterances"
            + (f" of split {split}; its splits: {known}" if split is not None else "; add some")
        )
    return found


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> None:
    """TSV or JSONL by the name's end; paths inside the manifest's folder are written relative.

    `read_manifest` gives the same back. DataError where a field does not fit into TSV.
    """
    tsv, names = _is_tsv(path), [f.name for f in fields(Utterance)]
    lines = ["\t".join(names)] if tsv else []
    problems = []
    for number, utterance in enumerate(utterances, start=1):
        row = asdict(utterance) | {"path": _relative(utterance.path, path.parent)}
        if tsv and any(char in str(value) for value in row.values() for char in _UNSAFE):
            problems.append(f"utterance {number}, {utterance.path}: a tab or line break in it")
        lines.append(
            "\t".join(str(row[n]) for n in names) if tsv else json.dumps(row, ensure_ascii=False)
        )
    refuse(f"{path}, which is to be written as TSV (JSONL could hold it),", problems)
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")


def refuse(name: str, problems: Sequence[str]) -> None:
    """DataError with the first of `problems` and their number, unless there are none."""
    if not problems:
        return
    more = len(problems) - _LISTED
    raise DataError(
        f"{name} has {len(problems)} problem{'s' if len(problems) > 1 else ''}: "
        + "; ".join(problems[:_LISTED])
        + (f"; and {more} more" if more > 0 else "")
    )


def read_text(path: Path) -> str:
    """A UTF-8 file, without a byte-order mark; DataError where it is missing or is not text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give the path of one that exists") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def tsv_rows(path: Path, required: Iterable[str]) -> list[tuple[int, Row]]:
    """(line number, fields by column) of a TSV file; a field that is not there is None.

    Only a line break ends a line, and quotation marks mean nothing. DataError without `required`.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    header = lines[0].split("\t")
    if missing := [name for name in required if name not in header]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}"
        )
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(lines[1:], start=2):
        values = line.split("\t")
        if len(values) > len(header):
            rows.append((number, f"{len(values)} fields for {len(header)} columns"))
        elif line:  # an empty line is none
            rows.append((number, dict(zip_longest(header, values))))
    return rows


def _is_tsv(path: Path) -> bool:
    if path.suffix not in (".tsv", ".jsonl"):
        raise DataError(f"{path} is no manifest by its name; it must end in .tsv or .jsonl")
    return path.suffix == ".tsv"


def _rows(path: Path, text_required: bool) -> list[tuple[int, Row]]:
    if _is_tsv(path):
        return tsv_rows(path, [n for n in _REQUIRED if text_required or n != "text"])
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            rows.append((number, _json_row(line)))
    return rows


def _json_row(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    return row if isinstance(row, dict) else "not a JSON object"


def _names(row: Row) -> list[tuple[str, str]]:
    """What must not occur twice."""
    if isinstance(row, str):
        return []
    return [(n, row[n]) for n in ("path", "id") if isinstance(row.get(n), str) and row[n]]


def _utterance(row: Row, folder: Path, text_required: bool) -> tuple[Utterance | None, list[str]]:
    """The utterance that a line describes, or what is wrong with its form."""
    if isinstance(row, str):
        return None, [row]
    wrong, values = [], {}
    for name in ("path", "text", *_OPTIONAL):
        value = row.get(name)
        needed = name == "path" or (name == "text" and text_required)
        if value is None and not needed:
            value = ""
        if not isinstance(value, str) or (name == "path" and not value):
            wrong.append(f"{name} is {json.dumps(value)}; it must be text")
        else:
            values[name] = value
    seconds = positive_number(row.get("seconds"))
    if seconds is None:
        wrong.append(f"seconds is {row.get('seconds')!r}; it must be a number greater than 0")
    if wrong or seconds is None:
        return None, wrong
    place = folder / values["path"]
    return Utterance(place, seconds, values["speaker"], values["split"], values["text"]), []


def positive_number(value: object) -> float | None:
    """The finite number above 0 that `value` is or spells; None where it is none."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    good = math.isfinite(number) and number > 0 and not isinstance(value, bool)
    return number if good else None


def _check(utterance: Utterance, text_required: bool, check_audio: bool) -> list[str]:
    """What is wrong with the recording or the text."""
    wrong = []
    if text_required and not utterance.text.strip():
        wrong.append("text is empty")
    if not utterance.path.is_file():
        wrong.append(f"{utterance.path} is missing")
    elif check_audio:
        try:
            seconds = duration_s(utterance.path)
        except AudioError as error:
            wrong.append(str(error))
        else:
            if abs(seconds - utterance.seconds) > _TOLERANCE_S:
                wrong.append(
                    f"{utterance.path} lasts {seconds:.3f} s, but seconds is {utterance.seconds:g}"
                )
    return wrong


def _relative(path: Path, folder: Path) -> str:
    """As it is found from `folder`; absolute where it lies elsewhere."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
