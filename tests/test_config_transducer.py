"""Transducer settings are read strictly: what is unknown, missing or impossible is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import toy_transducer
from offramp.config import Chunking, TransducerConfig
from offramp.errors import ConfigError


@pytest.mark.parametrize("changes", toy_transducer.VARIANTS.values(), ids=toy_transducer.VARIANTS)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    config = toy_transducer.config(**changes)
    assert TransducerConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number of at least 1"),
        ({"d_joint": 2.0}, r"d_joint is 2\.0"),
        ({"vocab_size": 1}, "vocab_size is 1; it must be a whole number of at least 2"),
        ({"kernel_size": -1}, "kernel_size is -1; it must be a whole number of at least 0"),
        ({"blank_id": 11}, "blank_id is 11; it must be less than vocab_size, 11"),
        ({"blank_id": -1}, "blank_id is -1"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"predictor": "gru"}, "predictor is 'gru'; allowed: lstm, stateless"),
        ({"predictor_layers": 0}, "predictor_layers is 0"),
        ({"predictor_context": 0}, "predictor_context is 0"),
        ({"positions": "absolute"}, "positions is 'absolute'; allowed: none, rotary"),
        ({"factorised_blank": 1}, "factorised_blank is 1; allowed: False, True"),
        ({"ctc_head": None}, "ctc_head is None; allowed: False, True"),
        ({"time_reduction": 3}, "d_model 16 is not a multiple of time_reduction 3"),
        ({"subsampling": "conv"}, "subsampling is 'conv'; allowed: stack, halving"),
        ({"subsampling": "halving", "time_reduction": 6}, "time_reduction is 6; .* 2, 4, 8"),
        ({"subsampling": "halving", "time_reduction": 1}, "time_reduction is 1; .* 2, 4, 8"),
        ({"num_heads": 3}, "d_model 16 is not a multiple of 3: num_heads 3"),
        ({"num_heads": 16, "positions": "rotary"}, "d_model 16 is not a multiple of 32: num_he"),
        ({"predictor": "stateless", "d_predictor": 6}, "d_predictor is 6; .* a multiple of 4"),
        ({"chunking": 4}, "chunking is 4; it must be a Chunking"),
        ({"blank_skip": 0.9}, "blank_skip is 0.9; it must be .* needs factorised_blank"),
        ({"blank_skip": 1.1, "factorised_blank": True}, "blank_skip is 1.1; it must be at most 1"),
        ({"blank_skip": 0, "factorised_blank": True}, "blank_skip is 0; it must be a number gre"),
    ],
    ids=str,
)
def test_impossible_transducers_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toy_transducer.config(**changes)


@pytest.mark.parametrize("name", ["chunk", "left_context", "right_context", "memory"])
def test_impossible_chunks_are_refused(name: str) -> None:
    sizes = {"chunk": 4, "left_context": 2}
    assert Chunking(**sizes).frames == 4
    for value in (-1, None, 1.0):
        with pytest.raises(ConfigError, match=f"{name} is {value}; it must be a whole number"):
            Chunking(**{**sizes, name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="chunk is 0"):
        Chunking(0, 4)


def test_unknown_and_missing_settings_are_named() -> None:
    values = dataclasses.asdict(toy_transducer.config())
    with pytest.raises(ConfigError, match="TransducerConfig has no setting depth; allowed: d_m"):
        TransducerConfig.from_dict({**values, "depth": 1})
    with pytest.raises(ConfigError, match="Chunking lacks left_context"):
        TransducerConfig.from_dict({**values, "chunking": {"chunk": 1}})
    del values["chunking"]
    with pytest.raises(ConfigError, match="TransducerConfig lacks chunking"):
        TransducerConfig.from_dict(values)


def test_no_feature_frame_is_lost() -> None:
    config = toy_transducer.config(time_reduction=4)
    assert [config.output_frames(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
