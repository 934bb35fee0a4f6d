"""Speech-LMs in and out of folders, or joined from an encoder's folder and a decoder's.

A folder holds config.json, model.safetensors and the decoder's tokenizer.json. An encoder of ours
is part of the weights; one of transformers lies in encoder/, as transformers and
`hf_checkpoint.py` read it, with its feature extractor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from offramp.config import DecoderConfig
from offramp.config_speech_lm import AUDIO, HeadsConfig, ProjectorConfig, SpeechLMConfig
from offramp.errors import CheckpointError, ConfigError
from offramp.files import replacing
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import load_encoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hf_checkpoint import PretrainedReader, PretrainedSpeech, is_pretrained
from offramp.models.hf_ctc import PretrainedCTCEncoder
from offramp.models.hf_speech_lm import is_audio_lm
from offramp.models.hub import (
    SPEECH_LM_TYPE,
    check_finite,
    check_target,
    described,
    fill,
    lay_out,
    load_decoder,
    resolve,
    write_model,
)
from offramp.models.speech_lm import PromptTokens, SpeechLM
from offramp.nn.unfilled import unfilled
from offramp.tokenizer import TextTokenizer

ENCODER = "encoder"  # the folder in a Speech-LM's folder where a transformers encoder lies


@dataclass(frozen=True)
class SpeechLMParts:
    """What to join: names, folders or hub ids of an encoder and a decoder, and what is new.

    encoder: a CTC encoder of ours, or a transformers CTC model with or without exits. decoder: of
    the Llama family, with its tokenizer. prompt, ctc_exit: as in `SpeechLMConfig`. new_ctc_head:
    the encoder's CTC gets the decoder's tokens, untrained; without it, it must have them where a
    `ctc_exit` is named, by the tokenizers of both.
    """

    encoder: str
    decoder: str
    projector: ProjectorConfig
    heads: HeadsConfig | None = None
    prompt: str = AUDIO
    ctc_exit: int | None = None
    new_ctc_head: bool = False


@dataclass(frozen=True)
class SpeechLMCheckpoint:
    """A Speech-LM and its decoder's tokenizer. reader: what a transformers encoder reads with;
    None: the encoder is ours and reads log-mel features."""

    model: SpeechLM
    tokenizer: TextTokenizer
    reader: PretrainedReader | None = None

    def save(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write a folder that `load_speech_lm` reads; whole or not at all.

        dtype: of the stored weights (default: as they are; a transformers encoder's always are);
        int8: matrices of 8 bits, for half the bytes of float16 (`stored.py`). files: name -> text
        of further files; an existing checkpoint is replaced with all of its files.
        """
        check_target(folder)
        config = {"model_type": SPEECH_LM_TYPE, **asdict(self.model.config)}
        texts = {"tokenizer.json": self.tokenizer.to_json(pretty=True), **(files or {})}
        parts = _stored_parts(self.model)
        if self.reader is None:
            write_model(parts, folder, config, dtype, texts)
            return
        encoder = self.model.encoder
        assert isinstance(encoder, PretrainedCTCEncoder)
        with replacing(folder) as temporary:
            write_model(parts, temporary, config, dtype, texts)
            PretrainedSpeech(encoder, self.reader).save(temporary / ENCODER)


def load_speech_lm_config(folder: Path) -> SpeechLMConfig:
    """The model that `folder`/config.json describes; CheckpointError: it describes none."""
    if is_audio_lm(folder):
        raise CheckpointError(
            f"{folder} holds an audio language model of transformers, which transcribes and is not "
            "trained here; join a CTC encoder and a decoder of the Llama family"
        )
    wanted = "the folder of a Speech-LM, such as a Speech-LM recipe writes"
    return described(folder, SPEECH_LM_TYPE, SpeechLMConfig.from_dict, wanted)


