"""Speech-LM settings are read strictly: what is unknown, missing or does not fit is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import toy_speech_lm
from offramp.config_speech_lm import HeadsConfig, ProjectorConfig, SpeechLMConfig
from offramp.errors import ConfigError
from toy_speech_lm import V


@pytest.mark.parametrize("changes", toy_speech_lm.VARIANTS.values(), ids=toy_speech_lm.VARIANTS)
def test_settings_survive_json(changes: dict[str, Any]) -> None:
    config = toy_speech_lm.config(**changes)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert SpeechLMConfig.from_dict(values) == config


def test_a_transformers_encoder_is_not_described() -> None:
    config = dataclasses.replace(toy_speech_lm.config(), encoder=None, ctc_exit=7)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert values["encoder"] is None
    assert SpeechLMConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "what is said?"}, r"prompt is 'what is said\?'; it must have {audio} once"),
        ({"prompt": "{audio}{audio}"}, "it must have {audio} once"),
        ({"prompt": 3}, "prompt is 3; it must have"),
        ({"decoder": {"bos_id": None}}, "has no bos_id to start the text with; let text follow"),
        ({"decoder": {"eos_ids": ()}}, "the decoder has no eos_ids; name the token"),
        ({"heads": HeadsConfig(draft_vocab=V + 1)}, "draft_vocab is 62; the decoder has 61"),
        ({"heads": 4}, "heads are 4; they must be a HeadsConfig or None"),
        ({"projector": {"stack": 2}}, "projector is {'stack': 2}; it must be a ProjectorConfig"),
        (
            {"projector": ProjectorConfig(1, 8, "ctc")},
            "the projector is of kind ctc, and no CTC writes the decoder's tokens; set ctc_exit",
        ),
        ({"ctc_exit": 0}, "ctc_exit is 0; it must be a whole number of at least 1"),
        ({"ctc_exit": 4}, "ctc_exit is 4; the encoder has the exits 2, 3, 5"),
        (
            {"ctc_exit": 3, "encoder": {"vocab_size": V, "blank_id": V - 1}},
            "CTC head has 61 tokens, blank 60; to draft it must have the decoder's 61 tokens and a",
        ),
        ({"ctc_exit": 3, "encoder": {"blank_id": 0}}, "has 62 tokens, blank 0; to draft it must"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toy_speech_lm.config(**changes)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_parts_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is 'asr-tiny'; it must be an? \w+Config"):
        dataclasses.replace(toy_speech_lm.config(), **{name: "asr-tiny"})


def test_text_behind_the_audio_needs_no_bos_and_any_vocabulary_may_listen() -> None:
    toy_speech_lm.config(prompt="{audio} w3", decoder={"bos_id": None})
    assert toy_speech_lm.config(encoder={"vocab_size": 9, "blank_id": 0}).ctc_exit is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ProjectorConfig(0, 8), "stack is 0; it must be a whole number of at least 1"),
        (lambda: ProjectorConfig(2, 0), "d_hidden is 0"),
        (lambda: ProjectorConfig(2, 8, "ctc"), "stack is 2, and a projector of kind ctc goes by"),
        (lambda: ProjectorConfig(1, 8, "mel"), "kind is 'mel'; allowed: stack, ctc"),  # type: ignore[arg-type]
        (lambda: HeadsConfig(1), "count is 1; it must be a whole number of at least 2"),
        (lambda: HeadsConfig(kind="medusa"), "kind is 'medusa'; allowed: latent, independent"),  # type: ignore[arg-type]
        (lambda: HeadsConfig(draft_vocab=0), "draft_vocab is 0"),
    ],
    ids=["stack", "hidden layer", "tokens", "kind of projector", "count", "kind", "draft_vocab"],
)
def test_impossible_parts_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_wrong_key_is_named() -> None:
    values = dataclasses.asdict(toy_speech_lm.config(heads=HeadsConfig()))
    with pytest.raises(ConfigError, match="HeadsConfig has no setting depth"):
        SpeechLMConfig.from_dict(values | {"heads": {"depth": 3}})
    with pytest.raises(ConfigError, match="ProjectorConfig lacks d_hidden"):
        SpeechLMConfig.from_dict(values | {"projector": {"stack": 3}})
    with pytest.raises(ConfigError, match="SpeechLMConfig lacks decoder"):
        SpeechLMConfig.from_dict({k: v for k, v in values.items() if k != "decoder"})
