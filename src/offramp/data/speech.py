"""Speech corpora as they lie on disk, as lists of utterances; transcripts as targets.

`prepare_*` read the layouts as downloaded and give the text as it was published; `speech_set` reads
the sets in the data folder; `connected_digits` makes digit strings, with exact transcripts, of the
single digits of FSDD. `normalize_text` turns a transcript into what a recogniser is to write.
"""

from __future__ import annotations

import random
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile  # type: ignore[import-untyped]
import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, duration_s, read_audio
from offramp.data.corpora import data_root
from offramp.data.manifest import (
    Utterance,
    positive_number,
    read_manifest,
    read_text,
    refuse,
    tsv_rows,
    write_manifest,
)
from offramp.errors import AudioError, DataError
from offramp.files import replacing

# Sets of the data folder -> whether they have transcripts.
SPEECH_SETS = {
    "mini_librispeech_train_clean_5": True,
    "kathleen_arctic": True,
    "kathleen_more_takes": True,  # the voice and texts of kathleen_arctic's train split again
    "ljspeech_excerpt": True,
    "ljspeech_part_1": True,
    "vctk_p239": True,
    "common_voice_en_100": True,
    "librispeech_test_other_100": True,  # dev only: never train on it
    "librispeech_train_clean_untranscribed": False,
    "fsdd": True,  # single digits: see `connected_digits`
    "picovoice_barista_slu": False,  # has slots in place of words
}
HELD_OUT_SPEAKER = "theo"  # of FSDD: no recording of his is in `train` or `dev`

DIGITS_IN_STRING = (3, 7)
_PAUSE_S = (0.04, 0.25)  # between digits; FSDD is trimmed close
_EDGE_S = (0.1, 0.3)
_LJSPEECH_DEV_IN = 50  # one utterance in so many
_SUBSET = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?")

