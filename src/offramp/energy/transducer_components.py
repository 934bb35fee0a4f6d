"""The parts of a transducer as components that can be placed in memories: bytes and MACs per call.

`transducer_cost` counts values by shape; here they become bytes, as the weights are stored and
for as many hypotheses as a call takes. How often each is called a `StreamTrace` tells, under the
same names: encoder, predictor, joiner and, where the blank is factorised, blank_head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from offramp.config import Chunking, TransducerConfig, check_counts
from offramp.energy.placement import Component, Part
from offramp.energy.transducer_cost import (
    TABLE,
    CallCost,
    blank_call,
    encoder_call,
    joiner_call,
    predictor_call,
)


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a component as they lie in memory, and what a call of one position takes.

    parts: bytes by part (see `part_of`), index and scales included; all are read in a call but for
    the table's. row_bytes: of the table, if there is one, what every position of a call reads.
    macs: by dtype, as a hardware profile names them.
    """

    parts: Mapping[str, int]
    row_bytes: float
    macs: Mapping[str, float]

    @property
    def stored_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def read_bytes(self) -> float:
        """Of these, what a call of one position reads."""
        return self.stored_bytes - self.parts.get(TABLE, 0) + self.row_bytes


def call_costs(config: TransducerConfig, chunking: Chunking | None = None) -> dict[str, CallCost]:
    """Of each component, by name."""
    costs = {
        "encoder": encoder_call(config, chunking),
        "predictor": predictor_call(config),
        "joiner": joiner_call(config),
    }
    return costs | ({"blank_head": blank_call(config)} if config.factorised_blank else {})


def plain_weights(
    config: TransducerConfig, chunking: Chunking | None = None, bits: int = 32, dtype: str = "fp32"
) -> dict[str, StoredWeights]:
    """Of a model with `bits` for every weight, nothing beside them, that computes in `dtype`."""
    check_counts(1, bits=bits)
    return {
        name: StoredWeights(
            {part: math.ceil(count * bits / 8) for part, count in cost.parts.items()},
            cost.table_read * bits / 8,
            {dtype: cost.macs},
        )
        for name, cost in call_costs(config, chunking).items()
    }


def transducer_components(
    config: TransducerConfig,
    weights: Mapping[str, StoredWeights],
    positions_per_call: Mapping[str, float] | None = None,
    chunking: Chunking | None = None,
    cache_bits: int = 32,
) -> tuple[Component, ...]:
    """Each with the parts of its weights and, where it remembers something, the part `cache`.

    weights, positions_per_call: by component; see `StreamTrace.positions_per_call`. None: one
    position. cache_bits: per value that is kept between calls.
    """
    check_counts(1, cache_bits=cache_bits)
    found = []
    for name, cost in call_costs(config, chunking).items():
        held, positions = weights[name], (positions_per_call or {}).get(name, 1.0)
        parts = [
            Part(part, size, positions * held.row_bytes if part == TABLE else size)
            for part, size in held.parts.items()
        ]
        if cost.cache_read:
            each = positions * cache_bits / 8
            # Every call reads all of it, so what it reads is what it holds.
            resident = math.ceil(cost.cache_read * max(1.0, positions) * cache_bits / 8)
            parts.append(Part("cache", resident, cost.cache_read * each, cost.cache_written * each))
        macs = {dtype: positions * count for dtype, count in held.macs.items()}
        found.append(Component(name, tuple(parts), macs))
    return tuple(found)
