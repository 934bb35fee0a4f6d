"""The tokens of a CTC encoder of ours for a decoder, and the encoder with the decoder's tokens.

A decoder that is to write behind an encoder, and learns from text before there is one, gets the
encoder's own tokens: so its texts and those of the encoder's CTC are spelled alike.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from offramp.config import DecoderConfig
from offramp.errors import ConfigError
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import load_encoder_config
from offramp.tokenizer import BOS, EOS, TextTokenizer

_NEVER = -20.0  # logit of tokens that no transcript has


def encoder_tokens(folder: Path) -> TextTokenizer:
    """The tokens of the encoder in `folder`, for a decoder."""
    pieces = TextTokenizer.load(folder / "tokenizer.json")
    return decoder_tokenizer(pieces, load_encoder_config(folder).blank_id)


def decoder_tokenizer(pieces: TextTokenizer, blank_id: int) -> TextTokenizer:
    """The tokens of a CTC encoder for a decoder: without the blank, then BOS and EOS."""
    described = json.loads(pieces.to_json())
    kept = [piece for i, piece in enumerate(pieces.pieces()) if i != blank_id]
    vocab = {piece: i for i, piece in enumerate([*kept, BOS, EOS])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described["model"]["vocab"] = vocab
    described["added_tokens"] = [
        {"id": vocab[token], "content": token, **flags, "special": True} for token in (BOS, EOS)
    ]
    return TextTokenizer(Tokenizer.from_str(json.dumps(described)))


def check_decoder(decoder: DecoderConfig, tokenizer: TextTokenizer, folder: Path) -> None:
    """ConfigError: `decoder` is not for `tokenizer`, the tokens of the encoder in `folder`."""
    size = tokenizer.vocab_size
    needed = {"vocab_size": size, "bos_id": size - 2, "eos_ids": (size - 1,)}
    for name, value in needed.items():
        if getattr(decoder, name) != value:
            raise ConfigError(
                f"decoder.{name} is {getattr(decoder, name)}; for the tokens of the encoder "
                f"in {folder} it must be {value}"
            )


def relabelled(encoder: CTCEncoder, old: TextTokenizer, new: TextTokenizer) -> CTCEncoder:
    """`encoder` with the tokens of `new` and a blank behind them, where it had those of `old`.

    A token of both keeps its weights, so the encoder writes what it wrote.
    """
    V, config = new.vocab_size, encoder.config
    found = [old.token_id(piece) for piece in new.pieces()] + [config.blank_id]
    known = torch.tensor([row is not None for row in found])
    rows = torch.tensor([row or 0 for row in found])
    made = CTCEncoder(replace(config, vocab_size=V + 1, blank_id=V)).to(encoder.device)
    state = encoder.state_dict()
    for name, tensor in state.items():
        if name.startswith("heads."):
            never = _NEVER if name.endswith("bias") else 0.0
            state[name] = _take(tensor, rows, known, never)
        elif name == "feedback.weight":
            state[name] = _take(tensor.t(), rows, known, 0.0).t()
    made.load_state_dict(state)
    return made


def _take(tensor: Tensor, rows: Tensor, known: Tensor, other: float) -> Tensor:
    """`rows` of `tensor`, `other` in those that are not known."""
    taken, known = tensor[rows.to(tensor.device)], known.to(tensor.device)
    return taken.masked_fill(~known.view(-1, *[1] * (tensor.ndim - 1)), other)
