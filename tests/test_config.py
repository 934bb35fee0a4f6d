"""Settings are read strictly: what is unknown, missing or impossible is named."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest

import toy
import toy_encoder
from offramp.config import DecoderConfig, EncoderConfig, RopeScaling
from offramp.errors import ConfigError

SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "changes",
    [*toy.VARIANTS.values(), {"rope_scaling": SCALING, "eos_ids": (1, 2), "bos_id": 0}],
    ids=[*toy.VARIANTS, "rope scaling, stop tokens"],
)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    config = toy.config(**changes)
    assert DecoderConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number of at least 1"),
        ({"d_model": 32.0}, "d_model is 32.0"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_heads": 5}, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
        ({"num_layers": True}, "num_layers is True"),
        ({"rope_theta": math.nan}, "rope_theta is nan; it must be a number greater than 0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"norm_eps": "1"}, "norm_eps is '1'"),
        ({"tied_embeddings": 1}, "tied_embeddings is 1; it must be true or false"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"bos_id": -1}, "bos_id is -1; it must be a whole number of at least 0"),
        ({"eos_ids": 1}, "eos_ids is 1; it must be a list of token ids"),
        ({"eos_ids": (1, "2")}, "eos_ids is '2'"),
        ({"rope_scaling": 5}, "rope_scaling is 5; it must be a RopeScaling or None"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toy.config(**changes)


def test_impossible_rope_scaling_is_refused() -> None:
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        for value in (None, 0.0, math.nan, math.inf):
            with pytest.raises(ConfigError, match=f"{name} is {value}; it must be a number"):
                dataclasses.replace(SCALING, **{name: value})
    with pytest.raises(ConfigError, match=r"original_max_positions is 1\.5"):
        dataclasses.replace(SCALING, original_max_positions=1.5)
    with pytest.raises(ConfigError, match=r"high_freq_factor is 1\.0; it must be greater"):
        dataclasses.replace(SCALING, high_freq_factor=1.0)


def test_unknown_and_missing_settings_are_named() -> None:
    values = dataclasses.asdict(toy.config())
    with pytest.raises(ConfigError, match="DecoderConfig has no setting depth, width; allowed: v"):
        DecoderConfig.from_dict({**values, "width": 3, "depth": 1})
    del values["d_ff"], values["num_heads"]
    with pytest.raises(ConfigError, match="DecoderConfig lacks num_heads, d_ff; add it"):
        DecoderConfig.from_dict(values)
    with pytest.raises(ConfigError, match="RopeScaling lacks low_freq_factor"):
        DecoderConfig.from_dict({**values, "rope_scaling": {"factor": 8.0}})


@pytest.mark.parametrize("changes", toy_encoder.VARIANTS.values(), ids=toy_encoder.VARIANTS)
def test_encoder_settings_survive_json(changes: dict[str, Any]) -> None:
    config = toy_encoder.config(**changes)
    assert EncoderConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number of at least 1"),
        ({"vocab_size": 1}, "vocab_size is 1; it must be a whole number of at least 2"),
        ({"d_model": 24, "num_heads": 8}, "d_model 24 is not a multiple of twice num_heads 8"),
        ({"kernel_size": 4}, "kernel_size is 4; it must be odd"),
        ({"blank_id": 11}, "blank_id is 11; it must be less than vocab_size, 11"),
        ({"blank_id": -1}, "blank_id is -1"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a number of at least 0 and less than 1"),
        ({"subsampling": 3}, "subsampling is 3; allowed: 2, 4, 8"),
        ({"subsampling": 4.0}, "subsampling is 4.0; allowed: 2, 4, 8"),
        ({"subsampling_activation": "relu"}, "'relu'; allowed: none, silu"),
        ({"positions": "relative"}, "positions is 'relative'; allowed: absolute, rotary"),
        ({"conv_norm": "group"}, "conv_norm is 'group'; allowed: batch, layer"),
        ({"shared_head": 1}, "shared_head is 1; allowed: False, True"),
        ({"feedback": True}, "feedback needs the exits to share one head; set shared_head too"),
        ({"exits": 5}, "exits is 5; it must be a list of layers"),
        ({"exits": ()}, r"exits are \(\); the last must be 5"),
        ({"exits": (2, 4)}, r"exits are \(2, 4\); the last must be 5"),
        ({"exits": (2, 6)}, r"exits are \(2, 6\); the last must be 5"),
        ({"exits": (3, 2, 5)}, "list each layer once, in rising order"),
        ({"exits": (2, 2, 5)}, "list each layer once, in rising order"),
        ({"exits": (0, 5)}, "exits is 0; it must be a whole number of at least 1"),
        ({"branches": (2, 4)}, r"branches name the layers \[4\], which are not in exits"),
        ({"branch_factor": 0}, "branch_factor is 0"),
        ({"branch_pool": "mean"}, "branch_pool is 'mean'; allowed: first, learned"),
        ({"branch_pool": "learned", "branch_factor": 1}, "there is nothing to pool"),
        ({"branch_scale": -0.5}, "branch_scale is -0.5; it must be a number of at least 0"),
        ({"branch_scale": math.nan}, "branch_scale is nan"),
    ],
    ids=str,
)
def test_impossible_encoders_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toy_encoder.config(**changes)


def test_unknown_and_missing_encoder_settings_are_named() -> None:
    values = dataclasses.asdict(toy_encoder.config())
    with pytest.raises(ConfigError, match="EncoderConfig has no setting depth; allowed: d_model"):
        EncoderConfig.from_dict({**values, "depth": 1})
    del values["exits"]
    with pytest.raises(ConfigError, match="EncoderConfig lacks exits"):
        EncoderConfig.from_dict(values)


def test_an_encoder_knows_its_frames_and_spans() -> None:
    config = toy_encoder.config()
    assert [config.output_frames(n) for n in (0, 6, 7, 10, 11, 1500)] == [0, 0, 1, 1, 2, 374]
    assert toy_encoder.config(subsampling=2).output_frames(1500) == 749
    assert [toy_encoder.config(subsampling=8).output_frames(n) for n in (14, 15)] == [0, 1]
    assert [config.span_start(e) for e in (2, 3, 5)] == [0, 2, 3]
    assert config.head_dim == 8


def test_reading_settings_imports_no_torch() -> None:
    """`offramp --help` is fast because of it."""
    code = "import sys, offramp.config, offramp.errors, offramp.energy.cost; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "offramp.config" in loaded
    assert not {"torch", "numpy", "tokenizers", "safetensors"} & set(loaded)
