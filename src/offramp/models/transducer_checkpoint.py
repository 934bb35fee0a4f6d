"""Transducers in and out: a folder with config.json, model.safetensors and what belongs to them.

Tokenizer and feature settings are further files of the folder; the caller writes and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from offramp.config import TransducerConfig
from offramp.models.hub import TRANSDUCER_TYPE, described, fill, write_model
from offramp.models.transducer import Transducer
from offramp.nn.unfilled import unfilled


def load_transducer_config(folder: Path) -> TransducerConfig:
    """The model that `folder`/config.json describes; CheckpointError: it describes none."""
    wanted = "the folder of a transducer, such as a streaming recipe writes"
    return described(folder, TRANSDUCER_TYPE, TransducerConfig.from_dict, wanted)


def load_transducer(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transducer:
    """The model in `folder`, every tensor checked by name and shape; frozen, in eval mode."""
    with unfilled():
        model = Transducer(load_transducer_config(folder))
    fill(model, folder, device, dtype)
    return model


def save_transducer(
    model: Transducer,
    folder: Path,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_transducer` reads; whole or not at all.

    dtype: of the stored weights (default: as they are); int8: matrices of 8 bits, for half the
    bytes of float16 (`stored.py`). files: name -> text of further files, such as the tokenizer's;
    an existing checkpoint is replaced with all of its files.
    """
    config = {"model_type": TRANSDUCER_TYPE, **asdict(model.config)}
    write_model(model, folder, config, dtype, files)
