"""The shapes of towers, as frozen dataclasses, and strict loading of JSON into dataclasses.

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


@dataclass(frozen=True)
class EncoderConfig:
    """A CTC encoder of Conformer layers with exits; sizes in units of 1, layers counted from 1.

    The defaults are the published early-exit Conformer's (arXiv 2309.09546); every option below
    changes one thing, so that an ablation can take it out.

    exits: the layers with an exit, rising; the last is `num_layers`. subsampling: feature frames
    per output frame (2, 4 or 8). pad_edges: zeros around the features, or up to 2 (subsampling - 1)
    of their frames are lost. subsampling_activation: `none` or `silu`. positions: `absolute`
    (sinusoids, added once) or `rotary`. conv_norm: inside the convolution module, `batch` or
    `layer`. shared_head: one norm and one head for all exits. feedback: every exit's posteriors
    return into the tower (SC-CTC, arXiv 2104.02724); needs `shared_head`.

    branches: the exits whose layers have a parallel branch of one layer (Splitformer, arXiv
    2506.18035). branch_factor: frames per branch frame (1: full rate). branch_pool: `first` frame
    of each group, or a `learned` weighted mean. branch_scale: where a learned scale of the
    branch's output starts; None: added as it is.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    kernel_size: int
    vocab_size: int
    exits: tuple[int, ...]
    num_mels: int = 80
    blank_id: int = 0
    dropout: float = 0.0
    subsampling: int = 4
    pad_edges: bool = False
    subsampling_activation: str = "none"
    positions: str = "absolute"
    conv_norm: str = "batch"
    shared_head: bool = False
    feedback: bool = False
    branches: tuple[int, ...] = ()
    branch_factor: int = 2
    branch_pool: str = "first"
    branch_scale: float | None = None

    def __post_init__(self) -> None:
        sizes = ("d_model", "num_layers", "num_heads", "d_ff", "kernel_size", "num_mels")
        check_counts(1, **{n: getattr(self, n) for n in (*sizes, "branch_factor")})
        check_counts(2, vocab_size=self.vocab_size)
        check_range(0, 1, dropout=self.dropout)
        check_choice(
            subsampling=(self.subsampling, (2, 4, 8)),
            subsampling_activation=(self.subsampling_activation, ("none", "silu")),
            positions=(self.positions, ("absolute", "rotary")),
            conv_norm=(self.conv_norm, ("batch", "layer")),
            pad_edges=(self.pad_edges, (False, True)),
            shared_head=(self.shared_head, (False, True)),
            feedback=(self.feedback, (False, True)),
            branch_pool=(self.branch_pool, ("first", "learned")),
        )
        self._check_shapes()
        self._check_exits()

    def _check_shapes(self) -> None:
        if self.d_model % (2 * self.num_heads):
            raise ConfigError(
                f"d_model {self.d_model} is not a multiple of twice num_heads {self.num_heads}; "
                "each head needs an even number of channels"
            )
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"kernel_size is {self.kernel_size}; it must be odd, with a frame in the middle"
            )
        check_blank(self.blank_id, self.vocab_size)

    def _check_exits(self) -> None:
        for name, layers in (("exits", self.exits), ("branches", self.branches)):
            if not isinstance(layers, tuple):
                raise ConfigError(f"{name} is {layers!r}; it must be a list of layers")
            for layer in layers:
                check_counts(1, **{name: layer})
            if list(layers) != sorted(set(layers)):
                raise ConfigError(f"{name} are {layers}; list each layer once, in rising order")
        if not self.exits or self.exits[-1] != self.num_layers:
            raise ConfigError(
                f"exits are {self.exits}; the last must be {self.num_layers}, the number of layers"
            )
        if other := sorted(set(self.branches) - set(self.exits)):
            raise ConfigError(f"branches name the layers {other}, which are not in exits")
        if self.feedback and not self.shared_head:
            raise ConfigError("feedback needs the exits to share one head; set shared_head too")
        if self.branch_scale is not None:
            check_range(0, branch_scale=self.branch_scale)
        if self.branch_pool == "learned" and self.branch_factor == 1:
            raise ConfigError(
                "branch_pool is learned with branch_factor 1; there is nothing to pool"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def subsampling_layers(self) -> int:
        """Convolutions of stride 2 in front of the tower."""
        return self.subsampling.bit_length() - 1

    @property
    def edge_frames(self) -> int:
        """Zero frames before the features, and after them: ceil(T / subsampling) come out."""
        return self.subsampling - 1 if self.pad_edges else 0

    @property
    def least_frames(self) -> int:
        """Feature frames that the shortest utterance has."""
        return 1 if self.pad_edges else 2 * self.subsampling - 1

    def output_frames(self, num_frames: int) -> int:
        """Frames of the tower for `num_frames` feature frames; 0: too short for the convolutions.

        Each convolution has kernel 3, stride 2 and no padding.
        """
        num_frames += 2 * self.edge_frames if num_frames else 0
        for _ in range(self.subsampling_layers):
            num_frames = max(0, (num_frames - 1) // 2)
        return num_frames

    def span_start(self, exit_layer: int) -> int:
        """How many layers ran before the span of layers that ends at `exit_layer`."""
        at = self.exits.index(exit_layer)
        return self.exits[at - 1] if at else 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Strict: an unknown or missing key is an error that names it."""
        values = dict(values)
        for name in ("exits", "branches"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return strict(cls, values)


@dataclass(frozen=True)
class Chunking:
    """How an Emformer cuts a stream; in frames of the tower, save `memory`.

    chunk: frames that are heard, and written, at once. left_context: frames before the chunk that
    it sees. right_context: frames after it that it waits for. memory: summaries of earlier chunks
    that it sees (the memory bank of arXiv 2010.10759, section 2). No weight depends on any of
    these, so one model can serve several.
    """

    chunk: int
    left_context: int
    right_context: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        check_counts(1, chunk=self.chunk)
        check_counts(
            0,
            left_context=self.left_context,
            right_context=self.right_context,
            memory=self.memory,
        )

    @property
    def frames(self) -> int:
        """Frames that must have come before a chunk is heard."""
        return self.chunk + self.right_context


@dataclass(frozen=True)
class TransducerConfig:
    """A streaming transducer: Emformer encoder, predictor, joiner; sizes in units of 1.

    vocab_size: the blank included. time_reduction: feature frames per frame of the tower, which
    `subsampling` makes: `stack`, side by side, as published, or `halving`, layers that halve the
    rate, each over three frames. chunking: used where a call names none. positions: `none`, as
    published, or `rotary`. kernel_size: frames that a causal convolution in each layer reads; 0:
    none, as published.

    predictor: `lstm` (`predictor_layers` layers, each with layer norm) or `stateless` (reads the
    last `predictor_context` tokens). d_predictor, d_joint: widths of the predictor, and of what
    encoder and predictor hand to the joiner. factorised_blank: the blank has its own scorer (HAT,
    arXiv 2003.07705). blank_skip: labels are not scored where that scorer gives the blank this
    probability, unless a stream asks otherwise; None: they always are. ctc_head: a second head, on
    the encoder alone, to help training.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    vocab_size: int
    d_predictor: int
    d_joint: int
    chunking: Chunking
    predictor: str = "lstm"
    predictor_layers: int = 1
    predictor_context: int = 2
    num_mels: int = 80
    time_reduction: int = 4
    subsampling: str = "stack"
    positions: str = "none"
    kernel_size: int = 0
    factorised_blank: bool = False
    blank_skip: float | None = None
    ctc_head: bool = False
    blank_id: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("d_model", "num_layers", "num_heads", "d_ff", "d_predictor", "d_joint")
        more = ("predictor_layers", "predictor_context", "num_mels", "time_reduction")
        check_counts(1, **{name: getattr(self, name) for name in (*sizes, *more)})
        check_counts(2, vocab_size=self.vocab_size)
        check_counts(0, kernel_size=self.kernel_size)
        check_blank(self.blank_id, self.vocab_size)
        check_range(0, 1, dropout=self.dropout)
        check_choice(
            predictor=(self.predictor, ("lstm", "stateless")),
            subsampling=(self.subsampling, ("stack", "halving")),
            positions=(self.positions, ("none", "rotary")),
            factorised_blank=(self.factorised_blank, (False, True)),
            ctc_head=(self.ctc_head, (False, True)),
        )
        if not isinstance(self.chunking, Chunking):
            raise ConfigError(f"chunking is {self.chunking!r}; it must be a Chunking")
        if self.blank_skip is not None:
            check_positive(blank_skip=self.blank_skip)
            if not self.factorised_blank or self.blank_skip > 1:
                raise ConfigError(
                    f"blank_skip is {self.blank_skip}; it must be at most 1, and needs "
                    "factorised_blank"
                )
        self._check_shapes()

    def _check_shapes(self) -> None:
        factor = self.time_reduction
        if self.subsampling == "halving" and (factor == 1 or factor.bit_count() != 1):
            raise ConfigError(
                f"time_reduction is {factor}; with subsampling halving it must be 2, 4, 8, ..."
            )
        if self.subsampling == "stack" and self.d_model % self.time_reduction:
            raise ConfigError(
                f"d_model {self.d_model} is not a multiple of time_reduction "
                f"{self.time_reduction}; each feature frame fills an equal share of a frame"
            )
        channels = self.num_heads * (2 if self.positions == "rotary" else 1)
        if self.d_model % channels:
            raise ConfigError(
                f"d_model {self.d_model} is not a multiple of {channels}: num_heads "
                f"{self.num_heads}, and rotary positions need an even number of channels per head"
            )
        if self.predictor == "stateless" and self.d_predictor % 4:
            raise ConfigError(
                f"d_predictor is {self.d_predictor}; the stateless predictor convolves groups of "
                "4 channels, so it must be a multiple of 4"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def history(self) -> int:
        """Feature frames before its own from which a frame of the tower is made."""
        return self.time_reduction - 1 if self.subsampling == "halving" else 0

    def output_frames(self, num_frames: int) -> int:
        """Frames of the tower for `num_frames` feature frames; none is lost."""
        return -(-num_frames // self.time_reduction)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Strict: an unknown or missing key is an error that names it."""
        values = dict(values)
        if isinstance(values.get("chunking"), Mapping):
            values["chunking"] = strict(Chunking, values["chunking"])
        return strict(cls, values)


def check_blank(blank_id: Any, vocab_size: int) -> None:
    """ConfigError unless the blank is one of the `vocab_size` tokens."""
    check_counts(0, blank_id=blank_id)
    if blank_id >= vocab_size:
        raise ConfigError(f"blank_id is {blank_id}; it must be less than vocab_size, {vocab_size}")


def check_choice(**values: tuple[Any, tuple[Any, ...]]) -> None:
    """ConfigError, by name, unless the first of each pair, of the same type, is in the second."""
    for name, (value, allowed) in values.items():
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            listed = ", ".join(str(choice) for choice in allowed)
            raise ConfigError(f"{name} is {value!r}; allowed: {listed}")


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


def check_share(**values: Any) -> None:
    """ConfigError, by name, unless all `values` are numbers from 0 to 1."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:  # not so for NaN
            raise ConfigError(f"{name} is {value}; it must lie between 0 and 1")


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
