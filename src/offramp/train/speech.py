"""Recipes for speech: what is trained, and how, on what `train/speech_data.py` lets it hear."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offramp.audio.features import FeatureConfig
from offramp.config import EncoderConfig, TransducerConfig
from offramp.errors import CheckpointError, ConfigError
from offramp.models import hub
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import load_encoder
from offramp.models.hf_checkpoint import is_pretrained
from offramp.models.hf_ctc import FAMILIES
from offramp.models.transducer import Transducer
from offramp.models.transducer_checkpoint import load_transducer, save_transducer
from offramp.tokenizer import TextTokenizer, ctc_words
from offramp.train.ctc import CTCTask, CTCTraining
from offramp.train.loop import (
    STATE_FILE,
    TrainConfig,
    TrainEvent,
    is_first_process,
    process_device,
    train,
)
from offramp.train.speech_data import SpeechData, ctc_tokenizer
from offramp.train.trainee import (
    Continued,
    Pretrained,
    Trainee,
    attached,
    ours,
    ours_from,
    start_folder,
)
from offramp.train.transducer import (
    TransducerReader,
    TransducerTask,
    TransducerTraining,
    measure_features,
)


@dataclass(frozen=True)
class SpeechRecipe(SpeechData):
    """One training run of a CTC encoder, on the data of `SpeechData`.

    encoder: its shape, or a checkpoint to start from, whose tokenizer is kept: the folder of one of
    ours, as it is or with other settings, or a transformers model that gets exits.
    words: the vocabulary, one token each; empty: the pieces that `ctc_tokenizer` makes.
    """

    name: str
    encoder: EncoderConfig | str | Continued | Pretrained
    train: TrainConfig
    training: CTCTraining = field(default_factory=CTCTraining)
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words:
            self._check_words()

    def _check_words(self) -> None:
        if not isinstance(self.encoder, EncoderConfig):
            raise ConfigError("words are given, but a checkpoint brings its own; drop them")
        if self.encoder.vocab_size != len(self.words) + 1:
            raise ConfigError(
                f"vocab_size is {self.encoder.vocab_size} for {len(self.words)} words; it must be "
                f"{len(self.words) + 1}, with the blank"
            )

    def run(self, out: Path, device: str = "cpu") -> Iterator[TrainEvent]:
        """Train or resume in `out`; at the end its `checkpoint` folder holds the model."""
        folder = out / "checkpoint"
        hub.check_target(folder)  # before the training, not after it
        trainee = self._trainee(process_device(device))
        sources = self.sources(self.train.seed)
        steps, seed, dev = self.train.steps, self.train.seed, self.dev(trainee.reader)
        settings = self.settings(sources) | trainee.fingerprint()
        with self.batches(sources, trainee.reader, self.train) as batches:
            task = CTCTask(trainee.encoder, batches, self.training, steps, seed, dev)
            yield from train(task, self.train, out, settings)
        if is_first_process():
            trainee.save(folder)

    def _trainee(self, device: torch.device) -> Trainee:
        if isinstance(self.encoder, EncoderConfig):
            size = self.encoder.vocab_size
            tokenizer = ctc_words(self.words) if self.words else ctc_tokenizer(size)
            encoder = CTCEncoder(self.encoder)
            encoder.init_weights(self.train.seed)
            return ours(encoder.to(device), tokenizer)
        wanted = self.encoder
        if isinstance(wanted, str):
            folder = start_folder(wanted, "encoder")
        else:
            folder = start_folder(wanted.folder, "encoder.folder")
        if is_pretrained(folder) and not isinstance(wanted, Continued):
            other = Pretrained(wanted) if isinstance(wanted, str) else wanted
            return attached(folder, other, device)
        if isinstance(wanted, Pretrained):
            raise CheckpointError(
                f"{folder} holds no model of {', '.join(FAMILIES)}; give the folder of one, or, "
                "for a checkpoint of ours, its folder itself as encoder"
            )
        return ours_from(folder, Continued(wanted) if isinstance(wanted, str) else wanted, device)


@dataclass(frozen=True)
class TransducerRecipe(SpeechData):
    """One training run of a streaming transducer, on the data of `SpeechData`.

    model: its shape, or the folder of a checkpoint to start from, whose tokenizer and statistics of
    the features are kept. The tokenizer of a new one is that of our CTC encoders
    (`ctc_tokenizer`); its statistics are those of the first batches, as augmented.
    teacher: a CTC encoder of ours with the same tokenizer, for `training.distill`.
    """

    name: str
    model: TransducerConfig | str
    train: TrainConfig
    training: TransducerTraining = field(default_factory=TransducerTraining)
    teacher: str | None = None

    def run(self, out: Path, device: str = "cpu") -> Iterator[TrainEvent]:
        """Train or resume in `out`; at the end its `checkpoint` folder holds the model."""
        folder = out / "checkpoint"
        hub.check_target(folder)  # before the training, not after it
        model, tokenizer, start = self._start(process_device(device))
        reader = TransducerReader(FeatureConfig(num_mels=model.config.num_mels), tokenizer)
        sources = self.sources(self.train.seed)
        settings = self.settings(sources)
        tokens = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        teacher, taught_by = self.load_teacher(tokenizer, model.device)
        settings |= {"start weights": start, "tokenizer": tokens, "teacher weights": taught_by}
        with self.batches(sources, reader, self.train) as batches:
            if start is None and not (out / STATE_FILE).exists():
                measure_features(model, batches, self.train.steps)
            seed, dev = self.train.seed, self.dev(reader)
            task = TransducerTask(model, batches, self.training, seed, dev, teacher)
            yield from train(task, self.train, out, settings)
        if is_first_process():
            files = {"tokenizer.json": tokenizer.to_json()}
            save_transducer(model, folder, torch.float16, files)

    def _start(self, device: torch.device) -> tuple[Transducer, TextTokenizer, str | None]:
        """(the model, its tokenizer, sha256 of the weights it starts from, None: new ones)."""
        if isinstance(self.model, TransducerConfig):
            model = Transducer(self.model)
            model.init_weights(self.train.seed)
            return model.to(device), ctc_tokenizer(self.model.vocab_size), None
        folder = start_folder(self.model, "model")
        model = load_transducer(folder, device).requires_grad_(True).train()
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        return model, tokenizer, hub.weights_sha256(folder)

    def load_teacher(
        self, tokenizer: TextTokenizer, device: torch.device
    ) -> tuple[CTCEncoder | None, str | None]:
        """(the teacher, sha256 of its weights); None, None without one.

        CheckpointError: `tokenizer`, of the model it is to teach, is not its own.
        """
        if self.teacher is None:
            return None, None
        folder = start_folder(self.teacher, "teacher")
        teacher = load_encoder(folder, device)
        if TextTokenizer.load(folder / "tokenizer.json").to_json() != tokenizer.to_json():
            raise CheckpointError(
                f"the teacher in {folder} has another tokenizer than the model; start the model "
                "from a checkpoint that has the teacher's, or take another teacher"
            )
        return teacher, hub.weights_sha256(folder)
