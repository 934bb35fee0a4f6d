"""The ranking of plans over draws of the constants and over the shipped profiles."""

from __future__ import annotations

import pytest

from offramp.energy.placement import Component, Part
from offramp.energy.profiles import SHIPPED, load_profile
from offramp.energy.trace import CallRate
from offramp.energy.uncertainty import Plan, Sweep, better_by_profile, fraction_better, with_memory
from offramp.errors import ConfigError, InputError

EDGE = load_profile("edge45")
SWEEP = Sweep(draws=100)


def plan(
    encoder: int, joiner: int, macs: float = 0.0, tokens_per_s: float = 3.4, per_token: float = 1.0
) -> Plan:
    """Sizes in bytes."""
    parts = (("encoder", encoder), ("joiner", joiner))
    components = tuple(
        Component(name, (Part("w", size, size),), {"fp32": macs}) for name, size in parts
    )
    rates = {"encoder": CallRate(6.25), "joiner": CallRate(25.0, per_token)}
    return Plan(components, rates, tokens_per_s)


LARGE = plan(60_000_000, 4_000_000)


def test_less_of_everything_is_better_in_every_draw_and_profile() -> None:
    small = plan(30_000_000, 2_000_000)
    assert fraction_better(small, LARGE, EDGE, SWEEP) == 1.0
    assert fraction_better(LARGE, small, EDGE, SWEEP) == 0.0
    assert better_by_profile(small, LARGE) == dict.fromkeys(SHIPPED, True)


def test_a_plan_does_not_beat_itself() -> None:
    assert fraction_better(LARGE, LARGE, EDGE, SWEEP) == 0.0
    assert not any(better_by_profile(LARGE, LARGE).values())


def test_what_hangs_on_the_constants_is_better_in_some() -> None:
    """Fewer bytes for more arithmetic, which pays while memory is dear."""
    busy = plan(20_000_000, 4_000_000, macs=2.5e8)
    share = fraction_better(busy, LARGE, EDGE, Sweep(draws=400))
    assert 0.1 < share < 0.9
    by_profile = better_by_profile(busy, LARGE)
    assert by_profile["mobile-high"] and not by_profile["mobile-low"]
    again = fraction_better(busy, LARGE, EDGE, Sweep(draws=400))
    assert again == share != fraction_better(busy, LARGE, EDGE, Sweep(draws=400, seed=1))


def test_the_token_rate_is_drawn_and_vocabularies_keep_their_ratio() -> None:
    """Encoder saved by calls per token: even at four tokens per second, at either rate."""
    saved = 4 * 4_000_000 // 25 * 4
    base, follows = plan(60_000_000, 4_000_000, per_token=0.0), plan(60_000_000 - saved, 4_000_000)
    share = fraction_better(follows, base, EDGE, Sweep(draws=400))
    # log-uniform from 2 to 6; 4,000,000 t < 6.25 * saved at t < 4
    assert share == pytest.approx(0.63, abs=0.06)
    dense = plan(60_000_000 - saved, 4_000_000, tokens_per_s=2 * 3.4)
    assert fraction_better(dense, base, EDGE, Sweep(draws=400)) == 0.0
    assert fraction_better(dense, base, EDGE, Sweep(draws=50, tokens_per_s=(1.0, 1.9))) == 1.0


def test_a_placement_stays_as_it_was_made() -> None:
    """On the profile at hand the joiner lies in SRAM; a forced one stays where it was put."""
    near = plan(60_000_000, 2_000_000)
    forced = Plan(
        near.components, near.rates, 3.4, {"edge45": {"encoder": "dram", "joiner": "dram"}}
    )
    assert forced.energy(EDGE).placement["joiner.w"] == "dram"
    assert near.energy(EDGE).placement["joiner.w"] == "shared"
    assert fraction_better(near, forced, EDGE, SWEEP) == 1.0
    assert forced.energy(load_profile("mcu")).placement["joiner.w"] == "flash"


def test_memory_is_scaled_with_its_ratios() -> None:
    drawn = with_memory(EDGE, {"dram": 64.0, "sram": 1.25})
    assert [t.read_pj_per_byte.value for t in drawn.tiers] == [0.25, 1.25, 64.0]
    assert [t.write_pj_per_byte.value for t in drawn.tiers if t.write_pj_per_byte] == [
        0.25,
        1.25,
        64.0,
    ]
    assert {t.read_pj_per_byte.status for t in drawn.tiers} == {"assumed"}
    mcu = load_profile("mcu")
    flash = with_memory(mcu, {"dram": 64.0}).tiers[-1]
    assert flash.read_pj_per_byte.value == mcu.tiers[-1].read_pj_per_byte.value


def test_impossible_sweeps_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws is 0"):
        Sweep(draws=0)
    with pytest.raises(ConfigError, match="dram_pj_per_byte is 320 to 64; give the smaller"):
        Sweep(dram_pj_per_byte=(320, 64))
    with pytest.raises(ConfigError, match="the start of sram_pj_per_byte is 0; it must be"):
        Sweep(sram_pj_per_byte=(0, 64))
    with pytest.raises(ConfigError, match="tokens_per_s is 0"):
        fraction_better(LARGE, plan(1, 1, tokens_per_s=0), EDGE, SWEEP)
    odd = Plan(LARGE.components, {"encoder": CallRate(1.0)}, 3.4)
    with pytest.raises(InputError, match="calls are counted for encoder; the components are"):
        odd.energy(EDGE)
