"""Encoders survive the disk unchanged; damaged folders are refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_encoder
from offramp.errors import CheckpointError, InputError
from offramp.models.ctc_checkpoint import load_encoder, load_encoder_config, save_encoder
from toy_encoder import OURS, VARIANTS, encoder, every_exit, features


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_what_is_loaded_equals_what_was_saved(changes: Any, tmp_path: Path) -> None:
    model = encoder(**changes)
    save_encoder(model, tmp_path / "m")
    loaded = load_encoder(tmp_path / "m")
    assert loaded.config == load_encoder_config(tmp_path / "m") == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    batch = features([61, 40])
    for a, b in zip(*(every_exit(m, *batch)[0].values() for m in (model, loaded)), strict=True):
        assert torch.equal(a, b)


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = encoder(**{**OURS, "conv_norm": "batch"})
    save_encoder(model, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    kinds = {tensor.dtype for name, tensor in stored.items() if "num_batches" not in name}
    assert kinds == {torch.float16}
    loaded = load_encoder(tmp_path)
    assert loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


def test_further_files_lie_beside_and_go_with_the_checkpoint(tmp_path: Path) -> None:
    save_encoder(encoder(), tmp_path / "m", files={"features.json": "{}\n"})
    assert (tmp_path / "m" / "features.json").read_text() == "{}\n"
    save_encoder(encoder(), tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_encoder(encoder(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*m"):
        save_encoder(encoder(seed=1), tmp_path / "m", files={"no/such/folder.txt": ""})
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds files and is no checkpoint"):
        save_encoder(encoder(), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return truncate


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "empty weights": (cut("model.safetensors", 0), "truncated or corrupt"),
    "weights cut in the header": (cut("model.safetensors", 0.02), "truncated or corrupt"),
    "weights cut in the middle": (cut("model.safetensors", 0.5), "truncated or corrupt"),
    "weights cut at the end": (cut("model.safetensors", 0.999), "truncated or corrupt"),
    "config cut": (cut("config.json", 0.5), "is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "another model": (change_config(model_type="llama"), "type 'llama', not 'offramp-ctc'"),
    "no type": (change_config(model_type="gone"), "type None, not 'offramp-ctc'"),
    "a setting gone": (change_config(d_model="gone"), "config.json: EncoderConfig lacks d_model"),
    "a setting unknown": (change_config(depth=3), "EncoderConfig has no setting depth"),
    "a setting impossible": (change_config(num_heads=3), "d_model 16 is not a multiple of"),
    "another width": (change_config(d_ff=32), r"has shape \[24, 16\], config.json says \[32, 16\]"),
    "fewer layers": (change_config(num_layers=3, exits=[2, 3]), "that config.json does not expl"),
    "more layers": (change_config(num_layers=6, exits=[2, 3, 6]), "lacks the tensor layers.5"),
    "a tensor gone": (change_tensors(lambda t: t.pop("heads.0.bias")), "lacks the tensor heads.0"),
    "a tensor too many": (
        change_tensors(lambda t: t.update(extra=torch.zeros(1))),
        "holds 1 tensors that .*first: extra",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    damage, says = DAMAGE[kind]
    save_encoder(encoder(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_encoder(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_config_alone_tells_the_model(tmp_path: Path) -> None:
    save_encoder(encoder(**OURS), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert load_encoder_config(tmp_path) == toy_encoder.config(**OURS)
