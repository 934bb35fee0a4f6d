"""Synthetic speech on the fly: espeak-ng reads sentences of books in many voices.

espeak-ng is a separate tool under the GPL. Nothing of it is part of this package: it runs in a
process of its own (`espeak_child.py`), from the system's library (Debian: `espeak-ng`) or, where
there is none, from the `espeakng-loader` wheel (`pip install 'offramp[synthetic]'`).

Everything is a function of (seed, index), so there is nothing to store and nothing to lose on
resume. Formant synthesis is easy to recognise and says little about real speech: figures on it
are never mixed with figures on recordings.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import ctypes.util
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr  # type: ignore[import-untyped]
import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.config import check_counts
from offramp.data import corpora, espeak_child
from offramp.data.speech import plain_words
from offramp.errors import ConfigError, DataError, InputError

VOICES = (
    "gmw/en",  # Great Britain
    "gmw/en-029",  # the Caribbean
    "gmw/en-GB-scotland",
    "gmw/en-GB-x-gbclan",  # Lancaster
    "gmw/en-GB-x-gbcwmd",  # the West Midlands
    "gmw/en-GB-x-rp",
    "gmw/en-US",
    "gmw/en-US-nyc",
)
# Those that sound like a person: of 106, the robots, whispers and jokes are left out.
HELD_OUT_VARIANTS = ("Andy", "Annie", "f3", "linda", "m3", "michel", "paul", "shelby")
VARIANTS = (
    *("", "Alex", "Alicia", "Andrea", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo"),
    *("Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "RicishayMax"),
    *("RicishayMax2", "RicishayMax3", "adam", "anika", "antonio", "aunty", "belinda"),
    *("benjamin", "boris", "david", "ed", "edward", "edward2", "f1", "f2", "f4", "f5"),
    *("gustave", "iven", "iven2", "iven3", "iven4", "m1", "m2", "m4", "m5", "m6", "m7", "m8"),
    *("marcelo", "max", "miguel", "norbert", "pablo", "pedro", "quincy", "rob", "robert"),
    *("sandro", "steph", "steph2", "steph3", "travis", "victor"),
)


# -- speakers and speech ---------------------------------------------------------------------


@dataclass(frozen=True)
class Speaker:
    """Who speaks, and how.

    voice: espeak-ng's file of an accent; variant: of a voice's timbre, "" for none. pitch and
    pitch_range: 0 to 99, 50 is the voice's own. word_gap: extra pauses in units of 10 ms.
    """

    voice: str = "gmw/en-US"
    variant: str = ""
    rate_wpm: int = 175
    pitch: int = 50
    pitch_range: int = 50
    word_gap: int = 0

    def __post_init__(self) -> None:
        limits = {"rate_wpm": (80, 450), "pitch": (0, 99), "pitch_range": (0, 99)}
        for name, (least, most) in {**limits, "word_gap": (0, 100)}.items():
            value = getattr(self, name)
            check_counts(least, **{name: value})
            if value > most:
                raise ConfigError(f"{name} is {value}; it must be at most {most}")

    @classmethod
    def draw(cls, seed: int, index: int, held_out: bool = False) -> Speaker:
        """Speaker number `index` of `seed`; held_out: of the timbres that training never hears."""
        random = np.random.default_rng((seed, index))
        variants = HELD_OUT_VARIANTS if held_out else VARIANTS
        return cls(
            VOICES[int(random.integers(len(VOICES)))],
            variants[int(random.integers(len(variants)))],
            int(random.integers(125, 226)),
            int(random.integers(30, 71)),
            int(random.integers(25, 76)),
            int(random.integers(0, 4)),
        )


class Espeak:
    """A running `espeak_child.py`; calls from several threads take turns.

    version: of espeak-ng, on which the samples depend: keep it among a run's settings.
    ConfigError: espeak-ng is not installed or does not start.
    """

    def __init__(self, library: str | None = None, data: str | None = None) -> None:
        """library, data: paths of libespeak-ng and its data; None: the ones installed."""
        if not hasattr(os, "fork"):
            raise ConfigError(
                f"synthetic speech needs a system that can fork, and {sys.platform} cannot; "
                "use Linux or macOS"
            )
        if library is None:
            library, data = _installed()
        command = [sys.executable, "-I", "-S", espeak_child.__file__, library]
        self._process = subprocess.Popen(
            [*command, data] if data else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._lock = threading.Lock()
        try:
            rate, version = self._reply()
        except ConfigError:
            rate, version = espeak_child.NO_LIBRARY, b""
        if rate < 0:
            self.close()
            raise ConfigError(
                f"espeak-ng does not start from {library}; reinstall the Debian package "
                "espeak-ng or the wheel espeakng-loader"
            )
        self.version = version.decode()

    def speak(self, text: str, speaker: Speaker) -> tuple[np.ndarray, int]:
        """(int16 samples [N], their rate); equal arguments give equal samples."""
        variant = f"+{speaker.variant}" if speaker.variant else ""
        request = {
            "text": text,
            "voice": speaker.voice + variant,
            "rate": speaker.rate_wpm,
            "volume": 50,  # at 100, the default, louder voices are clipped
            "pitch": speaker.pitch,
            "pitch_range": speaker.pitch_range,
            "word_gap": speaker.word_gap,
        }
        assert self._process.stdin is not None
        with self._lock:
            with contextlib.suppress(BrokenPipeError):  # then there is no reply either
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            rate, samples = self._reply()
        if rate == espeak_child.NO_VOICE:
            raise InputError(
                f"espeak-ng {self.version} has no voice {request['voice']!r}; "
                f"allowed voices: {', '.join(VOICES)}"
            )
        if rate < 0:
            raise InputError(f"espeak-ng could not speak {text[:80]!r}; leave that text out")
        return np.frombuffer(samples, "<i2"), rate

    def _reply(self) -> tuple[int, bytes]:
        assert self._process.stdout is not None
        head = self._process.stdout.read(espeak_child.REPLY.size)
        if len(head) < espeak_child.REPLY.size:
            raise ConfigError("the process that runs espeak-ng has ended; start again")
        number, size = espeak_child.REPLY.unpack(head)
        return number, self._process.stdout.read(size)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _installed() -> tuple[str, str | None]:
    """(library, its data or None for where the library looks itself)."""
    system = ctypes.util.find_library("espeak-ng")
    if system is not None:
        return system, None
    try:
        import espeakng_loader  # type: ignore[import-untyped]  # an optional package
    except ImportError as error:
        raise ConfigError(
            "synthetic speech needs espeak-ng; apt-get install espeak-ng or "
            "pip install 'offramp[synthetic]'"
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


# By process, so that a forked data-loading process gets its own rather than its parent's pipes;
# the parent's entry stays, as it must not be closed from there.
_running: dict[int, Espeak] = {}
_start = threading.Lock()


def espeak() -> Espeak:
    """This process's espeak-ng, started at the first call (about 30 ms), ended at exit."""
    pid = os.getpid()
    if pid not in _running:
        with _start:
            if pid not in _running:
                _running[pid] = Espeak()
                atexit.register(_running[pid].close)
    return _running[pid]


