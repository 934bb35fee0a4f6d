"""Offramp: language and speech models that stop computing as soon as they can, and lose nothing.

Names are loaded when first used, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offramp.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    OfframpError,
    TrainingError,
)

if TYPE_CHECKING:
    from offramp.api import DraftOptions, Model, load, stream, transcribe
    from offramp.decoding.sampling import Sampling
    from offramp.decoding.speech_lm import SpeechLMOptions
    from offramp.decoding.stopping import Stop
    from offramp.decoding.stream_plan import StreamOptions
    from offramp.recognizer import Recognizer, TranscribeOptions
    from offramp.results import DecodeStats, Generation, Step, Transcript
    from offramp.speech_lm_recognizer import SpeechLMRecognizer
    from offramp.stream_events import Endpoint, Final, Partial
    from offramp.streaming import StreamingRecognizer

__version__ = "0.1.0"

_HOMES = {
    "load": "offramp.api",
    "transcribe": "offramp.api",
    "stream": "offramp.api",
    "Model": "offramp.api",
    "DraftOptions": "offramp.api",
    "Sampling": "offramp.decoding.sampling",
    "Stop": "offramp.decoding.stopping",
    "DecodeStats": "offramp.results",
    "Generation": "offramp.results",
    "Step": "offramp.results",
    "Transcript": "offramp.results",
    "Recognizer": "offramp.recognizer",
    "TranscribeOptions": "offramp.recognizer",
    "SpeechLMRecognizer": "offramp.speech_lm_recognizer",
    "SpeechLMOptions": "offramp.decoding.speech_lm",
    "StreamingRecognizer": "offramp.streaming",
    "StreamOptions": "offramp.decoding.stream_plan",
    "Partial": "offramp.stream_events",
    "Final": "offramp.stream_events",
    "Endpoint": "offramp.stream_events",
}

__all__ = [
    "AudioError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecodeStats",
    "DraftOptions",
    "Endpoint",
    "Final",
    "Generation",
    "InputError",
    "Model",
    "OfframpError",
    "Partial",
    "Recognizer",
    "Sampling",
    "SpeechLMOptions",
    "SpeechLMRecognizer",
    "Step",
    "Stop",
    "StreamOptions",
    "StreamingRecognizer",
    "TrainingError",
    "TranscribeOptions",
    "Transcript",
    "load",
    "stream",
    "transcribe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
