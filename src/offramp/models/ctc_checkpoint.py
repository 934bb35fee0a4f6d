"""CTC encoders in and out: a folder with config.json, model.safetensors and what belongs to them.

Tokenizer and feature settings are further files of the folder; the caller writes and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from offramp.config import EncoderConfig
from offramp.errors import CheckpointError, ConfigError
from offramp.models.ctc import CTCEncoder
from offramp.models.hub import (
    ENCODER_TYPE,
    check_target,
    read_json,
    read_tensors,
    refuse_unexplained,
    take,
    write_checkpoint,
)


def load_encoder_config(folder: Path) -> EncoderConfig:
    """The encoder that `folder`/config.json describes; CheckpointError: it describes none."""
    path = folder / "config.json"
    values = read_json(path)
    kind = values.pop("model_type", None)
    if kind != ENCODER_TYPE:
        raise CheckpointError(
            f"{path} describes a model of type {kind!r}, not {ENCODER_TYPE!r}; "
            "choose the folder of a CTC encoder, such as a speech recipe writes"
        )
    try:
        return EncoderConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; fetch the checkpoint anew") from error


def load_encoder(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CTCEncoder:
    """The encoder in `folder`, every tensor checked by name and shape; frozen, in eval mode."""
    with torch.device("meta"):
        model = CTCEncoder(load_encoder_config(folder))
    stored = dict(read_tensors(folder))
    state = {}
    for name, wanted in model.state_dict().items():
        tensor = take(stored, name, wanted.shape, folder)
        kind = dtype if wanted.is_floating_point() else wanted.dtype
        state[name] = tensor.to(device=device, dtype=kind)
    refuse_unexplained(folder, sorted(stored))
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    return model.eval()


def save_encoder(
    model: CTCEncoder,
    folder: Path,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_encoder` reads; whole or not at all.

    dtype: of the stored weights (default: as they are). files: name -> text of further files,
    such as the tokenizer's; an existing checkpoint is replaced with all of its files.
    """
    check_target(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", kind).contiguous().clone()
    config = {"model_type": ENCODER_TYPE, **asdict(model.config)}
    write_checkpoint(folder, tensors, config, files or {})