def synthesize(text: str, speaker: Speaker) -> Tensor:
    """`text` in `speaker`'s voice: float32 [N], mono, 16 kHz, in [-1, 1].

    Deterministic for one version of espeak-ng. InputError: nothing to speak, or no such voice.
    """
    samples, rate = espeak().speak(text, speaker)
    if not samples.any():
        raise InputError(f"{text[:80]!r} has no words to speak; give text with letters")
    wave = soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE)
    peak = float(np.abs(wave).max())
    return torch.from_numpy(wave / peak if peak > 1.0 else wave)


# -- what is spoken --------------------------------------------------------------------------

_SPELLED = {"Mr.": "Mister", "Mrs.": "Missus", "Dr.": "Doctor", "St.": "Saint"}
_TITLE = re.compile(r"\b(?:Mrs|Mr|Dr|St)\.(?!\w)")
# A sentence ends at . ! or ?, perhaps closed by quotes; a single capital (but I) is an initial.
_END = re.compile(r"(?<!\b[A-HJ-Z])[.!?]+[\"')]*\s+(?=[\"'(]*[A-Z])")
_CLAUSE = re.compile(r"(?<=[;:,.!?])[\"')]*\s+|\s*--+\s*")
_LETTERS = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--"}  # noqa: RUF001
    | {"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe"}
)
_NOT_READ_ALIKE = re.compile(r"[^A-Za-z\s'\",.;:!?()_-]|\b[A-Z]{2,}\b")


@dataclass(frozen=True)
class Sentence:
    """spoken: with case and punctuation, for the voice; text: the transcript, normalised."""

    spoken: str
    text: str


def normalize(text: str) -> str:
    """As LibriSpeech writes: lower case a-z and inner apostrophes, single spaces.

    Accents fall off; titles are spelled out ("Mr." -> "mister"); all else becomes a space. Not
    `data.speech.normalize_text`, which also spells out "etc" and "Mr": recipes depend on these
    texts, and the pieces and checkpoints made from them are there.
    """
    return plain_words(_plain(text).lower())


def _plain(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_LETTERS))
        text = "".join(c for c in text if not unicodedata.combining(c))
    return _TITLE.sub(lambda m: _SPELLED[m[0]], text)


