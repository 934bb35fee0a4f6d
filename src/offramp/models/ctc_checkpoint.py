"""CTC encoders in and out: a folder with config.json, model.safetensors and what belongs to them.

Tokenizer and feature settings are further files of the folder; the caller writes and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from offramp.config import EncoderConfig
from offramp.models.ctc import CTCEncoder
from offramp.models.hub import ENCODER_TYPE, described, fill, write_model
from offramp.nn.unfilled import unfilled


def load_encoder_config(folder: Path) -> EncoderConfig:
    """The encoder that `folder`/config.json describes; CheckpointError: it describes none."""
    wanted = "the folder of a CTC encoder, such as a speech recipe writes"
    return described(folder, ENCODER_TYPE, EncoderConfig.from_dict, wanted)


def load_encoder(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CTCEncoder:
    """The encoder in `folder`, every tensor checked by name and shape; frozen, in eval mode."""
    with unfilled():
        model = CTCEncoder(load_encoder_config(folder))
    fill(model, folder, device, dtype)
    return model


def save_encoder(
    model: CTCEncoder,
    folder: Path,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_encoder` reads; whole or not at all.

    dtype: of the stored weights (default: as they are); int8: matrices of 8 bits, for half the
    bytes of float16 (`stored.py`). files: name -> text of further files, such as the tokenizer's;
    an existing checkpoint is replaced with all of its files.
    """
    config = {"model_type": ENCODER_TYPE, **asdict(model.config)}
    write_model(model, folder, config, dtype, files)
