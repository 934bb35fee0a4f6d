"""The shape of a decoder tower, as a frozen dataclass, and strict loading of JSON into dataclasses.

Standard library only, so that reading a configuration never imports torch. The translation
from and to Hugging Face's `config.json` is in `models/hub.py`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from offramp.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling of rotary positions (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        check_positive(
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
        )
        check_counts(1, original_max_positions=self.original_max_positions)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor is {self.high_freq_factor}; it must be greater than "
                f"low_freq_factor, {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder tower of the Llama family (Llama, Mistral, Qwen2, Qwen3); sizes in units of 1."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_counts(1, **{n: getattr(self, n) for n in (*sizes, "d_ff", "max_positions")})
        check_positive(rope_theta=self.rope_theta, norm_eps=self.norm_eps)
        for name in ("tied_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.sliding_window is not None:
            check_counts(1, sliding_window=self.sliding_window)
        if self.bos_id is not None:
            check_counts(0, bos_id=self.bos_id)
        if not isinstance(self.eos_ids, tuple):
            raise ConfigError(f"eos_ids is {self.eos_ids!r}; it must be a list of token ids")
        for eos in self.eos_ids:
            check_counts(0, eos_ids=eos)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ConfigError(
                f"rope_scaling is {self.rope_scaling!r}; it must be a RopeScaling or None"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; each key/value head must serve as many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Strict: an unknown or missing key is an error that names it."""
        values = dict(values)
        if isinstance(values.get("rope_scaling"), Mapping):
            values["rope_scaling"] = strict(RopeScaling, values["rope_scaling"])
        if isinstance(values.get("eos_ids"), list):
            values["eos_ids"] = tuple(values["eos_ids"])
        return strict(cls, values)


def check_counts(least: int, **values: Any) -> None:
    """ConfigError, by name, unless all `values` are whole numbers of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def check_positive(**values: Any) -> None:
    """ConfigError, by name, unless all `values` are finite numbers greater than 0."""
    for name, value in values.items():
        if not _is_finite(value) or not value > 0:
            raise ConfigError(f"{name} is {value!r}; it must be a number greater than 0")


def check_range(least: float, below: float = math.inf, **values: Any) -> None:
    """ConfigError, by name, unless all `values` are finite numbers in [least, below)."""
    for name, value in values.items():
        if not _is_finite(value) or not least <= value < below:
            limit = "" if below == math.inf else f" and less than {below}"
            raise ConfigError(
                f"{name} is {value!r}; it must be a number of at least {least}{limit}"
            )


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # not so for NaN


def strict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build dataclass `cls` from `values`; ConfigError names unknown and missing keys."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            f"{cls.__name__} has no setting {', '.join(unknown)}; allowed: {', '.join(fields)}"
        )
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}; add it to the settings")
    return cls(**values)
