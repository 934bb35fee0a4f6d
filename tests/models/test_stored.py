"""Weights of 8 bits in a file: near, half as large, and to the bit what they were when read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toy
import toy_encoder
import toy_speech_lm
import toy_transducer
from offramp.config import EncoderConfig
from offramp.config_speech_lm import HeadsConfig
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.models import hub
from offramp.models.ctc_checkpoint import load_encoder, save_encoder
from offramp.models.fingerprint import fingerprint
from offramp.models.speech_lm_checkpoint import SpeechLMCheckpoint, load_speech_lm
from offramp.models.stored import CODES, SCALES, encode, quantize, take_weights
from offramp.models.transducer_checkpoint import load_transducer, save_transducer
from toy_encoder import every_exit, features

WEIGHTS = "model.safetensors"


def wild(rows: int, columns: int = 6, seed: int = 0) -> Tensor:
    """Random rows, of sizes that reach from 1e-30 to 1e30; every seventh is zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(rows, 1).uniform_(-30, 30, generator=generator)
    x = torch.randn(rows, columns, generator=generator) * sizes
    x[::7] = 0.0
    return x


def read(stored: dict[str, Tensor], shape: tuple[int, ...], name: str = "w") -> Tensor:
    return take_weights(dict(stored), name, shape, Path("folder"))


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_off_by_half_a_scale_of_their_row_at_most(bits: int, kind: torch.dtype) -> None:
    """And the scale is no larger than it must be: the largest code of a row is the largest."""
    x = wild(20_000)
    codes, scales = quantize(x, bits, kind)
    assert scales.dtype == kind
    exact, steps = x.double(), scales.double()[:, None]
    assert bool(((codes * steps - exact).abs() <= steps / 2 * (1 + 1e-6)).all())
    top = 2 ** (bits - 1) - 1
    assert torch.equal(codes.abs().amax(1), torch.where(x.any(1), top, 0))


def test_rows_of_zeros_and_of_the_smallest_numbers_are_zero() -> None:
    x = torch.tensor([0.0, 1e-45, -1e-40, 1e-37])[:, None].expand(4, 300)
    codes, scales = quantize(x, 8, torch.bfloat16)
    assert not codes.any() and scales.tolist() == [1.0] * 4
    assert not read(encode({"w": x}), (4, 300)).any()


@pytest.mark.parametrize("shape", [(900, 30), (600, 1, 15), (100, 4, 1, 8)], ids=str)
def test_what_was_read_is_written_to_the_bit(shape: tuple[int, ...]) -> None:
    x = wild(shape[0], torch.Size(shape).numel() // shape[0]).view(shape)
    first = encode({"w": x})
    assert {name: t.dtype for name, t in first.items()} == {
        "w" + CODES: torch.int8,
        "w" + SCALES: torch.bfloat16,
    }
    found = read(first, shape)
    assert found.dtype == torch.float32 and found.is_contiguous()
    again = encode({"w": found})
    assert all(torch.equal(first[name], t) for name, t in again.items())
    assert list(again) == list(first)


def test_what_saves_nothing_is_stored_in_half_precision_and_counts_as_they_are() -> None:
    tensors = {
        "matrix": torch.randn(200, 300),
        "two columns": torch.randn(300, 2),
        "few numbers": torch.randn(9, 9),
        "vector": torch.randn(300),
        "none": torch.zeros(0, 5),
        "count": torch.tensor(7),
    }
    stored = encode(tensors)
    assert sum(t.nbytes for n, t in stored.items() if n.startswith("matrix")) == 200 * 302
    for name in ("two columns", "few numbers", "vector", "none"):
        assert torch.equal(stored[name], tensors[name].half())
    assert stored["count"] is tensors["count"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(40, 40), (40,)], ids=str)
def test_numbers_that_are_not_finite_are_refused(shape: tuple[int, ...], bad: float) -> None:
    x = torch.ones(shape)
    x[3] = bad
    with pytest.raises(InputError, match=r"^layer.bias cannot be stored in int8, it .*not finite"):
        encode({"layer.bias": x})


