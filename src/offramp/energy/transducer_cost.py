"""What one call of each part of a transducer takes, from its shape alone: weights, MACs, cache.

A part's energy is how often it is called times what a call reads and multiplies; `Trace` counts
the first, this the second. MACs are counted as in `energy/cost.py`: matrix products, convolutions
and attention. Weights are all parameters that a call reads; of an embedding, its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from offramp.config import Chunking, TransducerConfig


@dataclass(frozen=True)
class CallCost:
    """Of one call at batch 1. Weights and caches are counted in values, not in bytes.

    weights: that the call reads. stored: all of its component, read or not.
    """

    weights: int
    stored: int
    macs: int
    cache_read: int = 0
    cache_written: int = 0


def encoder_call(config: TransducerConfig, chunking: Chunking | None = None) -> CallCost:
    """One chunk, right context included: it is heard again with the next."""
    chunking = chunking or config.chunking
    D, J, S, own = config.d_model, config.d_joint, chunking.chunk, chunking.frames
    reduced = config.num_mels * D // config.time_reduction  # weights of the input
    weights = reduced + config.num_layers * _layer_weights(config) + D * J + 3 * J
    macs = own * config.time_reduction * reduced + S * D * J
    macs += config.num_layers * _layer_macs(config, chunking)
    banked = int(chunking.memory > 0)
    before = max(0, config.kernel_size - 1)
    read = 2 * D * (chunking.memory + chunking.left_context) + D * before
    written = 2 * D * (banked + min(S, chunking.left_context)) + D * min(S, before)
    layers = config.num_layers
    return CallCost(weights, weights, macs, layers * read, layers * written)


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
    stored = config.vocab_size * P + matrices
    return CallCost(rows * P + matrices, stored, macs, state, state)


def joiner_call(config: TransducerConfig) -> CallCost:
    """One frame against one predictor output; the labels alone where the blank is factorised."""
    J, outputs = config.d_joint, config.vocab_size - config.factorised_blank
    weights = J * outputs + outputs
    return CallCost(weights, weights, J * outputs)


def blank_call(config: TransducerConfig) -> CallCost:
    """The scorer of a factorised blank, before every `joiner_call` or in its place."""
    assert config.factorised_blank, "only a factorised blank has a scorer of its own"
    weights = config.d_joint + 1
    return CallCost(weights, weights, config.d_joint)


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
