"""Every method on every model: it runs, is smaller, counts its bytes and survives the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offramp.compress.checkpoint import load_compressed, save_compressed
from offramp.compress.method import CompressionMethod
from offramp.compress.packing import stored_size
from offramp.compress.quantize import WeightQuantization
from toy_compress import LEVELLED, METHODS, MODELS, outputs

pytestmark = pytest.mark.slow  # the default suite is to stay short

# What changes nothing when it is done a second time.
IDEMPOTENT = {name for name in METHODS if name not in ("rows", "heads", "feed-forward")}


def check_stored(model: Any, folder: Path) -> None:
    """The file holds as many bytes as are counted, and what is loaded equals what was saved."""
    save_compressed(model, folder)
    weights = folder / "model.safetensors"
    contents = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size == contents + stored_size(model).nbytes
    loaded = load_compressed(folder)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(outputs(loaded), outputs(model))
    assert stored_size(loaded) == stored_size(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_model(name: str, kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = METHODS[name](model)
    smaller = method.apply(model)
    assert all(map(torch.equal, model.state_dict().values(), before.values())), "a copy"
    was, now = outputs(model), outputs(smaller)
    assert now.shape == was.shape and now.isfinite().all()
    assert not torch.equal(now, was)
    assert stored_size(smaller).nbytes < stored_size(model).nbytes
    check_stored(smaller, tmp_path / "m")
    if name in IDEMPOTENT:
        if name.startswith("Adam") or "global" in name:
            again = METHODS[name](smaller).apply(smaller)
        else:
            again = method.apply(smaller)
        states = (again.state_dict(), smaller.state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(map(torch.equal, *(state.values() for state in states)))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LEVELLED)
def test_level_0_changes_nothing(name: str, kind: str) -> None:
    model = MODELS[kind]()
    same = LEVELLED[name](model, 0.0).apply(model)
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, same.state_dict().values(), model.state_dict().values()))
    assert stored_size(same) == stored_size(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LEVELLED)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_method_can_be_quantised_after(
    name: str, kind: str, bits: int, tmp_path: Path
) -> None:
    model = MODELS[kind]()
    smaller = LEVELLED[name](model, 0.6).apply(model)
    both = WeightQuantization(bits).apply(smaller)
    assert stored_size(both).nbytes < stored_size(smaller).nbytes
    assert outputs(both).isfinite().all()
    check_stored(both, tmp_path / "m")


@pytest.mark.parametrize("name", METHODS)
def test_only_the_chosen_components_change(name: str) -> None:
    model = MODELS["transducer, published"]()
    chosen = ["encoder.layers.1", "joiner"]
    smaller = METHODS[name](model).apply(model, chosen)
    theirs, changed = smaller.state_dict(), set()
    for key, tensor in model.state_dict().items():
        if key not in theirs or not torch.equal(theirs[key], tensor):
            changed.add(".".join(key.split(".")[:3]) if key.startswith("encoder") else key[:6])
    assert changed <= {"encoder.layers.1", "joiner"}
    assert "encoder.layers.1" in changed
    sizes = [stored_size(m) for m in (model, smaller)]
    was, now = (size.of(chosen).nbytes for size in sizes)
    assert now < was
    assert sizes[0].nbytes - sizes[1].nbytes == was - now


def test_components_that_are_not_there_are_refused() -> None:
    model = MODELS["transducer, published"]()
    for wrong in ("joner", "encoder.layers.9", "", "joiner.tokens.weight"):
        with pytest.raises(Exception, match=r"has no component '.*one of encoder, pred"):
            WeightQuantization().apply(model, [wrong])


def test_a_component_is_no_prefix_of_its_neighbours() -> None:
    model = MODELS["decoder, tied"]()
    model.layers.extend(MODELS["decoder, tied"]().layers)
    model.layers.append(model.layers[0])
    pruned = METHODS["magnitude"](model).apply(model, ["layers.1"])
    zeros = {
        name.split(".")[1]
        for name, p in pruned.named_parameters()
        if name.startswith("layers") and bool((p == 0).any())
    }
    assert zeros == {"1"}


def test_settings_that_cannot_be_are_refused() -> None:
    model = MODELS["ctc, ours"]()
    for make in LEVELLED.values():
        for level in (-0.1, 1.0, float("nan")):
            with pytest.raises(Exception, match=r"level is .*; it must be a number of at least 0"):
                make(model, level)
    with pytest.raises(Exception, match="bits is 3; allowed: 4, 8"):
        WeightQuantization(3)
    with pytest.raises(Exception, match="activations is 'int4'; allowed: int8, bfloat16"):
        WeightQuantization(8, "int4")


def test_what_is_quantised_is_pruned_no_more() -> None:
    model = MODELS["ctc, ours"]()
    done = WeightQuantization(8).apply(model, ["layers.0"])
    for make in LEVELLED.values():
        with pytest.raises(Exception, match="is quantised; prune and factorise first"):
            make(model, 0.5).apply(done)
        assert make(model, 0.5).apply(done, ["layers.1"]) is not done
    with pytest.raises(Exception, match="quantised already, otherwise"):
        WeightQuantization(4).apply(done)
    assert WeightQuantization(8).apply(done).layers[1].attention.qkv.bits == 8


def test_a_method_is_told_apart_by_its_settings() -> None:
    methods: list[CompressionMethod] = [METHODS[name](nn.Linear(1, 1)) for name in METHODS]
    assert all((a == b) == (i == j) for i, a in enumerate(methods) for j, b in enumerate(methods))


def test_a_checkpoint_names_what_differs_and_nothing_else(tmp_path: Path) -> None:
    model = METHODS["feed-forward"](MODELS["ctc, ours"]()).apply(
        MODELS["ctc, ours"](), ["layers.0.first_feed_forward"]
    )
    save_compressed(model, tmp_path / "m", {"note.txt": "kept"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["modules"] == {
        "layers.0.first_feed_forward.up": {
            "kind": "linear",
            "in_features": 16,
            "out_features": 12,
            "bias": True,
        },
        "layers.0.first_feed_forward.down": {
            "kind": "linear",
            "in_features": 12,
            "out_features": 16,
            "bias": True,
        },
    }
    assert config["packed"] == {}
    assert (tmp_path / "m" / "note.txt").read_text() == "kept"
