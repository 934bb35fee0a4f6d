"""What speech recipes train on: which recordings and which synthetic speech, in batches.

A batch is a pure function of (seed, step), like everything random here, so that a resumed run
goes on as if it had never stopped. Recordings stay in memory as 16-bit samples; augmentation,
synthesis and features are made anew for every batch, ahead of the training in a process of their
own. Under torchrun each process prepares the shards that it trains on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.config import check_counts, check_positive
from offramp.data import batching
from offramp.data.augment_audio import AudioAugmentation
from offramp.data.corpora import data_root
from offramp.data.manifest import Utterance, read_manifest
from offramp.data.speech import (
    DIGITS_IN_STRING,
    DigitString,
    connected_digits,
    normalized,
    speech_set,
)
from offramp.data.synthetic import (
    Sentence,
    SyntheticSpeech,
    book_sentences,
    transcript_sentences,
)
from offramp.errors import ConfigError, DataError
from offramp.tokenizer import TextTokenizer, train_ctc_bpe
from offramp.train.ctc import SpeechBatch, SpeechBatches
from offramp.train.loop import TrainConfig
from offramp.train.prefetch import PrefetchedBatches

_SYNTHETIC_CHARS_PER_S = 14.0  # how fast the voices speak on average, to sort before speaking


@dataclass(frozen=True)
class SpeechItem:
    """One utterance of an epoch: its text, about how long it is, and how to get its samples."""

    text: str
    seconds: float
    samples: Callable[[], Tensor]


class SpeechSource(Protocol):
    """Utterances by epoch: the same list for the same epoch, in every process."""

    def epoch(self, epoch: int) -> list[SpeechItem]: ...

    def fingerprint(self) -> object:
        """What the items depend on, as JSON."""
        ...


class TextReader(Protocol):
    """What batches need of a reader; see `audio.reader` and `train.trainee`."""

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each, at 16 kHz -> padded input [B, ...] and true lengths int64 [B]."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each."""
        ...


class Recordings:
    """Every recording once per epoch."""

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        self._utterances = utterances
        self._loaded: dict[Path, np.ndarray] = {}

    def epoch(self, epoch: int) -> list[SpeechItem]:
        return [
            SpeechItem(u.text, u.seconds, partial(self._read, u.path)) for u in self._utterances
        ]

    def fingerprint(self) -> object:
        told = [[u.path.name, u.seconds, u.text] for u in self._utterances]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _read(self, path: Path) -> Tensor:
        if path not in self._loaded:
            # 16 bits are what the files hold; an hour of floats would take 230 MB.
            heard = read_audio(path).clamp(-1.0, 1.0)  # resampled, it may overshoot
            self._loaded[path] = (heard * 32767).round().to(torch.int16).numpy()
        return torch.from_numpy(self._loaded[path].astype(np.float32) / 32767)


class Digits:
    """`count` strings per epoch, other ones in each; `digits`: see `connected_digits`."""

    def __init__(
        self,
        count: int,
        seed: int,
        split: str = "train",
        digits: tuple[int, int] = DIGITS_IN_STRING,
    ) -> None:
        self._count, self._seed, self._split, self._digits = count, seed, split, digits

    def epoch(self, epoch: int) -> list[SpeechItem]:
        seed = self._seed + 1_000_003 * epoch
        strings = connected_digits(self._split, self._count, seed, digits=self._digits)
        return [SpeechItem(s.text, _digit_seconds(s), s.samples) for s in strings]

    def fingerprint(self) -> object:
        return [self._count, self._seed, self._digits]


class Synthetic:
    """`count` sentences per epoch, spoken by espeak-ng in ever new voices."""

    def __init__(self, sentences: Sequence[Sentence], count: int, seed: int) -> None:
        self._count = count
        self._speech = SyntheticSpeech(sentences, seed, length=2**31)

    def epoch(self, epoch: int) -> list[SpeechItem]:
        items = []
        for index in range(epoch * self._count, (epoch + 1) * self._count):
            text = self._speech.item(index)[0].text
            speak = partial(self._spoken, index)
            items.append(SpeechItem(text, len(text) / _SYNTHETIC_CHARS_PER_S, speak))
        return items

    def fingerprint(self) -> object:
        return [self._count, self._speech.settings()]

    def _spoken(self, index: int) -> Tensor:
        return self._speech[index][0]


