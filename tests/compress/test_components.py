"""What a model's weights take, plain and compressed: bytes as stored, MACs as computed."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.compress.components import as_run, stored_weights
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.low_rank import LowRank
from offramp.compress.magnitude import MagnitudePruning
from offramp.compress.packing import stored_size
from offramp.compress.quantize import WeightQuantization
from offramp.compress.rows import RowPruning
from offramp.config import Chunking
from offramp.energy.profiles import load_profile
from offramp.energy.trace import StreamTrace
from offramp.energy.transducer_components import plain_weights, transducer_components
from toy_transducer import CHUNKINGS, VARIANTS, transducer

pytestmark = pytest.mark.slow  # the default suite is to stay short


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("chunking", ["default", "memory", "frame by frame"])
def test_of_a_plain_model_it_is_what_the_shape_says(changes: Any, chunking: str) -> None:
    model, how = transducer(**changes), CHUNKINGS[chunking]
    found, expected = stored_weights(model, how), plain_weights(model.config, how)
    assert found == expected
    assert transducer_components(model.config, found, chunking=how)


def test_a_model_as_it_ran_is_what_its_parts_and_its_trace_say() -> None:
    model, how = transducer(factorised_blank=True), CHUNKINGS["frame by frame"]
    trace = StreamTrace(10.0, 50, 50, 0, 30, 30, 20, 20, 9, 9, 8)
    plan = as_run(model, trace, how)
    weights = stored_weights(model, how)
    assert plan.tokens_per_s == 0.8 and plan.rates == trace.rates(True)
    positions = trace.positions_per_call(True)
    assert plan.components == transducer_components(model.config, weights, positions, how)
    energy = plan.energy(load_profile("mcu"))
    assert {c.name: c.calls_per_s for c in energy.components} == pytest.approx(
        {"encoder": 5.0, "predictor": 0.9, "joiner": 3.0, "blank_head": 5.0}
    )


def test_codes_are_bytes_and_their_products_int8() -> None:
    model = transducer(factorised_blank=True)
    small = WeightQuantization(8, "int8").apply(model)
    found, before = stored_weights(small), stored_weights(model)
    joiner, J, V = found["joiner"], 20, 10
    assert joiner.stored_bytes == joiner.read_bytes == J * V + 2 * V + 2 * V  # codes, scale, bias
    assert joiner.macs == {"int8": J * V}
    assert found["blank_head"].macs == {"int8": J}
    chunk = model.config.chunking
    keys = chunk.left_context + chunk.frames
    attention = model.config.num_layers * 2 * chunk.frames * keys * 16  # stays as it was
    assert found["encoder"].macs["fp32"] == attention
    for name, held in found.items():
        assert sum(held.macs.values()) == sum(before[name].macs.values())
    row = 12 + 2  # codes and a scale
    assert found["predictor"].row_bytes == row
    stored = stored_size(small).of(["predictor"]).nbytes
    assert found["predictor"].stored_bytes == stored
    assert found["predictor"].read_bytes == stored - 11 * row + row


def test_activations_decide_the_products_dtype() -> None:
    found = stored_weights(WeightQuantization(4).apply(transducer()))
    assert found["joiner"].macs == {"bf16": 220}
    assert found["joiner"].stored_bytes == 220 // 2 + 2 * 11 + 2 * 11


def test_what_is_really_smaller_computes_less_and_zeros_do_not() -> None:
    model = transducer()
    before = stored_weights(model)["encoder"]
    rows = sum(model.config.num_layers * [model.config.chunking.frames])
    narrow = stored_weights(FeedForwardPruning(0.5).apply(model, ["encoder"]))["encoder"]
    assert before.macs["fp32"] - narrow.macs["fp32"] == rows * 2 * 16 * 12
    thin = stored_weights(LowRank(0.5).apply(model, ["joiner"]))["joiner"]
    assert thin.macs == {"fp32": 3 * (20 + 11)}
    short = stored_weights(RowPruning(0.5).apply(model, ["joiner"]))["joiner"]
    assert short.macs == {"fp32": 20 * 5} or short.macs == {"fp32": 20 * 6}
    zeros = stored_weights(MagnitudePruning(0.5).apply(model, ["encoder"]))["encoder"]
    assert zeros.macs == before.macs
    assert zeros.stored_bytes < before.stored_bytes


def test_it_leaves_no_hooks() -> None:
    model = transducer()
    stored_weights(model, Chunking(2, 1))
    assert not any(module._forward_hooks for module in model.modules())
