"""Recipes for Speech-LMs: which parts they start from, and what of them learns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from offramp.audio.reader import LogMelReader, Reader
from offramp.config import DecoderConfig, EncoderConfig
from offramp.config_speech_lm import AUDIO, HeadsConfig, ProjectorConfig, SpeechLMConfig
from offramp.errors import ConfigError
from offramp.models import hub
from offramp.models.ctc_checkpoint import load_encoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hub import load_decoder
from offramp.models.speech_lm import PromptTokens, SpeechLM
from offramp.models.speech_lm_checkpoint import (
    ENCODER,
    SpeechLMCheckpoint,
    SpeechLMParts,
    check_same_tokens,
    join_speech_lm,
    load_speech_lm,
)
from offramp.tokenizer import TextTokenizer
from offramp.train.ctc import SpeechBatch, SpeechBatches
from offramp.train.encoder_tokens import check_decoder, decoder_tokenizer, relabelled
from offramp.train.loop import TrainConfig, TrainEvent, is_first_process, process_device, train
from offramp.train.lora import LoRA, load_peft, low_rank
from offramp.train.mwer import MWERTask, MWERTraining
from offramp.train.speech_data import SpeechData
from offramp.train.speech_lm import SpeechLMTask, SpeechLMTraining
from offramp.train.trainee import start_folder


@dataclass(frozen=True)
class NewDecoder:
    """A decoder that has not heard yet, behind a CTC encoder of ours, in the encoder's own tokens.

    These come first, then BOS and EOS, and for the encoder the blank; its CTC writes what it wrote.
    decoder: of that vocabulary, with new weights; or the folder of one that has learned from text
    in these tokens (`TextRecipe.tokens_of`). prompt, ctc_exit: as in `SpeechLMConfig`.
    """

    encoder: str
    projector: ProjectorConfig
    decoder: DecoderConfig | str
    heads: HeadsConfig | None = None
    prompt: str = AUDIO
    ctc_exit: int | None = None


@dataclass(frozen=True)
class NewHeads:
    """The Speech-LM in `folder` with new heads; those that it has are dropped."""

    folder: str
    heads: HeadsConfig


@dataclass(frozen=True)
class SpeechLMReader:
    """What the encoder reads, and texts in the decoder's tokens."""

    reader: Reader
    tokenizer: TextTokenizer

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each, at 16 kHz -> padded input [B, ...] and true lengths int64 [B]."""
        return self.reader.inputs(samples)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Without the tokens that begin or end a text."""
        return self.tokenizer.encode_batch(texts, special=False)


