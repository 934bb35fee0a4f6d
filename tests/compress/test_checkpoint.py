"""Damaged folders of compressed models are refused in one line; a failed save changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import damage
from offramp.compress.checkpoint import load_compressed, save_compressed
from offramp.compress.heads import HeadPruning
from offramp.compress.magnitude import MagnitudePruning
from offramp.compress.quantize import WeightQuantization
from offramp.errors import CheckpointError, InputError
from offramp.models.ctc_checkpoint import load_encoder, save_encoder
from toy_compress import MODELS

pytestmark = pytest.mark.slow  # the default suite is to stay short

QKV = "layers.0.attention.qkv"


def compressed() -> Any:
    model = HeadPruning(0.5).apply(MODELS["ctc, ours"]())
    return WeightQuantization(4).apply(MagnitudePruning(0.7).apply(model))


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return rewrite


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut": (cut, "truncated or corrupt"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "another kind of folder": (
        lambda f: save_encoder(MODELS["ctc, ours"](), f),
        "type 'offramp-ctc', not 'offramp-compressed'; choose a folder that offramp compress wrote",
    ),
    "no such kind": (change_config(lambda v: v.update(kind="rnn")), "kind is 'rnn'; allowed: dec"),
    "no modules": (change_config(lambda v: v.pop("modules")), "config.json: KeyError, 'modules'"),
    "a setting unknown": (change_config(lambda v: v["config"].update(x=1)), "no setting x"),
    "a module too many": (
        change_config(lambda v: v["modules"].update({"layers.9.x": {"kind": "linear"}})),
        "cannot build the module 'layers.9.x'",
    ),
    "a module of no kind": (
        change_config(lambda v: v["modules"][QKV].update(kind="magic")),
        f"cannot build the module '{QKV}'",
    ),
    "a module lacks a size": (
        change_config(lambda v: v["modules"][QKV]["linear"].pop("bits")),
        "cannot build the module .*bits",
    ),
    "a module of other bits": (
        change_config(lambda v: v["modules"][QKV]["linear"].update(bits=5)),
        "bits is 5; allowed: 4, 8",
    ),
    "a module of another size": (
        change_config(lambda v: v["modules"][QKV]["linear"].update(out_features=20)),
        "cannot be unpacked|the files are not of one checkpoint",
    ),
    "no such layout": (
        change_config(lambda v: next(iter(v["packed"].values())).update(layout="zip")),
        "layout is 'zip'; allowed: dense, half, bitmap, blocks",
    ),
    "packed, but no tensor": (
        change_config(lambda v: v["packed"].update(ghost={"layout": "dense", "bits": 8})),
        "tensors that config.json does not explain .*ghost",
    ),
    "packing of a list": (change_config(lambda v: v.update(packed=[1])), "config.json: .*anew"),
    "a tensor gone": (
        damage.tensors(lambda t: t.pop(f"{QKV}.linear.codes.values")),
        "lacks the tensor .*codes.values",
    ),
    "a tensor too many": (damage.tensors(lambda t: t.update(x=torch.ones(1))), "first: x"),
    "an index of another size": (
        damage.tensors(lambda t: t.update({f"{QKV}.linear.codes.index": torch.zeros(3).byte()})),
        "codes cannot be unpacked, its index does not fit",
    ),
    "scales of another kind": (
        damage.tensors(lambda t: t.update({f"{QKV}.linear.scales.values": torch.ones(24).int()})),
        "scales cannot be unpacked, it is half, and of torch.int32",
    ),
    "channels that are not there": (
        damage.tensors(lambda t: t[f"{QKV}.outputs"].add_(40)),
        f"{QKV} keeps channels that are not among its 48",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    damage, says = DAMAGE[kind]
    save_compressed(compressed(), tmp_path)
    assert load_compressed(tmp_path).config == MODELS["ctc, ours"]().config
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_compressed(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_ordinary_loader_refuses_it(tmp_path: Path) -> None:
    save_compressed(compressed(), tmp_path)
    with pytest.raises(CheckpointError, match="type 'offramp-compressed', not 'offramp-ctc'"):
        load_encoder(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_compressed(compressed(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*m"):
        save_compressed(MODELS["ctc, ours"](), tmp_path / "m", {"no/such/folder.txt": ""})
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds files and is no checkpoint"):
        save_compressed(compressed(), tmp_path)


def test_other_models_are_not_stored(tmp_path: Path) -> None:
    model = compressed()
    model.layers[0].attention.qkv = torch.nn.Identity()
    with pytest.raises(InputError, match="cannot store a Identity"):
        save_compressed(model, tmp_path / "m")
    with pytest.raises(InputError, match="compressed Linear; allowed: DecoderLM, CTCEnc"):
        save_compressed(torch.nn.Linear(2, 2), tmp_path / "m")  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()
