"""Settings are read strictly: what is unknown, missing or impossible is named."""

from __future__ import annotations

import dataclasses
import json
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
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toy.config(**changes)


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
