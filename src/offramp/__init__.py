"""Offramp: language and speech models that stop computing as soon as they can, and lose nothing.

Names are loaded when first used, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offramp.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    OfframpError,
    TrainingError,
)

if TYPE_CHECKING:
    from offramp.api import DraftOptions, Model, load
    from offramp.decoding.sampling import Sampling
    from offramp.decoding.stopping import Stop
    from offramp.results import DecodeStats, Generation, Step

__version__ = "0.1.0"

_HOMES = {
    "load": "offramp.api",
    "Model": "offramp.api",
    "DraftOptions": "offramp.api",
    "Sampling": "offramp.decoding.sampling",
    "Stop": "offramp.decoding.stopping",
    "DecodeStats": "offramp.results",
    "Generation": "offramp.results",
    "Step": "offramp.results",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecodeStats",
    "DraftOptions",
    "Generation",
    "InputError",
    "Model",
    "OfframpError",
    "Sampling",
    "Step",
    "Stop",
    "TrainingError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