class MixedSpeech:
    """Implements `train.ctc.SpeechBatches`: all sources mixed, batches of like length.

    batch_seconds: of audio in a batch, padding included, about. num_shards: no batch has fewer
    utterances, whatever their length.
    """

    def __init__(
        self,
        sources: Sequence[SpeechSource],
        reader: TextReader,
        batch_seconds: float,
        seed: int,
        augmentation: AudioAugmentation | None,
        num_shards: int = 1,
    ) -> None:
        self._sources, self._reader, self._num_shards = sources, reader, num_shards
        self._batch_seconds, self._seed = batch_seconds, seed
        self._augmentation = augmentation
        self._ends: list[int] = []  # steps up to the end of each epoch planned so far
        self._current: tuple[int, list[list[SpeechItem]]] | None = None

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        items = self._items(step)
        assert num_shards <= len(items), "planned for fewer shards"
        # In order of length, so every num_shards-th of them is a fair share.
        mine = range(shard, len(items), num_shards)
        clean = [items[row].samples() for row in mine]
        samples = [self._heard(clean, i, step * 10_000 + row) for i, row in enumerate(mine)]
        texts = self._reader.encode_batch([item.text for item in items])
        targets = [texts[row] for row in mine]
        return speech_batch(self._reader, samples, targets, sum(map(len, texts)))

    def _heard(self, clean: Sequence[Tensor], i: int, index: int) -> Tensor:
        if self._augmentation is None:
            return clean[i]
        babble = [*clean[i + 1 :], *clean[:i]]
        return self._augmentation.apply(clean[i], self._seed, index, babble)

    def _items(self, step: int) -> list[SpeechItem]:
        while not self._ends or self._ends[-1] <= step:
            self._ends.append((self._ends or [0])[-1] + len(self._plan(len(self._ends))))
        epoch = next(i for i, end in enumerate(self._ends) if step < end)
        return self._plan(epoch)[step - (self._ends[epoch - 1] if epoch else 0)]

    def _plan(self, epoch: int) -> list[list[SpeechItem]]:
        """The epoch's batches: items of like length, batches in random order."""
        if self._current is None or self._current[0] != epoch:
            items = [item for source in self._sources for item in source.epoch(epoch)]
            if len(items) < self._num_shards:
                raise DataError(
                    f"{len(items)} utterances do not split into {self._num_shards} shards; give "
                    "more of them, or lower num_shards"
                )
            draw = np.random.default_rng((self._seed, epoch))
            # Lengths are blurred, or the same utterances would always meet.
            blurred = [
                item.seconds * f
                for item, f in zip(items, draw.uniform(0.85, 1.15, len(items)), strict=True)
            ]
            by_length = [items[i] for i in np.argsort(blurred)]
            batches = pack(by_length, self._batch_seconds, self._num_shards)
            self._current = epoch, [batches[i] for i in draw.permutation(len(batches))]
        return self._current[1]


def pack(
    items: Sequence[SpeechItem], batch_seconds: float, least: int = 1
) -> list[list[SpeechItem]]:
    """Neighbours together, as many as fit `batch_seconds` with padding; each batch by length.

    least: utterances that every batch has at least, also where they do not fit.
    """
    rows = batching.pack([item.seconds for item in items], batch_seconds)
    found, start = [], 0
    for size in at_least([len(batch) for batch in rows], least):
        batch = items[start : start + size]
        found.append(sorted(batch, key=lambda item: item.seconds))
        start += size
    return found


def at_least(sizes: Sequence[int], least: int) -> list[int]:
    """Sizes of the same sum, each at least `least` (unless all together are fewer).

    A batch takes what it lacks from the one before it, where utterances are shorter; what is left
    of the first ones joins the next.
    """
    found = list(sizes)
    for i in range(len(found) - 1, 0, -1):
        lacks = max(0, least - found[i])
        found[i] += lacks
        found[i - 1] -= lacks  # perhaps below 0: then that one takes more
    while len(found) > 1 and found[0] < least:
        found[:2] = [found[0] + found[1]]
    return found


def speech_batch(
    reader: TextReader,
    samples: Sequence[Tensor],
    targets: Sequence[Sequence[int]],
    total_targets: int | None = None,
) -> SpeechBatch:
    """Samples [N_b] each, as the encoder reads them, and their token ids."""
    features, lengths = reader.inputs(samples)
    seconds = sum(map(len, samples)) / SAMPLE_RATE
    return SpeechBatch(features, lengths, targets, seconds, total_targets)


