"""Transducers survive the disk unchanged; damaged folders are refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_transducer
from offramp.errors import CheckpointError
from offramp.models.transducer_checkpoint import (
    load_transducer,
    load_transducer_config,
    save_transducer,
)
from toy_encoder import features
from toy_transducer import VARIANTS, transducer


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_what_is_loaded_equals_what_was_saved(changes: Any, tmp_path: Path) -> None:
    """The statistics of the features too."""
    model = transducer(**changes)
    save_transducer(model, tmp_path / "m")
    loaded = load_transducer(tmp_path / "m")
    assert loaded.config == load_transducer_config(tmp_path / "m") == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(loaded.encoder(*features([41]))[0], model.encoder(*features([41]))[0])


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    save_transducer(transducer(), tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert load_transducer(tmp_path).dtype == torch.float32
    double = load_transducer(tmp_path, dtype=torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}


def test_further_files_lie_beside_and_go_with_the_checkpoint(tmp_path: Path) -> None:
    save_transducer(transducer(), tmp_path / "m", files={"features.json": "{}\n"})
    assert (tmp_path / "m" / "features.json").read_text() == "{}\n"
    save_transducer(transducer(), tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds files and is no checkpoint"):
        save_transducer(transducer(), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "weights cut": (
        lambda f: os.truncate(f / "model.safetensors", 9_000),
        "truncated or corrupt",
    ),
    "another model": (change_config(model_type="offramp-ctc"), "type 'offramp-ctc', not 'offramp-"),
    "a setting unknown": (change_config(depth=3), "TransducerConfig has no setting depth"),
    "a setting impossible": (change_config(num_heads=3), "config.json: d_model 16 is not a multi"),
    "another width": (change_config(d_ff=32), r"has shape \[24, 16\], config.json says \[32, 16\]"),
    "fewer layers": (change_config(num_layers=2), "that config.json does not expl"),
    "no statistics": (
        change_tensors(lambda t: t.pop("encoder.feature_norm.mean")),
        "lacks the tensor encoder.feature_norm.mean",
    ),
    "a tensor too many": (
        change_tensors(lambda t: t.update(extra=torch.zeros(1))),
        "holds 1 tensors that .*first: extra",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    damage, says = DAMAGE[kind]
    save_transducer(transducer(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_transducer(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_config_alone_tells_the_model(tmp_path: Path) -> None:
    save_transducer(transducer(**VARIANTS["all together"]), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    expected = toy_transducer.config(**VARIANTS["all together"])
    assert load_transducer_config(tmp_path) == expected