def test_vectors_too_large_for_half_precision_are_refused() -> None:
    assert bool(read(encode({"w": torch.full((40, 40), 1e9)}), (40, 40)).isfinite().all())
    with pytest.raises(InputError, match=r"not finite in torch.float16; go back .*float32$"):
        encode({"bias": torch.full((40,), 1e9)})


# -- checkpoints ---------------------------------------------------------------------------------


class Kind(NamedTuple):
    """outputs: of what `load` returns, all that matter."""

    make: Callable[[], Any]
    save: Callable[[Any, Path, torch.dtype], None]
    load: Callable[..., Any]
    model: Callable[[Any], nn.Module]
    outputs: Callable[[Any], list[Tensor]]


def _speech_lm_outputs(made: SpeechLMCheckpoint) -> list[Tensor]:
    heard = made.model.hear(*features(toy_speech_lm.LENGTHS))
    return [*heard.audio, *heard.exits.values(), made.model.read(heard, toy_speech_lm.TEXTS)]


KINDS = {
    "ctc": Kind(
        lambda: toy_encoder.encoder(branches=(2, 5)),  # with the counts of its batch norms
        save_encoder,
        load_encoder,
        lambda model: model,
        lambda model: [*every_exit(model, *features([61, 40]))[0].values()],
    ),
    "transducer": Kind(
        lambda: toy_transducer.transducer(**toy_transducer.VARIANTS["published"]),
        save_transducer,
        load_transducer,
        lambda model: model,
        lambda model: [model.encoder(*features([41]))[0], model.encoder(*features([90]))[0]],
    ),
    "speech lm": Kind(
        lambda: toy_speech_lm.checkpoint(heads=HeadsConfig()),
        SpeechLMCheckpoint.save,
        load_speech_lm,
        lambda made: made.model,
        _speech_lm_outputs,
    ),
}
of_all = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@of_all
def test_a_model_of_8_bits_is_read_as_any_other(kind: Kind, tmp_path: Path) -> None:
    """Its weights are off by half a scale at most, and so its outputs are near."""
    made = kind.make()
    kind.save(made, tmp_path, torch.int8)
    loaded = kind.load(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    state = kind.model(loaded).state_dict()
    wanted = kind.model(made).state_dict()
    assert list(state) == list(wanted)
    assert not any(p.requires_grad for p in kind.model(loaded).parameters())
    in_codes = 0
    for name, x in wanted.items():
        assert state[name].dtype == x.dtype
        error = (state[name] - x).abs()
        if name + CODES in stored:
            steps = stored[name + SCALES].float().view(-1, *[1] * (x.ndim - 1))
            assert bool((error <= steps / 2 * 1.0001).all())
            in_codes += x.numel()
        else:
            torch.testing.assert_close(state[name], x, rtol=1e-3, atol=1e-6)
    assert in_codes > 0.7 * sum(x.numel() for x in wanted.values())
    for ours, exact in zip(kind.outputs(loaded), kind.outputs(made), strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 0.04
    double = kind.model(kind.load(tmp_path, dtype=torch.float64))
    assert all(torch.equal(x, state[n].to(x.dtype)) for n, x in double.state_dict().items())


@of_all
def test_a_model_that_was_read_is_written_to_the_bit(kind: Kind, tmp_path: Path) -> None:
    kind.save(kind.make(), tmp_path / "a", torch.int8)
    kind.save(kind.load(tmp_path / "a"), tmp_path / "b", torch.int8)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()} >= {"config.json", WEIGHTS}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_file_is_little_more_than_half_of_one_in_half_precision(tmp_path: Path) -> None:
    model = toy_encoder.encoder(d_model=64, d_ff=256)
    sizes = []
    for dtype in (torch.int8, torch.float16):
        save_encoder(model, tmp_path, dtype)
        sizes.append((tmp_path / WEIGHTS).stat().st_size)
    assert sizes[0] < 0.58 * sizes[1]


def test_config_json_says_how_weights_are_stored(tmp_path: Path) -> None:
    """Who knows nothing of it refuses it as a setting that there is not."""
    model = toy_encoder.encoder()
    path = tmp_path / "config.json"
    save_encoder(model, tmp_path, torch.float16)
    assert "stored" not in json.loads(path.read_text())
    save_encoder(model, tmp_path, torch.int8)
    values = json.loads(path.read_text())
    assert values["stored"] == "int8" and load_encoder(tmp_path).config == model.config
    del values["model_type"]
    with pytest.raises(ConfigError, match="EncoderConfig has no setting stored"):
        EncoderConfig.from_dict(values)


def test_what_tells_weights_apart_works_on_them(tmp_path: Path) -> None:
    model = toy_transducer.transducer()
    for name, dtype in {"a": torch.int8, "b": torch.int8, "half": torch.float16}.items():
        save_transducer(model, tmp_path / name, dtype)
    files = {name: hub.weights_sha256(tmp_path / name) for name in ("a", "b", "half")}
    models = {name: fingerprint(load_transducer(tmp_path / name)) for name in files}
    assert files["a"] == files["b"] != files["half"]
    assert models["a"] == models["b"] != models["half"]


def test_a_model_that_cannot_be_stored_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_encoder(toy_encoder.encoder(), tmp_path / "m")
    before = (tmp_path / "m" / WEIGHTS).read_bytes()
    bad = toy_encoder.encoder(seed=1)
    bad.get_parameter("layers.0.first_feed_forward.up.weight")[3, 2] = torch.nan
    with pytest.raises(InputError, match=r"layers.0.first_feed_forward.up.weight cannot be stored"):
        save_encoder(bad, tmp_path / "m", torch.int8)
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_decoder_is_stored_as_transformers_reads_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be stored in torch.int8, .*give float16"):
        hub.save_decoder(toy.decoder(), tmp_path / "m", dtype=torch.int8)
    assert not list(tmp_path.iterdir())


# -- damage --------------------------------------------------------------------------------------

NAME = "layers.0.first_feed_forward.up.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(NAME + SCALES), rf"lacks the tensor {NAME}.scales"),
    "no codes": (lambda t: t.pop(NAME + CODES), rf"lacks the tensor {NAME}; the"),
    "a scale too few": (
        lambda t: t.update({NAME + SCALES: t[NAME + SCALES][1:].clone()}),
        rf"{NAME}.scales has shape \[23\], config.json says \[24\]",
    ),
    "a scale NaN": (lambda t: t[NAME + SCALES][2:].fill_(torch.nan), rf"{NAME} must have .*finite"),
    "a scale infinite": (lambda t: t[NAME + SCALES][:1].fill_(torch.inf), "finite scales above"),
    "a scale zero": (lambda t: t[NAME + SCALES][:1].zero_(), "finite scales above zero"),
    "a scale negative": (lambda t: t[NAME + SCALES].neg_(), "finite scales above zero; fetch"),
    "codes of another kind": (
        lambda t: t.update({NAME + CODES: t[NAME + CODES].float()}),
        f"{NAME} must have int8 codes",
    ),
    "codes of another shape": (
        lambda t: t.update({NAME + CODES: t[NAME + CODES][:, 1:].clone()}),
        rf"{NAME}.codes has shape \[24, 15\], config.json says \[24, 16\]",
    ),
    "the matrix once more": (
        lambda t: t.update({NAME: t[NAME + CODES].float()}),
        f"holds 1 tensors that config.json does not explain .first: {NAME}",
    ),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_in_one_line(
    damage: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    save_encoder(toy_encoder.encoder(), tmp_path, torch.int8)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_encoder(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_stored_as_a_later_version_does_are_refused(tmp_path: Path) -> None:
    save_encoder(toy_encoder.encoder(), tmp_path, torch.int8)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"int8"', '"int4"'))
    with pytest.raises(
        CheckpointError, match="stored as 'int4'; this version reads int8 and plain"
    ):
        load_encoder(tmp_path)
