"""A compressed model is loaded where a plain one is; what is neither is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
import toy_encoder
import toy_transducer
from offramp.compress.checkpoint import companions, load_model, save_compressed
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.low_rank import LowRank
from offramp.compress.quantize import WeightQuantization
from offramp.errors import CheckpointError, InputError
from offramp.models import hub
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import save_encoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.transducer import Transducer
from offramp.models.transducer_checkpoint import save_transducer
from offramp.nn.cache import KVCache
from offramp.tokenizer import train_bpe
from toy_compress import outputs

KINDS: dict[str, tuple[Any, Callable[[], Any], Callable[..., None]]] = {
    "decoder": (DecoderLM, toy.decoder, hub.save_decoder),
    "ctc": (CTCEncoder, toy_encoder.encoder, save_encoder),
    "transducer": (Transducer, toy_transducer.transducer, save_transducer),
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_or_compressed(kind: str, tmp_path: Path) -> None:
    cls, make, save = KINDS[kind]
    model = make()
    small = WeightQuantization(8).apply(model)
    save(model, tmp_path / "plain")
    save_compressed(small, tmp_path / "small")
    for expected, folder in ((model, "plain"), (small, "small")):
        loaded = load_model(cls, tmp_path / folder)
        assert type(loaded) is cls and loaded.config == model.config and not loaded.training
        torch.testing.assert_close(outputs(loaded), outputs(expected))
    for other in KINDS:
        if other != kind:
            with pytest.raises(CheckpointError, match=f"a compressed {cls.__name__}, not a ") as no:
                load_model(KINDS[other][0], tmp_path / "small")
            assert "\n" not in str(no.value)


def test_a_compressed_decoder_is_described_and_not_trained_on(tmp_path: Path) -> None:
    model = toy.decoder(tied_embeddings=True, eos_ids=(3, 1))
    save_compressed(model, tmp_path / "m")
    assert hub.load_config(tmp_path / "m") == model.config
    with pytest.raises(CheckpointError, match="holds a compressed model, which is ready for use"):
        hub.load_decoder(tmp_path / "m")
    save_compressed(toy_encoder.encoder(), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"a speech recogniser, .* to offramp transcribe"):
        hub.load_config(tmp_path / "m")


def test_only_what_is_quantised_keeps_its_dtype(tmp_path: Path) -> None:
    small = LowRank(0.5).apply(FeedForwardPruning(0.5).apply(toy.decoder()))
    save_compressed(small, tmp_path / "m")
    half = load_model(DecoderLM, tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.dtype == torch.bfloat16
    ids, cache = toy.tokens(2, 7), KVCache(half.config, 2, 7, dtype=torch.bfloat16)
    heard, exact = toy.run(half, ids, cache).float(), toy.run(small, ids)
    assert float((heard - exact).norm()) < 0.03 * float(exact.norm())
    save_compressed(WeightQuantization(8).apply(small, ["layers.1"]), tmp_path / "m")
    assert load_model(DecoderLM, tmp_path / "m").dtype == torch.float32
    with pytest.raises(InputError, match=r"dtype is torch.bfloat16, and .*m is quantised"):
        load_model(DecoderLM, tmp_path / "m", dtype=torch.bfloat16)


def test_matrices_of_a_decoder_lie_as_a_plain_one_has_them(tmp_path: Path) -> None:
    save_compressed(FeedForwardPruning(0.5).apply(toy.decoder()), tmp_path / "m")
    tall = load_model(DecoderLM, tmp_path / "m").layers[0].feed_forward.gate_up.weight
    assert tall.shape == (48, 32) and tall.stride() == (1, 48)


def test_what_goes_with_a_compressed_copy(tmp_path: Path) -> None:
    tokenizer, defaults = train_bpe(["a rose is a rose"], 270, []), hub.DraftDefaults(2, 4)
    files = {"calibration.json": "{}", "README.md": "of the original"}
    hub.save_decoder(toy.decoder(), tmp_path / "m", tokenizer, defaults, files=files)
    found = companions(tmp_path / "m")
    assert set(found) == {"tokenizer.json", "tokenizer_config.json", "offramp.json"}
    save_compressed(WeightQuantization(8).apply(toy.decoder()), tmp_path / "small", found)
    assert hub.load_defaults(tmp_path / "small") == defaults
    for name in found:
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
