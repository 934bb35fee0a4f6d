"""Encoders and transducers survive the disk unchanged; damage is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import toy_encoder
import toy_transducer
from damage import Damage, tensors
from offramp.errors import CheckpointError, InputError
from offramp.models.ctc_checkpoint import load_encoder, load_encoder_config, save_encoder
from offramp.models.transducer_checkpoint import (
    load_transducer,
    load_transducer_config,
    save_transducer,
)
from thinned import thinned
from toy_encoder import every_exit, features


class Kind(NamedTuple):
    """make(seed, **changes) -> a toy; outputs: all that it computes."""

    make: Callable[..., Any]
    save: Callable[..., None]
    load: Callable[..., Any]
    load_config: Callable[[Path], Any]
    outputs: Callable[[Any], list[Tensor]]
    options: dict[str, Any]


KINDS = {
    "ctc": Kind(
        toy_encoder.encoder,
        save_encoder,
        load_encoder,
        load_encoder_config,
        lambda model: [*every_exit(model, *features([61, 40]))[0].values()],
        toy_encoder.OURS,
    ),
    "transducer": Kind(
        toy_transducer.transducer,
        save_transducer,
        load_transducer,
        load_transducer_config,
        lambda model: [model.encoder(*features([41]))[0]],
        toy_transducer.VARIANTS["all together"],
    ),
}
VARIANTS = {
    f"{kind}, {name}": (KINDS[kind], changes)
    for kind, toy in (("ctc", toy_encoder), ("transducer", toy_transducer))
    for name, changes in toy.VARIANTS.items()
}
KEPT = [f"ctc, {name}" for name in toy_encoder.KEPT]
KEPT += [f"transducer, {name}" for name in toy_transducer.KEPT]
of_both = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("variant", thinned(VARIANTS, KEPT))
def test_what_is_loaded_equals_what_was_saved(variant: tuple[Kind, Any], tmp_path: Path) -> None:
    """Statistics too, which are no parameters."""
    kind, changes = variant
    model = kind.make(**changes)
    kind.save(model, tmp_path / "m")
    loaded = kind.load(tmp_path / "m")
    assert loaded.config == kind.load_config(tmp_path / "m") == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert all(map(torch.equal, kind.outputs(loaded), kind.outputs(model)))


@of_both
def test_weights_are_stored_in_the_dtype_asked_for(kind: Kind, tmp_path: Path) -> None:
    """All but the count of a batch norm."""

    def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x for name, x in state.items() if "num_batches" not in name}

    model = kind.make()
    kind.save(model, tmp_path, dtype=torch.float16)
    stored = floats(load_file(tmp_path / "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = kind.load(tmp_path)
    assert loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
    double = floats(kind.load(tmp_path, dtype=torch.float64).state_dict())
    assert {tensor.dtype for tensor in double.values()} == {torch.float64}


@of_both
def test_further_files_lie_beside_and_go_with_the_checkpoint(kind: Kind, tmp_path: Path) -> None:
    kind.save(kind.make(), tmp_path / "m", files={"features.json": "{}\n"})
    assert (tmp_path / "m" / "features.json").read_text() == "{}\n"
    kind.save(kind.make(), tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["m"]


@of_both
def test_a_failed_save_leaves_the_old_checkpoint(kind: Kind, tmp_path: Path) -> None:
    kind.save(kind.make(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*m"):
        kind.save(kind.make(seed=1), tmp_path / "m", files={"no/such/folder.txt": ""})
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


@of_both
def test_a_folder_of_other_files_is_not_replaced(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds files and is no checkpoint"):
        kind.save(kind.make(), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


# -- damage --------------------------------------------------------------------------------------


def config(**changes: Any) -> Damage:
    """The value "gone" takes a setting away."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))

    return change


def cut(name: str, keep: float) -> Damage:
    def truncate(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return truncate


OF_BOTH: dict[str, tuple[Damage, str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "empty weights": (cut("model.safetensors", 0), "truncated or corrupt"),
    "weights cut in the header": (cut("model.safetensors", 0.02), "truncated or corrupt"),
    "weights cut in the middle": (cut("model.safetensors", 0.5), "truncated or corrupt"),
    "weights cut at the end": (cut("model.safetensors", 0.999), "truncated or corrupt"),
    "config cut": (cut("config.json", 0.5), "is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "a language model": (config(model_type="llama"), "type 'llama', not 'offramp-.*; choose the f"),
    "no type": (config(model_type="gone"), "type None, not 'offramp-"),
    "a setting gone": (config(d_model="gone"), "config.json: .*Config lacks d_model"),
    "a setting unknown": (config(depth=3), "config.json: .*Config has no setting depth"),
    "a setting impossible": (config(num_heads=3), "config.json: d_model 16 is not a multiple of"),
    "another width": (config(d_ff=32), r"has shape \[24, 16\], config.json says \[32, 16\]"),
    "a tensor too many": (
        tensors(lambda t: t.update(extra=torch.zeros(1))),
        "holds 1 tensors that .*first: extra",
    ),
}
OF_ONE: dict[str, dict[str, tuple[Damage, str]]] = {
    "ctc": {
        "another model": (config(model_type="offramp-transducer"), "transducer', not 'offramp-ctc"),
        "fewer layers": (config(num_layers=3, exits=[2, 3]), "that config.json does not expl"),
        "more layers": (config(num_layers=6, exits=[2, 3, 6]), "lacks the tensor layers.5"),
        "a tensor gone": (tensors(lambda t: t.pop("heads.0.bias")), "lacks the tensor heads.0.b"),
    },
    "transducer": {
        "another model": (config(model_type="offramp-ctc"), "ctc', not 'offramp-transducer"),
        "fewer layers": (config(num_layers=2), "that config.json does not expl"),
        "more layers": (config(num_layers=4), "lacks the tensor encoder.layers.3"),
        "no statistics": (
            tensors(lambda t: t.pop("encoder.feature_norm.mean")),
            "lacks the tensor encoder.feature_norm.mean",
        ),
    },
}
DAMAGE = [
    pytest.param(KINDS[kind], *damage, id=f"{kind}, {name}")
    for kind, own in OF_ONE.items()
    for name, damage in (OF_BOTH | own).items()
]


@pytest.mark.parametrize(("kind", "damage", "says"), DAMAGE)
def test_damage_is_refused_in_one_line(
    kind: Kind, damage: Damage, says: str, tmp_path: Path
) -> None:
    kind.save(kind.make(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says) as refused:
        kind.load(tmp_path)
    assert "\n" not in str(refused.value)


@of_both
def test_the_config_alone_tells_the_model(kind: Kind, tmp_path: Path) -> None:
    model = kind.make(**kind.options)
    kind.save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert kind.load_config(tmp_path) == model.config