# Abbreviations with one reading, written as LibriSpeech's transcripts write it.
_READINGS = {"mr": "mister", "mrs": "missus", "etc": "et cetera"}
_ABBREVIATION = re.compile(rf"\b({'|'.join(_READINGS)})\b\.?", re.IGNORECASE)
_LETTERS = str.maketrans({"æ": "ae", "œ": "oe", "ß": "ss", "ø": "o", "ł": "l", "đ": "d", "ð": "d"})
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ`´", "'"))  # noqa: RUF001
_SPOKEN_SIGNS = frozenset("%&@#*/\\_§†‡‰")  # punctuation to Unicode, but read aloud, or not text


def normalize_text(text: str) -> str:
    """A transcript as a target: lower-case words of a-z and inner apostrophes, single spaces.

    Accents go, hyphens and other punctuation part words ("U.S." becomes "u s"), apostrophes stay
    between letters only. Mr., Mrs. and etc. are written out; other abbreviations, and words in
    capitals, are taken as they are spelled. DataError for what has no reading by itself: numbers,
    signs such as % and $, letters of other scripts. May be "".
    """
    text = text.translate(_APOSTROPHES)
    for char in text:
        if char in _SPOKEN_SIGNS or unicodedata.category(char) in (
            "Nd",
            "Nl",
            "No",
            "Sc",
            "Sm",
            "So",
        ):
            raise DataError(
                f"the text {_shown(text)} has {char!r}, for which there is no single reading; "
                "write it out in words, or leave it out"
            )
    plain = unicodedata.normalize("NFKD", _ABBREVIATION.sub(_written_out, text).lower())
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Cf"))
    plain = plain.translate(_LETTERS)
    if foreign := next((c for c in plain if c.isalpha() and not "a" <= c <= "z"), None):
        raise DataError(
            f"the text {_shown(text)} has the letter {foreign!r}, which has no form "
            "in a-z; write it in those, or leave it out"
        )
    return plain_words(plain)


def plain_words(text: str) -> str:
    """The words of `text`, runs of a-z and inner apostrophes, single spaces between them."""
    return " ".join(re.sub(r"(?<![a-z])'|'(?![a-z])|[^a-z']", " ", text).split())


def normalized(utterances: Iterable[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
    """(utterances with their text normalised, those left out because theirs has no one reading).

    An utterance of which no word remains is left out too.
    """
    kept, left_out = [], []
    for utterance in utterances:
        try:
            text = normalize_text(utterance.text)
        except DataError:
            text = ""
        if text:
            kept.append(replace(utterance, text=text))
        else:
            left_out.append(utterance)
    return kept, left_out


def speech_set(name: str, split: str | None = None, root: Path | None = None) -> list[Utterance]:
    """One of `SPEECH_SETS`, from the folder that holds the corpora (`data_root()` by default)."""
    if name not in SPEECH_SETS:
        raise DataError(f"there is no speech set {name!r}; known are {', '.join(SPEECH_SETS)}")
    path = (root or data_root()) / name / "manifest.tsv"
    if not path.is_file():
        raise DataError(f"{path} is missing; set OFFRAMP_DATA to the folder that holds the corpora")
    return read_manifest(path, split, text_required=SPEECH_SETS[name])


def shared_speech(split: str, root: Path | None = None) -> dict[str, list[Utterance]]:
    """Set -> its utterances of `split` (train or dev), for the transcribed sets of sentences."""
    names = [name for name, has_text in SPEECH_SETS.items() if has_text and name != "fsdd"]
    sets = {name: speech_set(name, root=root) for name in names}
    chosen = {name: [u for u in found if u.split == split] for name, found in sets.items()}
    return {name: found for name, found in chosen.items() if found}


def prepare_librispeech(root: Path, subsets: Sequence[str] | None = None) -> list[Utterance]:
    """LibriSpeech (openslr.org/12, /31) as unpacked: <subset>/<speaker>/<chapter>/*.flac.

    root: the folder of the subsets (train-clean-100, dev-other, ...). subsets: all there are by
    default. Splits are train, dev and test; prepare clean and other apart to report them apart.
    """
    if subsets is None:
        subsets = sorted(p.name for p in _folders(root) if _SUBSET.fullmatch(p.name))
    if not subsets:
        raise DataError(f"{root} has no subset of LibriSpeech, such as dev-clean; give its folder")
    found: list[Utterance] = []
    problems: list[str] = []
    for subset in subsets:
        split = subset.split("-")[0]
        transcripts = sorted((root / subset).glob("*/*/*.trans.txt"))
        if not transcripts or not _SUBSET.fullmatch(subset):
            problems.append(f"{root / subset} has no transcripts of LibriSpeech")
        for transcript in transcripts:
            untold = {path.stem for path in transcript.parent.glob("*.flac")}
            for line in filter(None, read_text(transcript).split("\n")):
                name, _, text = line.strip().partition(" ")
                untold.discard(name)
                audio = transcript.parent / f"{name}.flac"
                _add(found, problems, Utterance(audio, 0.0, name.split("-")[0], split, text))
            problems += [f"{transcript} has no line for {name}" for name in sorted(untold)]
    return _complete(root, found, problems)


def prepare_common_voice(root: Path) -> list[Utterance]:
    """Common Voice as unpacked: train.tsv, dev.tsv, test.tsv (those there are) and clips/*.mp3.

    root: the folder of one language. The speaker is the start of the contributor's hash.
    """
    tables = [root / f"{s}.tsv" for s in ("train", "dev", "test") if (root / f"{s}.tsv").is_file()]
    if not tables:
        raise DataError(
            f"{root} has no train.tsv, dev.tsv or test.tsv; give the folder of one language"
        )
    seconds = _clip_seconds(root / "clip_durations.tsv")
    found: list[Utterance] = []
    problems: list[str] = []
    for table in tables:
        for line, row in tsv_rows(table, ("client_id", "path", "sentence")):
            if isinstance(row, str) or not (row["path"] and row["client_id"]):
                fault = row if isinstance(row, str) else "no path or no client_id"
                problems.append(f"{table} line {line}: {fault}")
                continue
            name, text = row["path"], row["sentence"] or ""
            known = seconds.get(name, 0.0)
            speaker = row["client_id"][:16]
            _add(
                found, problems, Utterance(root / "clips" / name, known, speaker, table.stem, text)
            )
    return _complete(root, found, problems)


def prepare_ljspeech(root: Path) -> list[Utterance]:
    """LJ Speech 1.1 as unpacked: metadata.csv (id|text|normalised text) and wavs/*.wav.

    The normalised text is taken. The corpus names no splits: by a hash of the id one utterance in
    50 is dev, so that it stays so whatever else is there.
    """
    found: list[Utterance] = []
    problems: list[str] = []
    for number, line in enumerate(read_text(root / "metadata.csv").split("\n"), start=1):
        columns = line.removesuffix("\r").split("|")
        if columns == [""]:
            continue
        if len(columns) != 3:
            problems.append(f"metadata.csv line {number}: {len(columns)} columns; it must have 3")
            continue
        name, text = columns[0], columns[2]
        split = "train" if zlib.crc32(name.encode()) % _LJSPEECH_DEV_IN else "dev"
        _add(found, problems, Utterance(root / "wavs" / f"{name}.wav", 0.0, "LJ", split, text))
    return _complete(root, found, problems)


@dataclass(frozen=True)
class DigitString:
    """Spoken digits of one speaker, one after the other.

    takes: recordings; pauses_s: silence before each of them and after the last.
    """

    takes: tuple[Path, ...]
    pauses_s: tuple[float, ...]
    speaker: str
    split: str
    text: str

    def samples(self, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """float32 [N] at `sample_rate` Hz."""
        parts = []
        for pause, take in zip(self.pauses_s, self.takes, strict=False):
            parts += [torch.zeros(round(pause * sample_rate)), read_audio(take, sample_rate)]
        return torch.cat([*parts, torch.zeros(round(self.pauses_s[-1] * sample_rate))])


def connected_digits(
    split: str,
    count: int,
    seed: int = 0,
    root: Path | None = None,
    digits: tuple[int, int] = DIGITS_IN_STRING,
) -> list[DigitString]:
    """`count` random strings of FSDD's digits: the same for the same arguments.

    digits: how many a string has, at least and at most.

    train: the training takes of all speakers but HELD_OUT_SPEAKER; dev: other takes of the same
    speakers; held_out: all takes of HELD_OUT_SPEAKER.
    """
    if split not in ("train", "dev", "held_out"):
        raise DataError(f"there is no split {split!r} of digits; known are train, dev, held_out")
    takes = [
        take
        for take in speech_set("fsdd", root=root)
        if (take.speaker == HELD_OUT_SPEAKER) == (split == "held_out")
        and split in ("held_out", take.split)
    ]
    by_speaker: dict[str, dict[str, list[Path]]] = {}
    for take in takes:
        by_speaker.setdefault(take.speaker, {}).setdefault(take.text, []).append(take.path)
    if not by_speaker:
        raise DataError(f"FSDD has no takes for the split {split}; is it whole?")
    draw = random.Random(f"{split} {seed}")
    return [_digit_string(draw, by_speaker, split, digits) for _ in range(count)]


def write_digit_strings(strings: Sequence[DigitString], folder: Path) -> Path:
    """Write the strings as 16 kHz FLAC files and a manifest, whose path is returned.

    An existing `folder` is replaced as a whole, and only once the new one is complete.
    """
    with replacing(folder) as temporary:
        temporary.mkdir()
        utterances = []
        for number, string in enumerate(strings):
            samples, path = string.samples(), temporary / f"{string.split}-{number:05d}.flac"
            soundfile.write(path, samples.clamp(-1, 1).numpy().astype(np.float32), SAMPLE_RATE)
            seconds = len(samples) / SAMPLE_RATE
            utterances.append(Utterance(path, seconds, string.speaker, string.split, string.text))
        write_manifest(temporary / "manifest.tsv", utterances)
    return folder / "manifest.tsv"


def _digit_string(
    draw: random.Random,
    by_speaker: dict[str, dict[str, list[Path]]],
    split: str,
    digits: tuple[int, int],
) -> DigitString:
    speaker = draw.choice(sorted(by_speaker))
    takes_of = by_speaker[speaker]
    words = [draw.choice(sorted(takes_of)) for _ in range(draw.randint(*digits))]
    takes = tuple(draw.choice(takes_of[word]) for word in words)
    inner = [draw.uniform(*_PAUSE_S) for _ in words[1:]]
    pauses = (draw.uniform(*_EDGE_S), *inner, draw.uniform(*_EDGE_S))
    return DigitString(takes, pauses, speaker, split, " ".join(words))


def _written_out(match: re.Match[str]) -> str:
    return f"{_READINGS[match[1].lower()]} "


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the one that the corpus was unpacked into")
    return [p for p in root.iterdir() if p.is_dir()]


def _clip_seconds(path: Path) -> dict[str, float]:
    """Clip -> seconds, where the release says so (since Common Voice 14 or so); else empty.

    It spares opening every clip, and reading an MP3 file's length means reading the file.
    """
    if not path.is_file():
        return {}
    rows = tsv_rows(path, ("clip", "duration[ms]"))
    known = {
        row["clip"]: positive_number(row["duration[ms]"])
        for _, row in rows
        if isinstance(row, dict)
    }
    return {clip: ms / 1000 for clip, ms in known.items() if ms is not None}


def _add(found: list[Utterance], problems: list[str], utterance: Utterance) -> None:
    """Add it with its length, read from the recording unless known, or say why not."""
    if not utterance.text.strip():
        problems.append(f"{utterance.path} has no text")
        return
    try:
        if not utterance.path.is_file():
            raise AudioError(f"{utterance.path} is missing")
        seconds = utterance.seconds or duration_s(utterance.path)
    except AudioError as error:
        problems.append(str(error))
    else:
        found.append(replace(utterance, seconds=seconds))


def _complete(root: Path, found: list[Utterance], problems: list[str]) -> list[Utterance]:
    refuse(str(root), problems)
    if not found:
        raise DataError(f"{root} has no utterances; give the folder of the unpacked corpus")
    return found