@dataclass(frozen=True, kw_only=True)
class SpeechData:
    """The half of a speech recipe that says what is heard; the other half is what learns from it.

    sets: names of speech sets (`data.speech.SPEECH_SETS`) or paths of manifests (.tsv, .jsonl),
    their train splits. digit_strings, synthetic_sentences: how many of them per epoch.
    digits_in_string: at least and at most, in training. dev_sets: sets that are evaluated during
    training, `dev_utterances` of each, as are `dev_digit_strings`. Utterances longer than
    `max_seconds` are left out. prefetch: make batches ahead in a process of their own; the same
    batches, but its start takes some seconds.
    """

    sets: tuple[str, ...] = ()
    digit_strings: int = 0
    digits_in_string: tuple[int, int] = DIGITS_IN_STRING
    synthetic_sentences: int = 0
    augmentation: AudioAugmentation | None = field(default_factory=AudioAugmentation)
    batch_seconds: float = 160.0
    max_seconds: float = 20.0
    dev_sets: tuple[str, ...] = ()
    dev_utterances: int = 40
    dev_digit_strings: int = 0
    prefetch: bool = True

    def __post_init__(self) -> None:
        counts = ("digit_strings", "synthetic_sentences", "dev_utterances", "dev_digit_strings")
        check_counts(0, **{name: getattr(self, name) for name in counts})
        check_positive(batch_seconds=self.batch_seconds, max_seconds=self.max_seconds)
        if not (self.sets or self.digit_strings or self.synthetic_sentences):
            raise ConfigError(
                "the recipe has nothing to train on; give sets, digit_strings or "
                "synthetic_sentences"
            )

    def sources(self, seed: int) -> list[SpeechSource]:
        """What the training hears."""
        sources: list[SpeechSource] = []
        if self.sets:
            sources.append(Recordings(self._utterances(self.sets, "train")))
        if self.digit_strings:
            sources.append(Digits(self.digit_strings, seed, digits=self.digits_in_string))
        if self.synthetic_sentences:
            sentences = [s for s in _train_sentences(data_root()) if _fits(s, self.max_seconds)]
            if not sentences:
                raise DataError(f"no sentence takes less than max_seconds, {self.max_seconds}")
            sources.append(Synthetic(sentences, self.synthetic_sentences, seed))
        return sources

    def settings(self, sources: Sequence[SpeechSource]) -> dict[str, Any]:
        """All of the recipe that the result depends on, with its data, as JSON."""
        settings = asdict(self)
        del settings["prefetch"]  # changes nothing but the pace
        settings["training data"] = [source.fingerprint() for source in sources]
        return settings

    @contextmanager
    def batches(
        self, sources: Sequence[SpeechSource], reader: TextReader, train: TrainConfig
    ) -> Iterator[SpeechBatches]:
        """The batches of the run that `train` describes, for as long as the scope."""
        mixed = MixedSpeech(
            sources, reader, self.batch_seconds, train.seed, self.augmentation, train.num_shards
        )
        if self.prefetch:
            with closing(PrefetchedBatches(mixed, train.steps)) as ahead:
                yield ahead
        else:
            yield mixed

    def dev(self, reader: TextReader) -> list[SpeechBatch]:
        """What is evaluated during training."""
        sets = [
            Recordings(self._utterances([name], "dev")[: self.dev_utterances]).epoch(0)
            for name in self.dev_sets
        ]
        if self.dev_digit_strings:
            sets.append(Digits(self.dev_digit_strings, 0, "dev").epoch(0))
        batches = []
        for items in sets:
            for some in pack(sorted(items, key=lambda i: i.seconds), self.batch_seconds):
                texts = reader.encode_batch([item.text for item in some])
                batches.append(speech_batch(reader, [item.samples() for item in some], texts))
        return batches

    def _utterances(self, sets: Sequence[str], split: str) -> list[Utterance]:
        found = []
        for name in sets:
            is_file = name.endswith((".tsv", ".jsonl"))
            known = read_manifest(Path(name), split) if is_file else speech_set(name, split)
            kept, _ = normalized(known)
            found += [u for u in kept if u.seconds <= self.max_seconds]
        if not found:
            raise DataError(f"the sets {', '.join(sets)} have no utterances of split {split}")
        return found


def ctc_tokenizer(vocab_size: int) -> TextTokenizer:
    """The pieces of our recognisers, from the texts that synthetic speech says."""
    sentences = _train_sentences(data_root())
    return train_ctc_bpe((sentence.text for sentence in sentences), vocab_size)


@lru_cache(maxsize=1)
def _train_sentences(root: Path) -> tuple[Sentence, ...]:
    """What synthetic speech says in training: read once, for the pieces and for the voices."""
    return (*book_sentences("train", root), *transcript_sentences("train", root))


def _fits(sentence: Sentence, max_seconds: float) -> bool:
    """Whether it can be said in that time, about."""
    return len(sentence.text) / _SYNTHETIC_CHARS_PER_S <= max_seconds


def _digit_seconds(string: DigitString) -> float:
    """About: a digit takes 0.43 s on average."""
    return 0.43 * len(string.takes) + sum(string.pauses_s)
