"""Components for placing and energy are what their shapes and their storage say, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offramp.config import Chunking, TransducerConfig
from offramp.energy.modelled import modelled_energy
from offramp.energy.placement import Component, Part, place
from offramp.energy.profiles import load_profile
from offramp.energy.trace import StreamTrace
from offramp.energy.transducer_components import (
    StoredWeights,
    plain_weights,
    transducer_components,
)
from offramp.errors import ConfigError
from offramp.models.transducer import emformer_rnnt_base

# Small enough to count on paper: D 4, F 8, P 4, J 6, V 5, 2 layers, 3 mel filters, 2 per frame.
CONFIG = TransducerConfig(
    d_model=4,
    num_layers=2,
    num_heads=2,
    d_ff=8,
    vocab_size=5,
    d_predictor=4,
    d_joint=6,
    chunking=Chunking(chunk=2, left_context=3, right_context=1),
    num_mels=3,
    time_reduction=2,
    factorised_blank=True,
)
LAYER = 4 * (4 * 4 + 4) + (4 * 8 + 8) + (8 * 4 + 4) + 3 * 2 * 4  # attention, up, down, norms
# Statistics of the features, input, layers, output, its norm.
ENCODER = 2 * 3 + 3 * 2 + 2 * LAYER + (4 * 6 + 6) + 2 * 6
LSTM = 2 * (4 * 16) + 2 * 16 + 2 * 4
PREDICTOR = 2 * 4 + LSTM + (4 * 6 + 6) + 2 * 6  # all but the table of 5 rows of 4
ENCODER_MACS = (
    6 * 3 * 2  # 6 feature frames to 3 frames of the tower
    + 2 * (3 * 4 * 4 * 4 + 2 * 3 * 6 * 4 + 3 * 2 * 4 * 8)  # 3 rows that see 6 keys
    + 2 * 4 * 6
)


def parts(component: Component) -> dict[str, Part]:
    return {part.name: part for part in component.parts}


def made(positions: dict[str, float] | None = None, bits: int = 32) -> dict[str, Component]:
    weights = plain_weights(CONFIG, bits=bits)
    return {c.name: c for c in transducer_components(CONFIG, weights, positions)}


def test_bytes_and_macs_of_every_component() -> None:
    components = made()
    assert list(components) == ["encoder", "predictor", "joiner", "blank_head"]
    encoder = components["encoder"]
    sizes = {
        "input": 2 * 3 + 3 * 2,
        "layers.0": LAYER,
        "layers.1": LAYER,
        "output": 4 * 6 + 6 + 2 * 6,
    }
    assert sum(sizes.values()) == ENCODER
    assert encoder.parts[:-1] == tuple(Part(n, 4 * size, 4 * size) for n, size in sizes.items())
    left = 2 * 2 * 3 * 4  # two layers, keys and values, of 3 frames
    assert parts(encoder)["cache"] == Part("cache", 4 * left, 4 * left, 4 * 2 * 2 * 2 * 4)
    assert encoder.macs == {"fp32": ENCODER_MACS}
    predictor = components["predictor"]
    assert parts(predictor)["embedding"] == Part("embedding", 4 * 5 * 4, 4 * 4)  # reads a row
    assert parts(predictor)["weights"] == Part("weights", 4 * PREDICTOR, 4 * PREDICTOR)
    assert parts(predictor)["cache"] == Part("cache", 4 * 8, 4 * 8, 4 * 8)  # hidden and cell
    assert predictor.macs == {"fp32": 2 * 4 * 16 + 4 * 6}
    assert components["joiner"] == Component(
        "joiner", (Part("weights", 4 * (6 * 4 + 4), 4 * (6 * 4 + 4)),), {"fp32": 24}
    )
    assert components["blank_head"] == Component(
        "blank_head", (Part("weights", 4 * 7, 4 * 7),), {"fp32": 6}
    )


def test_a_call_of_several_hypotheses_reads_its_weights_once() -> None:
    one, more = made(), made({"encoder": 1.0, "predictor": 2.5, "joiner": 4.0, "blank_head": 3.0})
    assert more["encoder"] == one["encoder"]
    predictor = parts(more["predictor"])
    assert predictor["embedding"].read_bytes == 4 * 2.5 * 4  # a row each
    assert predictor["weights"] == parts(one["predictor"])["weights"]
    assert predictor["cache"] == Part("cache", 4 * 20, 4 * 20, 4 * 20)
    assert more["predictor"].macs == {"fp32": 2.5 * (2 * 4 * 16 + 4 * 6)}
    assert parts(more["joiner"]) == parts(one["joiner"])
    assert more["joiner"].macs == {"fp32": 96} and more["blank_head"].macs == {"fp32": 18}


def test_what_never_ran_still_lies_in_memory() -> None:
    predictor = made({"predictor": 0.0})["predictor"]
    assert parts(predictor)["cache"] == Part("cache", 32, 0, 0)
    assert parts(predictor)["embedding"] == Part("embedding", 80, 0)
    assert parts(predictor)["weights"].stored_bytes == 4 * PREDICTOR


def test_fewer_bits_take_fewer_bytes_of_weights_not_of_caches() -> None:
    full, int4 = made(), made(bits=4)
    for name, component in int4.items():
        ours, theirs = parts(component), parts(full[name])
        assert list(ours) == list(theirs)
        for part, theirs_part in theirs.items():
            bits = 8 if part != "cache" else 1  # of 32 that are 4
            assert ours[part].read_bytes * bits == pytest.approx(theirs_part.read_bytes, abs=4)
    assert parts(int4["blank_head"])["weights"].stored_bytes == 4  # 3.5: half a byte is a byte
    weights = plain_weights(CONFIG, bits=8, dtype="int8")
    (encoder, *_) = transducer_components(CONFIG, weights, cache_bits=16)
    assert parts(encoder)["cache"].stored_bytes == 2 * 48 and encoder.macs == {"int8": ENCODER_MACS}
    with pytest.raises(ConfigError, match="bits is 0"):
        plain_weights(CONFIG, bits=0)
    with pytest.raises(ConfigError, match="cache_bits is 0"):
        transducer_components(CONFIG, weights, cache_bits=0)


def test_the_public_reference_takes_the_bytes_that_its_sizes_say() -> None:
    of = {bits: plain_weights(emformer_rnnt_base(), bits=bits) for bits in (32, 8, 4)}
    encoder = [of[bits]["encoder"].read_bytes for bits in of]
    statistics = 2 * 80
    assert encoder == [(63_605_760 + statistics) * bits // 8 for bits in of]
    assert of[4]["joiner"].stored_bytes == 2_099_713  # half a byte at the end is a byte


def test_weights_may_be_given_as_they_are_stored() -> None:
    held = StoredWeights({"embedding": 40, "weights": 60}, 5.0, {"int8": 30.0, "fp32": 2.0})
    assert (held.stored_bytes, held.read_bytes) == (100, 65.0)
    weights = dict.fromkeys(("encoder", "predictor", "joiner", "blank_head"), held)
    predictor = transducer_components(CONFIG, weights, {"predictor": 3.0})[1]
    assert predictor.parts[:2] == (Part("embedding", 40, 15.0), Part("weights", 60, 60))
    assert predictor.macs == {"int8": 90.0, "fp32": 6.0}


def test_a_near_memory_may_hold_some_of_the_layers() -> None:
    """Two of three layers of int8, the third read from afar."""
    config = replace(emformer_rnnt_base(), num_layers=3)
    components = transducer_components(config, plain_weights(config, bits=8))
    profile = load_profile("edge45")
    (shared, dram) = profile.tiers[1:]
    layer = plain_weights(config, bits=8)["encoder"].parts["layers.0"]
    size = replace(shared.size_bytes, value=2 * layer + 1000)
    profile = replace(profile, tiers=(replace(shared, size_bytes=size), dram))
    calls = {"encoder": 6.25, "predictor": 0.0, "joiner": 0.0}
    placed = place(components, calls, profile).tiers
    near = [key for key, tier in placed.items() if tier == "shared"]
    assert sum("layers" in key for key in near) == 2


def test_what_remembers_nothing_has_no_cache() -> None:
    bare = TransducerConfig(
        **{
            **{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__},
            "chunking": Chunking(2, 0),
            "predictor": "stateless",
            "predictor_context": 1,
        }
    )
    components = transducer_components(bare, plain_weights(bare))
    assert not any("cache" in parts(c) for c in components)


def test_energy_of_a_trace_is_the_reference_s_arithmetic() -> None:
    """The public model at int8 on edge45, about 64 / 4 / 19 mW: weights from DRAM alone."""
    config, tokens = emformer_rnnt_base(), 34
    trace = StreamTrace(
        audio_s=10.0,
        enc_chunks=62,
        enc_frames=250,
        right_ctx_frames=62,
        joiner_calls=250 + tokens,
        joiner_positions=250 + tokens,
        predictor_calls=tokens,
        predictor_positions=tokens,
        tokens=tokens,
        vad_active_s=10.0,
    )
    components = transducer_components(
        config,
        plain_weights(config, bits=8, dtype="int8"),
        trace.positions_per_call(),
        cache_bits=8,
    )
    calls = {name: rate.at(tokens / 10) for name, rate in trace.rates().items()}
    weights = {c.name: "dram" for c in components}
    caches = {c.key(p): "shared" for c in components for p in c.parts if p.name == "cache"}
    energy = modelled_energy(components, calls, load_profile("edge45"), weights | caches)
    mj = {c.name: c.memory_mj_per_audio_s for c in energy.components}
    assert mj["encoder"] == pytest.approx(6.2 * 63_605_760 * 160 / 1e9, rel=2e-3)  # and caches
    assert mj["predictor"] == pytest.approx(3.4 * (8_932_864 - 4096 * 512) * 160 / 1e9, rel=2e-3)
    assert mj["joiner"] == pytest.approx(28.4 * 4_199_425 * 160 / 1e9)