def split_sentences(text: str, min_chars: int = 15, max_chars: int = 180) -> Iterator[Sentence]:
    """The sentences of `text` (one paragraph per line) that can be spoken and written alike.

    min_chars, max_chars: bounds on the normalised text; 15 characters take about a second. Too
    long sentences are cut at clauses; what is still too long or short is left out, and so is
    what a voice may read otherwise than written: digits, Roman numerals, words in capitals.
    """
    for paragraph in _plain(text).split("\n"):
        at = 0
        for end in [*(m.end() for m in _END.finditer(paragraph)), len(paragraph)]:
            sentence = " ".join(paragraph[at:end].replace("_", "").split())
            at = end
            if _NOT_READ_ALIKE.search(sentence):
                continue
            for spoken in _bounded(sentence, max_chars):
                written = normalize(spoken)
                if min_chars <= len(written) <= max_chars:
                    yield Sentence(spoken, written)


def _bounded(sentence: str, max_chars: int) -> list[str]:
    """`sentence`, or as few runs of its clauses as keep each within `max_chars` if they can."""
    if len(normalize(sentence)) <= max_chars:
        return [sentence]
    parts: list[str] = []
    at = 0
    for end in [*(m.end() for m in _CLAUSE.finditer(sentence)), len(sentence)]:
        clause = sentence[at:end].strip()
        at = end
        joined = f"{parts[-1]} {clause}" if parts else clause
        if parts and len(normalize(joined)) <= max_chars:
            parts[-1] = joined
        else:
            parts.append(clause)
    return parts


def book_sentences(split: str, root: Path | None = None) -> list[Sentence]:
    """All different sentences of the Gutenberg novels of `split`: train and dev share no book."""
    found: dict[str, Sentence] = {}
    for novel in corpora.books(split, root).values():
        for sentence in split_sentences(novel):
            found.setdefault(sentence.text, sentence)
    return list(found.values())


def transcript_sentences(split: str, root: Path | None = None) -> list[Sentence]:
    """LibriSpeech dev-clean's transcripts, one chapter in ten held out as `split` dev.

    A model that has trained on these must not be tested on LibriSpeech dev-clean.
    """
    if split not in ("train", "dev"):
        raise InputError(f"split is {split!r}; allowed: train, dev")
    path = (root or corpora.data_root()) / "librispeech_transcripts_text" / "dev_clean.tsv"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; set OFFRAMP_DATA to the folder that holds the corpora"
        ) from error
    found = []
    for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        if not row.get("id") or not row.get("text"):
            raise DataError(f"{path} has a row without id or text: {row}; fetch the file again")
        chapter = row["id"].rpartition("-")[0]
        held_out = hashlib.sha256(chapter.encode()).digest()[0] % 10 == 0
        if held_out == (split == "dev"):
            found.append(Sentence(row["text"], normalize(row["text"])))
    return found


class SyntheticSpeech(Sequence[tuple[Tensor, str]]):
    """Spoken sentences: item i, a function of (seed, i), is (samples as `synthesize`'s, text).

    Every pass over the sentences has its own order and its own speakers. length: how many items
    there are, as many passes as that takes. Holds no process: give it to data-loading processes.
    """

    def __init__(
        self, sentences: Sequence[Sentence], seed: int, length: int, held_out: bool = False
    ) -> None:
        """held_out: speak in `HELD_OUT_VARIANTS`, which otherwise are never used."""
        check_counts(1, length=length)
        check_counts(0, seed=seed)
        if not sentences:
            raise DataError("there are no sentences to speak; give at least one")
        self._sentences, self._seed = sentences, seed
        self._length, self._held_out = length, held_out

    def __len__(self) -> int:
        return self._length

    def item(self, index: int) -> tuple[Sentence, Speaker]:
        """What item `index` says and who says it, without speaking it."""
        if not 0 <= index < self._length:
            raise IndexError(f"item {index} of {self._length}")  # what ends a loop over us
        n_pass, at = divmod(index, len(self._sentences))
        order = _order(len(self._sentences), self._seed, n_pass)
        speaker = Speaker.draw(self._seed, index, self._held_out)
        return self._sentences[int(order[at])], speaker

    def __getitem__(self, index: int) -> tuple[Tensor, str]:  # type: ignore[override]
        sentence, speaker = self.item(index)
        return synthesize(sentence.spoken, speaker), sentence.text

    def settings(self) -> dict[str, object]:
        """What the items depend on, as JSON: for the settings of a run that may be resumed."""
        text = "\n".join(json.dumps(asdict(s)) for s in self._sentences)
        return {
            "sentences": hashlib.sha256(text.encode()).hexdigest(),
            "seed": self._seed,
            "held_out": self._held_out,
            "espeak-ng": espeak().version,
        }


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, n_pass: int) -> np.ndarray:
    return np.random.default_rng((seed, n_pass, 1)).permutation(count)
