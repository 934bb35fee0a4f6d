"""What one call of each part of a transducer takes, from its shape alone: weights, MACs, cache.

A part's energy is how often it is called times what a call reads and multiplies; `Trace` counts
the first, this the second. MACs are counted as in `energy/cost.py`: matrix products, convolutions
and attention. Weights are all parameters that a call reads, of an embedding its rows, and the
statistics by which features are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offramp.config import Chunking, TransducerConfig

TABLE = "embedding"  # the part of which a call reads some rows, not all


@dataclass(frozen=True)
class CallCost:
    """Of one call at batch 1. Weights and caches are counted in values, not in bytes.

    parts: all weights of the component, by that part of it which may lie in a memory of its own
    (see `part_of`). table_read: of `TABLE`, what the call reads.
    """

    parts: Mapping[str, int]
    macs: int
    cache_read: int = 0
    cache_written: int = 0
    table_read: int = 0

    @property
    def stored(self) -> int:
        """All of them, read or not."""
        return sum(self.parts.values())

    @property
    def weights(self) -> int:
        """Those that the call reads."""
        return self.stored - self.parts.get(TABLE, 0) + self.table_read


def part_of(component: str, tensor: str) -> str:
    """The part of `component` in which a tensor of it lies, by its dotted name there.

    An encoder's layers lie each on its own, and so does a predictor's embedding.
    """
    first, *rest = tensor.split(".")
    if component == "encoder":
        if first == "layers":
            return f"layers.{rest[0]}"
        return "output" if first.startswith("output") else "input"
    return TABLE if (component, first) == ("predictor", TABLE) else "weights"


def encoder_call(config: TransducerConfig, chunking: Chunking | None = None) -> CallCost:
    """One chunk, right context included: it is heard again with the next."""
    chunking = chunking or config.chunking
    D, J, S, own = config.d_model, config.d_joint, chunking.chunk, chunking.frames
    reduced, reduced_macs = _subsampling(config, own)
    layers = {f"layers.{n}": _layer_weights(config) for n in range(config.num_layers)}
    parts = {"input": reduced + 2 * config.num_mels} | layers | {"output": D * J + 3 * J}
    macs = reduced_macs + S * D * J
    macs += config.num_layers * _layer_macs(config, chunking)
    banked = int(chunking.memory > 0)
    before = max(0, config.kernel_size - 1)
    read = 2 * D * (chunking.memory + chunking.left_context) + D * before
    written = 2 * D * (banked + min(S, chunking.left_context)) + D * min(S, before)
    return CallCost(parts, macs, config.num_layers * read, config.num_layers * written)


def predictor_call(config: TransducerConfig) -> CallCost:
    """One token."""
    P, J = config.d_predictor, config.d_joint
    output = P * J + 3 * J
    if config.predictor == "stateless":
        rows, kernel = config.predictor_context, 4 * P * config.predictor_context
        macs, matrices, state = kernel + P * J, kernel + output, rows - 1
    else:
        rows, layers = 1, config.predictor_layers
        macs = layers * 8 * P * P + P * J
        matrices, state = 2 * P + layers * (8 * P * P + 10 * P) + output, 2 * layers * P
    parts = {TABLE: config.vocab_size * P, "weights": matrices}
    return CallCost(parts, macs, state, state, table_read=rows * P)


def joiner_call(config: TransducerConfig) -> CallCost:
    """One frame against one predictor output; the labels alone where the blank is factorised."""
    J, outputs = config.d_joint, config.vocab_size - config.factorised_blank
    return CallCost({"weights": J * outputs + outputs}, J * outputs)


def blank_call(config: TransducerConfig) -> CallCost:
    """The scorer of a factorised blank, before every `joiner_call` or in its place."""
    assert config.factorised_blank, "only a factorised blank has a scorer of its own"
    return CallCost({"weights": config.d_joint + 1}, config.d_joint)


def _subsampling(config: TransducerConfig, frames: int) -> tuple[int, int]:
    """(weights, MACs that make `frames` frames of the tower)."""
    D, factor = config.d_model, config.time_reduction
    if config.subsampling == "stack":
        weights = config.num_mels * D // factor
        return weights, frames * factor * weights
    inputs = [3 * (D if n else config.num_mels) for n in range(factor.bit_length() - 1)]
    # The last writes `frames`; each before it, what three of every two of the next read.
    rows = [(frames + 1) * (factor >> n) - 1 for n in range(1, len(inputs) + 1)]
    macs = sum(count * size * D for count, size in zip(rows, inputs, strict=True))
    return sum(size * D + D for size in inputs), macs


def _layer_weights(config: TransducerConfig) -> int:
    D, inner = config.d_model, config.d_ff
    attention = 4 * D * D + 4 * D
    feed_forward = 2 * D * inner + inner + D
    norms = 3 * 2 * D
    if config.kernel_size:
        attention += 3 * D * D + 3 * D + config.kernel_size * D + D  # the convolution
        norms += 2 * 2 * D
    return attention + feed_forward + norms


def _layer_macs(config: TransducerConfig, chunking: Chunking) -> int:
    D, own = config.d_model, chunking.frames
    rows = own + (chunking.memory > 0)  # its summary is a row of attention
    keys = chunking.memory + chunking.left_context + own
    macs = rows * 4 * D * D + 2 * rows * keys * D + own * 2 * D * config.d_ff
    if config.kernel_size:
        macs += own * (3 * D * D + config.kernel_size * D)
    return macs