def load_speech_lm(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SpeechLMCheckpoint:
    """The model in `folder`, every tensor checked by name and shape; frozen, in eval mode.

    CheckpointError: there is none, or it has weights that are not finite.
    """
    config = load_speech_lm_config(folder)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    speech = None
    if config.encoder is None:
        speech = PretrainedSpeech.load(folder / ENCODER, device=device)
        speech.encoder.to(dtype).requires_grad_(False)
    try:
        prompt = PromptTokens.of(config, tokenizer)
        with unfilled():
            encoder = CTCEncoder(config.encoder) if config.encoder is not None else None
            decoder = DecoderLM(config.decoder)
            front = encoder if speech is None else speech.encoder
            assert front is not None, "one of ours, or one of transformers"
            model = SpeechLM(config, prompt, front, decoder)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: {error}; the files are not of one checkpoint, fetch it anew"
        ) from error
    fill(_stored_parts(model), folder, device, dtype)
    check_finite(model, folder)
    for part in (model.decoder, model.heads):
        if isinstance(part, nn.Module):
            _lay_out(part)
    reader = None if speech is None else speech.reader
    return SpeechLMCheckpoint(model.eval(), tokenizer, reader)


def join_speech_lm(
    parts: SpeechLMParts, seed: int = 0, device: torch.device | str = "cpu"
) -> SpeechLMCheckpoint:
    """Encoder and decoder as their folders have them, what is new drawn from `seed`; frozen, in
    eval mode. CheckpointError, ConfigError: a folder cannot be read, or the parts do not fit."""
    folder = resolve(parts.decoder)
    decoder = load_decoder(folder, device)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    source = resolve(parts.encoder)
    encoder: CTCEncoder | PretrainedCTCEncoder
    reader = own = None
    if is_pretrained(source):
        speech = PretrainedSpeech.load(source, device=device)
        encoder, reader = speech.encoder, speech.reader
        if parts.new_ctc_head:
            raise ConfigError(
                f"new_ctc_head is not supported for {parts.encoder}, a transformers model; give an "
                "encoder of ours, or leave it and ctc_exit out"
            )
    else:
        encoder = load_encoder(source, device)
        if parts.new_ctc_head:
            encoder = _with_tokens_of(encoder, decoder.config, seed)
        own = encoder.config
    config = SpeechLMConfig(
        own, parts.projector, decoder.config, parts.heads, parts.prompt, parts.ctc_exit
    )
    model = SpeechLM(config, PromptTokens.of(config, tokenizer), encoder, decoder)
    if parts.ctc_exit is not None and not parts.new_ctc_head:
        written = _ctc_tokens(source, encoder.config.blank_id, reader)
        remedy = "set new_ctc_head (for an encoder of ours), or leave ctc_exit out"
        check_same_tokens(written, source, tokenizer, folder, remedy)
    model.projector.init_weights(seed)
    model.to(device).requires_grad_(False).eval()
    return SpeechLMCheckpoint(model, tokenizer, reader)


def check_same_tokens(
    tokens: Sequence[str], encoder: Path, tokenizer: TextTokenizer, decoder: Path, remedy: str
) -> None:
    """ConfigError, with the remedy, unless what the decoder in a folder writes are the `tokens` of
    the encoder in another, id by id."""
    if list(tokens) != tokenizer.pieces():
        raise ConfigError(
            f"the decoder in {decoder} writes other tokens than those of the encoder in {encoder}; "
            f"{remedy}"
        )


def _ctc_tokens(folder: Path, blank_id: int, reader: PretrainedReader | None) -> list[str]:
    """What the CTC of the encoder in `folder` writes, by id, but for the blank."""
    if reader is None:
        pieces = TextTokenizer.load(folder / "tokenizer.json").pieces()
    else:
        theirs = reader.tokenizer
        pieces = theirs.convert_ids_to_tokens(list(range(len(theirs))))
    return [piece for i, piece in enumerate(pieces) if i != blank_id]


def _with_tokens_of(encoder: CTCEncoder, decoder: DecoderConfig, seed: int) -> CTCEncoder:
    """`encoder` with all that depends on its vocabulary new, for the decoder's tokens and a blank
    behind them."""
    V = decoder.vocab_size
    made = CTCEncoder(replace(encoder.config, vocab_size=V + 1, blank_id=V))
    made.init_weights(seed)
    own = {n: x for n, x in made.state_dict().items() if n.startswith(("heads.", "feedback."))}
    made.load_state_dict(encoder.state_dict() | own)
    return made.to(encoder.device)


def _stored_parts(model: SpeechLM) -> nn.ModuleDict:
    """The parts whose weights lie in model.safetensors, by name: all but a transformers encoder."""
    return nn.ModuleDict(
        {
            name: part
            for name, part in model.named_children()
            if not isinstance(part, PretrainedCTCEncoder)
        }
    )


def _lay_out(part: nn.Module) -> None:
    for p in part.parameters():
        p.data = lay_out(p.data)
