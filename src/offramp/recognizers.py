"""Which kind of recogniser a folder holds, a CTC encoder or a Speech-LM: asked here alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from offramp.audio.io import Source
from offramp.decoding.speech_lm import SpeechLMOptions
from offramp.errors import InputError
from offramp.models import hub
from offramp.models.hf_speech_lm import is_audio_lm
from offramp.recognizer import Recognizer, TranscribeOptions
from offramp.speech_lm_recognizer import SpeechLMRecognizer
from offramp.transcription import Transcription

AnyOptions = TranscribeOptions | SpeechLMOptions


def is_speech_lm(model: str | Path) -> bool:
    """Whether `model` (a shipped name, a folder or a hub id) is a Speech-LM, ours or transformers'.

    CheckpointError: it is an audio language model of a kind that is not supported.
    """
    folder = hub.resolve(str(model))
    kind = hub.read_json(folder / "config.json").get("model_type")
    return kind == hub.SPEECH_LM_TYPE or is_audio_lm(folder)


def options_for(model: str | Path, given: Mapping[str, Any]) -> AnyOptions:
    """Options by name, of the kind that `model` takes. InputError: one is of no use to it."""
    speech_lm = is_speech_lm(model)
    kind = SpeechLMOptions if speech_lm else TranscribeOptions
    known = [field.name for field in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        what = "a Speech-LM" if speech_lm else "a CTC recogniser"
        raise InputError(f"{unknown[0]} is of no use to {model}, {what}; leave it out")
    return kind(**given)


def transcriber(
    model: str | Path, options: AnyOptions | None = None, device: str = "cpu"
) -> Callable[[Source], Transcription]:
    """What transcribes with `model`, one recording at a time.

    InputError: the options are those of the other kind of recogniser, or do not suit `model`.
    """
    if is_speech_lm(model):
        ours = SpeechLMOptions() if options is None else options
        if not isinstance(ours, SpeechLMOptions):
            raise InputError(f"{model} is a Speech-LM, which takes SpeechLMOptions; give those")
        listening = SpeechLMRecognizer.load(model, device=device)
        listening.plan(ours)
        return partial(listening.stream, options=ours)
    theirs = TranscribeOptions() if options is None else options
    if not isinstance(theirs, TranscribeOptions):
        raise InputError(f"{model} is no Speech-LM, and takes TranscribeOptions; give those")
    recognizer = Recognizer.load(model, device=device)
    recognizer.plan(theirs)
    return partial(recognizer.stream, options=theirs)
