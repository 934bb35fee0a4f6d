"""What a speech recipe trains: an encoder of ours, or a transformers model that gets exits.

Both come with what they read and write, so that recipe, batches and loss need not tell them apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from offramp.audio.reader import LogMelReader, Reader
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import load_encoder, save_encoder
from offramp.models.hf_checkpoint import PretrainedSpeech
from offramp.models.hub import resolve, weights_sha256
from offramp.tokenizer import TextTokenizer
from offramp.train.ctc import ExitEncoder


class TrainingReader(Reader, Protocol):
    """A reader that turns texts into targets too."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each."""
        ...


@dataclass(frozen=True)
class LogMelTrainingReader(LogMelReader):
    """Our encoders', with the pieces of a tokenizer."""

    tokenizer: TextTokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)


@dataclass(frozen=True)
class Pretrained:
    """A transformers CTC model that gets exits (arXiv 2309.09546).

    folder: of the checkpoint, or its hub id. exits: layers counted from 1, the last among them;
    none: those that the folder has, or else every second. freeze: train the exit heads alone, so
    that the last exit stays what it is.
    """

    folder: str
    exits: tuple[int, ...] = ()
    freeze: bool = True


@dataclass(frozen=True)
class Continued:
    """A checkpoint of ours to start from, with settings that no weight depends on.

    dropout, pad_edges: as in `EncoderConfig`; None: as the checkpoint has it.
    """

    folder: str
    dropout: float | None = None
    pad_edges: bool | None = None

    def changed(self, encoder: CTCEncoder) -> CTCEncoder:
        """`encoder` with these settings, on the same device."""
        own = {k: v for k, v in asdict(self).items() if k != "folder" and v is not None}
        made = CTCEncoder(replace(encoder.config, **own)).to(encoder.device)
        made.load_state_dict(encoder.state_dict())
        return made


@dataclass(frozen=True)
class Trainee:
    """weights: sha256 of those it starts from, None if they are new. vocabulary: of its targets, as
    text. save: writes its checkpoint into a folder."""

    encoder: ExitEncoder
    reader: TrainingReader
    weights: str | None
    vocabulary: str
    save: Callable[[Path], None]

    def fingerprint(self) -> dict[str, str | None]:
        """What its training depends on."""
        tokens = hashlib.sha256(self.vocabulary.encode()).hexdigest()
        return {"start weights": self.weights, "tokenizer": tokens}


def ours(encoder: CTCEncoder, tokenizer: TextTokenizer, weights: str | None = None) -> Trainee:
    """`encoder` to be trained, written with half-precision weights."""
    text = tokenizer.to_json()
    files = {"tokenizer.json": text}
    save = partial(save_encoder, encoder, dtype=torch.float16, files=files)
    encoder.requires_grad_(True).train()
    reader = LogMelTrainingReader(encoder.config, tokenizer)
    return Trainee(encoder, reader, weights, text, save)


def ours_from(folder: Path, wanted: Continued, device: torch.device) -> Trainee:
    """The checkpoint of ours in `folder`, with the settings that are `wanted`, to be trained."""
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    encoder = wanted.changed(load_encoder(folder, device))
    return ours(encoder, tokenizer, weights_sha256(folder))


def attached(folder: Path, wanted: Pretrained, device: torch.device) -> Trainee:
    """The transformers model in `folder` with the exits that are `wanted`, to be trained."""
    speech = PretrainedSpeech.load(folder, wanted.exits or None, device=device, untrained=True)
    speech.encoder.train().freeze_base(wanted.freeze)
    vocabulary = json.dumps(speech.reader.pieces)
    return Trainee(speech.encoder, speech.reader, weights_sha256(folder), vocabulary, speech.save)


def start_folder(name: str, setting: str) -> Path:
    """Of a checkpoint that a recipe needs, which is `name` in its `setting`."""
    return resolve(
        name,
        "the recipe needs it: train the recipe that makes it first (this one's file says "
        f"which), or give another with --set {setting}=FOLDER",
    )
