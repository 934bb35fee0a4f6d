"""A compression plan: how each component of a transducer is stored, and how its streams run.

What a planner chose, as a file: for each component its method, level and bits, then the chunk, the
blank threshold and where everything lies. Predictions stand beside it. A plan is for one model,
told by a fingerprint of its configuration and weights; another model refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from offramp.compress.blocks import BlockPruning
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.heads import HeadPruning
from offramp.compress.low_rank import LowRank
from offramp.compress.magnitude import MagnitudePruning
from offramp.compress.method import CompressionMethod
from offramp.compress.quantize import WeightQuantization
from offramp.compress.quantized import ACTIVATIONS, BITS
from offramp.compress.rounding import Moments
from offramp.compress.rows import RowPruning
from offramp.compress.scores import check_level
from offramp.config import check_choice, strict
from offramp.errors import ConfigError, DataError, InputError
from offramp.files import json_text, read_table, write_table
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer

FULL_BITS = 32  # weights as they are

# level -> what is applied, in this order. `none` stands for level 0 of all.
METHODS: dict[str, Callable[[float], tuple[CompressionMethod, ...]]] = {
    "magnitude": lambda level: (MagnitudePruning(level),),
    "global_magnitude": lambda level: (MagnitudePruning(level, "global"),),
    "blocks": lambda level: (BlockPruning(level),),
    "rows": lambda level: (RowPruning(level),),
    "feed_forward": lambda level: (FeedForwardPruning(level),),
    "heads": lambda level: (HeadPruning(level),),
    "units_and_heads": lambda level: (FeedForwardPruning(level), HeadPruning(level)),
    "low_rank": lambda level: (LowRank(level),),
}

# What a choice for a component touches. The scorer of a factorised blank is one row, which costs
# nothing and decides every frame, so it stays as it is.
MODULES = {"encoder": "encoder", "predictor": "predictor", "joiner": "joiner.tokens"}


@dataclass(frozen=True)
class Choice:
    """How one component is stored: pruned by `method` at `level`, then with `bits` per weight.

    bits 32: not quantised. activations: as in `WeightQuantization`, where there are codes.
    """

    method: str = "none"
    level: float = 0.0
    bits: int = FULL_BITS
    activations: str = "bfloat16"

    def __post_init__(self) -> None:
        check_choice(
            method=(self.method, ("none", *METHODS)),
            bits=(self.bits, (*BITS, FULL_BITS)),
            activations=(self.activations, ACTIVATIONS),
        )
        check_level(self.level)
        if (self.method == "none") != (self.level == 0):
            raise ConfigError(
                f"level is {self.level} with method {self.method!r}; level 0 is method 'none', and "
                "only that"
            )

    def __str__(self) -> str:
        stored = f"{self.bits} bits"
        return stored if self.method == "none" else f"{self.method} {self.level:.3g}, {stored}"


@dataclass(frozen=True)
class CompressionPlan:
    """Choices by component, and what they are predicted to give.

    made_by: `exact`, or a baseline's name. model: its `fingerprint`. blank_skip: as in
    `StreamOptions`, None: the model's own. wer, wer_increase: shares of the words, the increase
    over the model as it was and with its 95 % interval. stored_bytes: of the components that run,
    without the joiner's scorer of the blank or a head for training. modelled_mj_per_audio_s,
    placements: by hardware profile; a placement is a tier by `component.part`.
    """

    made_by: str
    model: str
    choices: Mapping[str, Choice]
    chunk_ms: float
    blank_skip: float | None
    wer: float
    wer_increase: float
    wer_increase_ci95: tuple[float, float]
    stored_bytes: int
    modelled_mj_per_audio_s: Mapping[str, float]
    placements: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.choices) - set(MODULES)):
            raise ConfigError(
                f"choices has no component {', '.join(unknown)}; allowed: {', '.join(MODULES)}"
            )

    def check(self, model: Transducer) -> None:
        """InputError unless the plan was made for `model`."""
        found = fingerprint(model)
        if found != self.model:
            raise InputError(
                f"the plan was made for another model (fingerprint {self.model[:12]}, this one has "
                f"{found[:12]}); make one for this model with offramp compress"
            )

    def to_json(self) -> str:
        return json_text(asdict(self))

    def save(self, path: Path) -> None:
        """Write JSON to `path`, whole or not at all."""
        write_table(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Strict: DataError for a file that is missing or is no plan."""
        values = read_table(path, DataError, "give a plan.json that offramp compress wrote")
        try:
            return cls._of(values)
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is no plan: {error}; write it anew") from error

    @classmethod
    def _of(cls, values: Any) -> Self:
        if missing := [f.name for f in fields(cls) if f.name not in values]:
            raise ConfigError(f"it lacks {', '.join(missing)}")
        low, high = values["wer_increase_ci95"]
        choices = {name: strict(Choice, choice) for name, choice in values["choices"].items()}
        return strict(cls, {**values, "choices": choices, "wer_increase_ci95": (low, high)})


def pruned(model: Transducer, choices: Mapping[str, Choice]) -> Transducer:
    """`model` pruned and factorised as `choices` say, which can then be fine-tuned."""
    for component, choice in choices.items():
        if choice.method != "none":
            for method in METHODS[choice.method](choice.level):
                model = method.apply(model, [MODULES[component]])
    return model


def quantised(
    model: Transducer, choices: Mapping[str, Choice], moments: Moments | None = None
) -> Transducer:
    """`model` with the bits that `choices` say, which comes last; moments: as in
    `WeightQuantization`, None: codes are the nearest."""
    for component, choice in choices.items():
        if choice.bits != FULL_BITS:
            method = WeightQuantization(choice.bits, choice.activations, moments or {})
            model = method.apply(model, [MODULES[component]])
    return model
