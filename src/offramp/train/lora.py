"""LoRA: a decoder learns by low-rank updates, and its own weights stay (arXiv 2106.09685).

peft puts the updates in and adds them to the weights at the end, so that what a training hands out
is an ordinary decoder. It is an optional package and slow to import: only a training that asks for
updates needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from offramp.config import check_choice, check_counts, check_positive, check_range
from offramp.errors import ConfigError
from offramp.models.speech_lm import TextDecoder

TARGETS = ("qkv", "output", "gate_up", "down")  # the linear layers of `nn.layers.DecoderLayer`


@dataclass(frozen=True)
class LoRA:
    """The settings: a linear layer W becomes W + alpha / rank * B A, A [rank, in], B [out, rank].

    targets: which of `TARGETS`, in every layer of the decoder: those of the attention, of which
    query, key and value are one, or of the feed-forward. dropout: of what A reads, in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("qkv", "output")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_counts(1, rank=self.rank)
        check_positive(alpha=self.alpha)
        check_range(0, 1, dropout=self.dropout)
        if not self.targets:
            raise ConfigError(f"targets is empty; give some of {', '.join(TARGETS)}")
        for target in self.targets:
            check_choice(targets=(target, TARGETS))


@contextmanager
def low_rank(decoder: TextDecoder, lora: LoRA, seed: int) -> Iterator[None]:
    """Inside, only the updates of `decoder` learn; afterwards they are part of its weights.

    They begin at zero, with A drawn from `seed`. ConfigError: peft is missing.
    """
    peft = load_peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=lora.dropout,
    )
    device = decoder.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        updates = peft.LoraModel(decoder, config, "default")
    try:
        yield
    finally:
        updates.merge_and_unload()


def load_peft() -> Any:
    """The package; ConfigError: it is missing."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            "lora needs peft; install it with pip install 'offramp[hf]', or leave lora out"
        ) from error
