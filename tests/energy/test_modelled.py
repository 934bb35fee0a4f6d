"""Modelled energy: the reference's published arithmetic, to the digit printed, and its accounts.

The configuration is torchaudio's emformer_rnnt_base; int8, batch 1, greedy, no weights kept on
chip. As in the reference every weight counts as one multiply-accumulate per use, and the encoder
computes its right context again in each chunk.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from offramp.energy.meter import Measured
from offramp.energy.modelled import ModelledEnergy, modelled_energy
from offramp.energy.placement import Component, Part
from offramp.energy.profiles import Constant, Profile, load_profile, shipped_profiles
from offramp.energy.trace import StreamTrace
from offramp.errors import ConfigError, InputError

EDGE = load_profile("edge45")
D, FFN, ENCODING, V = 512, 2048, 1024, 4097


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


LAYER = 2 * linear(D, D) + linear(D, 2 * D) + linear(D, FFN) + linear(FFN, D) + 3 * 2 * D
ENCODER = 80 * 128 + 20 * LAYER + linear(D, ENCODING) + 2 * ENCODING
EMBEDDING = V * D
# Four gates, of input and of state, with one norm per gate, of the cell and no bias.
LSTM = 2 * 4 * D * D + 2 * 4 * D + 2 * D
PREDICTOR = 2 * D + 3 * LSTM + linear(D, ENCODING) + 2 * ENCODING
STATELESS = 2 * 4 * D + linear(D, D)  # context 2, groups of 4


def joiner_size(dim: int = ENCODING, vocab_size: int = V) -> int:
    return linear(dim, vocab_size)


def test_parameter_counts_are_the_published_ones() -> None:
    assert (LAYER, LSTM, EMBEDDING) == (3_153_408, 2_102_272, 2_097_664)
    assert ENCODER == 63_605_760
    assert PREDICTOR + EMBEDDING == 8_932_864
    assert joiner_size() == 4_199_425
    assert ENCODER + PREDICTOR + EMBEDDING + joiner_size() == 76_738_049


BASE: dict[str, Any] = {
    "chunk_frames": 4,  # of 40 ms, before one frame of right context
    "frames_per_s": 25.0,
    "tokens_per_s": 3.4,
    "encoder": ENCODER,
    "predictor": PREDICTOR,
    "rows": 1,  # of the embedding, per call
    "joiner": joiner_size(),
    "joiner_calls": None,  # one per frame and one per token
    "joiner_tier": "dram",
    "bits": 8,
    "dtype": "int8",
    "duty": 1.0,
}


def variant(profile: Profile = EDGE, **changes: Any) -> ModelledEnergy:
    o = BASE | changes
    chunks = o["frames_per_s"] / o["chunk_frames"]

    def component(name: str, size: int, uses: int, *extra: Part) -> Component:
        weights = Part("weights", size * o["bits"] // 8, size * o["bits"] / 8)
        return Component(name, (weights, *extra), {o["dtype"]: size * uses})

    row = o["rows"] * D * o["bits"] / 8
    components = (
        component("encoder", int(o["encoder"]), o["chunk_frames"] + 1),
        component("predictor", o["predictor"], 1, Part("embedding", EMBEDDING, row)),
        component("joiner", o["joiner"], 1),
    )
    joiner_calls = o["joiner_calls"] or o["frames_per_s"] + o["tokens_per_s"]
    calls = {"encoder": chunks, "predictor": o["tokens_per_s"], "joiner": joiner_calls}
    calls = {name: o["duty"] * rate for name, rate in calls.items()}
    placement = {"encoder": "dram", "predictor": "dram", "joiner": o["joiner_tier"]}
    return modelled_energy(components, calls, profile, placement)


SMALL_V = {"tokens_per_s": 5.5, "joiner": joiner_size(vocab_size=501)}
SMALL = {
    "chunk_frames": 8,
    "tokens_per_s": 5.5,
    "joiner": joiner_size(512, 501),
    "predictor": STATELESS,
    "rows": 2,
}
INT4 = {"bits": 4, "dtype": "int4"}
# Total, then encoder, predictor, joiner, in mW as printed.
TABLE: dict[str, tuple[dict[str, Any], str]] = {
    "base, segment 160 ms": ({}, "87.0 64.2 3.7 19.1"),
    "segment 40 ms": ({"chunk_frames": 1}, "278 255 3.7 19.1"),
    "segment 320 ms": ({"chunk_frames": 8}, "55.2 32.3 3.7 19.1"),
    "segment 640 ms": ({"chunk_frames": 16}, "39.2 16.4 3.7 19.1"),
    "vocabulary of 501": (SMALL_V, "72.7 64.2 6.0 2.5"),
    "factorised blank": ({"joiner_calls": 2 * 3.4}, "72.5 64.2 3.7 4.6"),
    # 2,099,712 weights would not fit, so a little sparser.
    "joiner in SRAM": ({"joiner": 2**21, "joiner_tier": "shared"}, "68.7 64.2 3.7 0.8"),
    "12.5 frames a second": ({"chunk_frames": 2, "frames_per_s": 12.5}, "78.4 64.0 3.7 10.7"),
    "stateless predictor": ({"predictor": STATELESS, "rows": 2}, "83.5 64.2 0.1 19.1"),
    "encoder less 25 %": ({"encoder": ENCODER * 0.75}, "71.0 48.2 3.7 19.1"),
    "int4": (INT4, "43.5 32.1 1.9 9.6"),
    "40 % of the time": (
        {"duty": 0.4},
        "34.8 25.7 1.5 7.6",
    ),  # of the parts only the sum is printed
    "320 ms, V 501, small joiner, stateless": (SMALL, "33.8 32.3 0.2 1.3"),
    "and int4, encoder less 25 %": (
        SMALL | INT4 | {"encoder": ENCODER * 0.75},
        "12.9 12.1 0.1 0.6",
    ),
}


@pytest.mark.parametrize(("changes", "printed"), TABLE.values(), ids=TABLE)
def test_the_reference_is_reproduced_to_the_digits_it_prints(
    changes: dict[str, Any], printed: str
) -> None:
    made = variant(**changes)
    found = [made.mj_per_audio_s, *(c.mj_per_audio_s for c in made.components)]
    for energy, text in zip(found, printed.split(), strict=True):
        # Half a unit of the last digit, and a little: 39.252 is printed as 39.2.
        assert energy == pytest.approx(float(text), abs=0.055 if "." in text else 0.5)


def test_what_the_reference_says_of_compute_and_of_shares() -> None:
    base, full = variant(), variant(bits=32, dtype="fp32")
    for made, total, compute in ((base, 87.0, 0.6), (full, 355.0, 9.8)):
        assert made.mj_per_audio_s == pytest.approx(total, abs=0.5)
        macs = sum(c.mac_mj_per_audio_s for c in made.components)
        assert macs == pytest.approx(compute, abs=0.05)
        assert macs < 0.03 * made.mj_per_audio_s
    low = variant(load_profile("mobile-low"))
    assert base.mj_per_audio_s / low.mj_per_audio_s == pytest.approx(2.5, abs=0.05)
    for made in (base, low):
        assert [round(share) for share in made.share_percent.values()] == [74, 4, 22]
    per_million = [
        c.mj_per_audio_s / (size / 1e6)
        for c, size in zip(base.components, (ENCODER, PREDICTOR, joiner_size()), strict=True)
    ]
    assert [round(x, 2) for x in per_million] == [1.01, 0.55, 4.55]


def test_rates_are_exact() -> None:
    encoder, predictor, joiner = variant().components
    assert (encoder.calls_per_s, predictor.calls_per_s) == (6.25, 3.4)
    assert joiner.calls_per_s == pytest.approx(25 + 3.4)
    assert encoder.weight_bytes_per_s == 6.25 * ENCODER
    assert encoder.macs_per_s == 31.25 * ENCODER
    assert predictor.weight_bytes_per_s == pytest.approx(3.4 * (PREDICTOR + D))
    assert predictor.tiers == {"dram": PREDICTOR + EMBEDDING}


def test_a_trace_gives_the_same_as_the_formula() -> None:
    trace = StreamTrace(
        audio_s=100.0,
        enc_chunks=625,
        enc_frames=2500,
        right_ctx_frames=625,
        joiner_calls=2840,
        predictor_calls=340,
        tokens=340,
        vad_active_s=100.0,
    )
    calls = {name: rate.at(3.4) for name, rate in trace.rates().items()}
    assert calls == pytest.approx({"encoder": 6.25, "predictor": 3.4, "joiner": 28.4})


@pytest.mark.parametrize("profile", shipped_profiles(), ids=lambda p: p.name)
def test_shares_sum_to_a_hundred(profile: Profile) -> None:
    component = Component("all", (Part("w", 3_000_001, 7), Part("state", 99, 3, 5)), {"int8": 11})
    others = [replace(component, name=name) for name in ("encoder", "joiner")]
    calls = {"all": 1 / 3, "encoder": 6.25, "joiner": 28.4}
    for device in (profile, replace(profile, idle_mw=Constant(0.125, "assumed", "a test"))):
        made = modelled_energy([component, *others], calls, device)
        assert sum(made.share_percent.values()) == pytest.approx(100, abs=1e-9)
        assert ("idle" in made.share_percent) == (device is not profile)
        without = sum(c.mj_per_audio_s for c in made.components)
        assert made.mj_per_audio_s - without == pytest.approx(0.125 * (device is not profile))


def test_caches_are_counted_apart_and_pay_for_both_ways() -> None:
    write = Constant(40.0, "assumed", "a test")
    tiers = (*EDGE.tiers[:-1], replace(EDGE.tiers[-1], write_pj_per_byte=write))
    parts = (Part("w", 100, 100), Part("cache", 50, 20, 10))
    made = modelled_energy(
        [Component("encoder", parts, {"int8": 1000, "fp32": 10})],
        {"encoder": 2.0},
        replace(EDGE, tiers=(replace(tiers[0], write_pj_per_byte=None), tiers[-1])),
        {"encoder": "dram"},
    )
    (row,) = made.components
    assert (row.weight_bytes_per_s, row.cache_bytes_per_s, row.macs_per_s) == (200, 60, 2020)
    assert row.memory_mj_per_audio_s * 1e9 == pytest.approx(2 * (120 * 160 + 10 * 40))
    assert row.mac_mj_per_audio_s * 1e9 == pytest.approx(2 * (1000 * 0.3 + 10 * 4.6))


def test_without_a_placement_the_best_one_is_taken() -> None:
    fixed = variant(joiner=2**20)
    components = [Component(c, (Part("w", 2**20, 2**20),), {}) for c in ("encoder", "joiner")]
    made = modelled_energy(components, {"encoder": 6.25, "joiner": 28.4}, EDGE)
    assert made.placement == {"encoder.w": "shared", "joiner.w": "shared"}
    assert fixed.placement["joiner.weights"] == "dram"


def test_every_report_says_that_it_is_modelled_and_from_what() -> None:
    made = variant()
    assert made.label == "modelled, memory-traffic energy, profile edge45 version 1; not measured"
    report = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert (report["kind"], report["label"]) == ("modelled", made.label)
    assert report["profile"]["tiers"][-1]["read_pj_per_byte"]["source"].startswith("DDR3 era")
    assert report["components"][2]["share_percent"] == made.share_percent["joiner"]
    assert report["idle_mj_per_audio_s"] is None
    assert report["placement"]["joiner.weights"] == "dram"


def test_modelled_and_measured_never_meet() -> None:
    modelled, measured = variant(), Measured(1.0, 2.0, ("rapl package-0",))
    assert measured.to_dict()["kind"] == "measured" != modelled.to_dict()["kind"]
    for left, right in ((modelled, measured), (measured, modelled)):
        with pytest.raises(TypeError):
            left + right  # type: ignore[operator]
        with pytest.raises(TypeError):
            sum([left, right])  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            _ = left < right  # type: ignore[operator]
    for figures in (modelled, measured):
        with pytest.raises(AttributeError):
            figures.joules = 2.0  # type: ignore[misc, union-attr]


def test_silence_behind_a_vad_takes_nothing() -> None:
    made = modelled_energy([Component("encoder", (Part("w", 5, 5),), {})], {"encoder": 0}, EDGE)
    assert (made.mj_per_audio_s, made.share_percent) == (0.0, {})
    assert made.to_dict()["components"][0]["share_percent"] is None


def test_what_does_not_match_is_refused() -> None:
    joiner = Component("joiner", (Part("w", 5, 5),), {"int8": 5})
    for calls in ({}, {"joiner": 1.0, "predictor": 2.0}, {"predictor": 1.0}):
        with pytest.raises(InputError, match="the components are joiner; count each of them once"):
            modelled_energy([joiner], calls, EDGE)
    with pytest.raises(InputError, match="the components are joiner, joiner; count each"):
        modelled_energy([joiner, joiner], {"joiner": 1.0}, EDGE)
    with pytest.raises(ConfigError, match="joiner is -1; it must be a number of at least 0"):
        modelled_energy([joiner], {"joiner": -1}, EDGE)
    odd = replace(joiner, macs={"fp8": 5})
    with pytest.raises(ConfigError, match="joiner computes in 'fp8'; allowed: fp32, fp16, bf16, "):
        modelled_energy([odd], {"joiner": 1.0}, EDGE)
