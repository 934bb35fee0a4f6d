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
from offramp.config import DecoderConfig, RopeScaling
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


def test_reading_settings_imports_no_torch() -> None:
    """`offramp --help` is fast because of it."""
    code = "import sys, offramp.config, offramp.errors, offramp.energy.trace; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "offramp.config" in loaded
    assert not {"torch", "numpy", "tokenizers", "safetensors"} & set(loaded)