@dataclass(frozen=True)
class SpeechLMRecipe(SpeechData):
    """One training run of a Speech-LM, on the data of `SpeechData`.

    model: a new decoder behind an encoder, the folders of both to join, new heads for a
    Speech-LM, or the folder of one. training: with `MWERTraining` from word errors too. lora: the
    decoder learns by low-rank updates alone, which become part of its weights at the end.
    """

    name: str
    model: NewDecoder | SpeechLMParts | NewHeads | str
    train: TrainConfig
    training: SpeechLMTraining = field(default_factory=SpeechLMTraining)
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is None:
            return
        if "decoder" in self.training.freeze:
            raise ConfigError(
                "freeze names the decoder, and lora is how it learns; take one of them out"
            )
        if isinstance(self.model, NewDecoder) and isinstance(self.model.decoder, DecoderConfig):
            raise ConfigError(
                "lora keeps the decoder's own weights, and those of a new one know nothing; give "
                "model.decoder the folder of one that has learned, or leave lora out"
            )

    def run(self, out: Path, device: str = "cpu") -> Iterator[TrainEvent]:
        """Train or resume in `out`; at the end its `checkpoint` folder holds the model."""
        folder = out / "checkpoint"
        hub.check_target(folder)  # before the training, not after it
        if self.lora is not None:
            load_peft()  # it could be missing
        start, weights = self._start(process_device(device))
        model, reader = start.model, start.reader
        if reader is None:
            assert isinstance(model.encoder.config, EncoderConfig)
            ours = LogMelReader(model.encoder.config)
        own = SpeechLMReader(ours if reader is None else reader, start.tokenizer)
        self.training.fitted(model)  # all that it could refuse, before the data is read
        sources = self.sources(self.train.seed)
        tokens = hashlib.sha256(start.tokenizer.to_json().encode()).hexdigest()
        settings = self.settings(sources) | {"start weights": weights, "tokenizer": tokens}
        with self.batches(sources, own, self.train) as batches:
            task = self._task(start, batches, self.dev(own))
            lora, seed = self.lora, self.train.seed
            with nullcontext() if lora is None else low_rank(model.decoder, lora, seed):
                yield from train(task, self.train, out, settings)
        if is_first_process():
            start.save(folder, torch.float16)

    def _task(
        self, start: SpeechLMCheckpoint, batches: SpeechBatches, dev: Sequence[SpeechBatch]
    ) -> SpeechLMTask:
        model, training, seed = start.model, self.training, self.train.seed
        if isinstance(training, MWERTraining):
            return MWERTask(model, batches, start.tokenizer.decode, training, seed, dev)
        return SpeechLMTask(model, batches, training, seed, dev)

    def _start(self, device: torch.device) -> tuple[SpeechLMCheckpoint, list[str]]:
        """(the model, sha256 of the weights that it starts from)."""
        wanted, seed = self.model, self.train.seed
        if isinstance(wanted, NewDecoder):
            folders = [start_folder(wanted.encoder, "model.encoder")]
            if isinstance(wanted.decoder, str):
                folders.append(start_folder(wanted.decoder, "model.decoder"))
            start = new_decoder(wanted, folders[0], seed, device)
            return start, [hub.weights_sha256(f) for f in folders]
        if isinstance(wanted, SpeechLMParts):
            folders = [
                start_folder(wanted.encoder, "model.encoder"),
                start_folder(wanted.decoder, "model.decoder"),
            ]
            return join_speech_lm(wanted, seed, device), [hub.weights_sha256(f) for f in folders]
        if isinstance(wanted, str):
            folder = start_folder(wanted, "model")
            start = load_speech_lm(folder, device)
        else:
            folder = start_folder(wanted.folder, "model.folder")
            start = with_heads(load_speech_lm(folder, device), wanted.heads)
        parts = [part for part in (folder, folder / ENCODER) if part.is_dir()]
        return start, [hub.weights_sha256(part) for part in parts]


# -- what a training starts from ------------------------------------------------------------


def new_decoder(
    wanted: NewDecoder, folder: Path, seed: int, device: torch.device
) -> SpeechLMCheckpoint:
    """The encoder in `folder` with the decoder; weights that are new are drawn from `seed`.

    ConfigError: the decoder is not for the encoder's tokens.
    """
    pieces = TextTokenizer.load(folder / "tokenizer.json")
    encoder = load_encoder(folder, device)
    tokenizer = decoder_tokenizer(pieces, encoder.config.blank_id)
    decoder = _decoder(wanted.decoder, tokenizer, folder, seed)
    encoder = relabelled(encoder, pieces, tokenizer)
    config = SpeechLMConfig(
        encoder.config,
        wanted.projector,
        decoder.config,
        wanted.heads,
        wanted.prompt,
        wanted.ctc_exit,
    )
    model = SpeechLM(config, PromptTokens.of(config, tokenizer), encoder, decoder)
    model.projector.init_weights(seed)
    return SpeechLMCheckpoint(model.to(device), tokenizer)


def _decoder(
    wanted: DecoderConfig | str, tokenizer: TextTokenizer, encoder: Path, seed: int
) -> DecoderLM:
    """A new decoder, or the one in the folder `wanted`, for the tokens of the encoder."""
    if isinstance(wanted, DecoderConfig):
        check_decoder(wanted, tokenizer, encoder)
        made = DecoderLM(wanted)
        made.init_weights(seed)
        return made
    folder = start_folder(wanted, "model.decoder")
    made = load_decoder(folder)
    theirs = TextTokenizer.load(folder / "tokenizer.json")
    remedy = "give one that learned from text with tokens_of of that encoder"
    check_same_tokens(tokenizer.pieces(), encoder, theirs, folder, remedy)
    check_decoder(made.config, tokenizer, encoder)
    return made


def with_heads(start: SpeechLMCheckpoint, heads: HeadsConfig) -> SpeechLMCheckpoint:
    """The same model with new heads, whatever it had."""
    old = start.model
    config = replace(old.config, heads=heads)
    model = SpeechLM(config, old.prompt, old.encoder, old.decoder)
    model.projector.load_state_dict(old.projector.state_dict())
    return replace(start, model=model.to(old.device))
