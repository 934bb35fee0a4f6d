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
    CallCost,
    blank_call,
    encoder_call,
    joiner_call,
    predictor_call,
)


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a component as they lie in memory, and what a call of one position takes.

    stored_bytes: all, index and scales included. read_bytes: of these, those that a call reads.
    row_bytes: that every further position of a call reads in addition: rows of an embedding.
    macs: by dtype, as a hardware profile names them.
    """

    stored_bytes: int
    read_bytes: float
    row_bytes: float
    macs: Mapping[str, float]


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
    found = {}
    for name, cost in call_costs(config, chunking).items():
        # All but the table is read once per call; of the table, some rows.
        table = config.vocab_size * config.d_predictor if name == "predictor" else 0
        rows = cost.weights - (cost.stored - table) if table else 0
        found[name] = StoredWeights(
            stored_bytes=math.ceil(cost.stored * bits / 8),
            read_bytes=cost.weights * bits / 8,
            row_bytes=rows * bits / 8,
            macs={dtype: cost.macs},
        )
    return found


def transducer_components(
    config: TransducerConfig,
    weights: Mapping[str, StoredWeights],
    positions_per_call: Mapping[str, float] | None = None,
    chunking: Chunking | None = None,
    cache_bits: int = 32,
) -> tuple[Component, ...]:
    """Each with the part `weights` and, where it remembers something, the part `cache`.

    weights, positions_per_call: by component; see `StreamTrace.positions_per_call`. None: one
    position. cache_bits: per value that is kept between calls.
    """
    check_counts(1, cache_bits=cache_bits)
    found = []
    for name, cost in call_costs(config, chunking).items():
        held, positions = weights[name], (positions_per_call or {}).get(name, 1.0)
        read = held.read_bytes + (positions - 1) * held.row_bytes
        parts = [Part("weights", held.stored_bytes, read)]
        if cost.cache_read:
            each = positions * cache_bits / 8
            # Every call reads all of it, so what it reads is what it holds.
            resident = math.ceil(cost.cache_read * max(1.0, positions) * cache_bits / 8)
            parts.append(Part("cache", resident, cost.cache_read * each, cost.cache_written * each))
        macs = {dtype: positions * count for dtype, count in held.macs.items()}
        found.append(Component(name, tuple(parts), macs))
    return tuple(found)
