"""The ranking of plans over draws of what hardware profiles take for granted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from offramp.energy.placement import Component, Part
from offramp.energy.profiles import Constant, Tier, load_profile, shipped_profiles
from offramp.energy.trace import CallRate
from offramp.energy.uncertainty import Draw, Plan, Sweep, distinct, fraction_better
from offramp.errors import ConfigError, InputError

EDGE, MCU = load_profile("edge45"), load_profile("mcu")
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


def test_less_of_everything_is_better_in_every_draw() -> None:
    small = plan(30_000_000, 2_000_000)
    for hardware in (EDGE, MCU):
        assert fraction_better(small, LARGE, hardware, SWEEP) == 1.0
        assert fraction_better(LARGE, small, hardware, SWEEP) == 0.0


def test_a_plan_does_not_beat_itself() -> None:
    assert fraction_better(LARGE, LARGE, EDGE, SWEEP) == 0.0


def test_what_hangs_on_the_constants_is_better_in_some() -> None:
    """Fewer bytes for more arithmetic, which pays while memory is dear."""
    busy = plan(20_000_000, 4_000_000, macs=2.5e8)
    share = fraction_better(busy, LARGE, EDGE, Sweep(draws=400))
    assert 0.1 < share < 0.9
    again = fraction_better(busy, LARGE, EDGE, Sweep(draws=400))
    assert again == share != fraction_better(busy, LARGE, EDGE, Sweep(draws=400, seed=1))
    cheap = Sweep(draws=400, mac_scale=(0.25, 0.25))
    assert fraction_better(busy, LARGE, EDGE, cheap) > share + 0.1, "arithmetic is drawn too"


def test_flash_is_drawn_where_it_is_what_counts() -> None:
    """On a microcontroller: bytes of flash against arithmetic."""
    busy = plan(20_000_000, 4_000_000, macs=7e8)
    shares = [
        fraction_better(busy, LARGE, MCU, Sweep(draws=300, flash_pj_per_byte=flash))
        for flash in ((200.0, 200.0), (200.0, 1000.0), (1000.0, 1000.0))
    ]
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1


def test_assumed_sizes_are_drawn_and_both_plans_placed_in_them() -> None:
    """The joiner of one fits 2 MiB, the smaller one of the other fits 1 MiB as well."""
    wide, narrow = plan(1000, 1_900_000), plan(4_000_000, 900_000)
    halves = Sweep(draws=50, size_scale=(0.5, 0.5))
    whole = Sweep(draws=50, size_scale=(1.0, 1.0))
    assert fraction_better(narrow, wide, EDGE, whole) == 0.0
    assert fraction_better(narrow, wide, EDGE, halves) == 1.0
    assert 0.3 < fraction_better(narrow, wide, EDGE, Sweep(draws=50)) < 0.7


def test_what_finds_no_room_loses_and_where_nothing_does_nothing_counts() -> None:
    """A cache cannot lie in flash, and the memory is 256 to 1024 KiB."""

    def cached(size: int) -> Plan:
        cache = Part("cache", size, size, written_bytes=1.0)
        encoder = Component("encoder", (cache,), {})
        return Plan((encoder, LARGE.components[1]), LARGE.rates, 3.4)

    fits, large, huge = cached(200_000), cached(600_000), cached(900_000)
    assert fraction_better(fits, large, MCU, SWEEP) == 1.0
    room = Sweep(draws=200, size_scale=(1.0, 4.0))
    assert fraction_better(large, huge, MCU, room) == 1.0
    assert fraction_better(huge, large, MCU, room) == 0.0
    with pytest.raises(InputError, match="no draw of mcu has room for either plan"):
        fraction_better(large, huge, MCU, Sweep(draws=20, size_scale=(0.5, 0.5)))


def test_the_token_rate_is_drawn_and_vocabularies_keep_their_ratio() -> None:
    """Encoder saved by calls per token: even at four tokens per second, at either rate."""
    saved = 4 * 4_000_000 // 25 * 4
    base, follows = plan(60_000_000, 4_000_000, per_token=0.0), plan(60_000_000 - saved, 4_000_000)
    sweep = Sweep(draws=400, size_scale=(1.0, 1.0))  # in larger memories the joiner lies near
    share = fraction_better(follows, base, EDGE, sweep)
    # log-uniform from 2 to 6; 4,000,000 t < 6.25 * saved at t < 4
    assert share == pytest.approx(0.63, abs=0.06)
    dense = plan(60_000_000 - saved, 4_000_000, tokens_per_s=2 * 3.4)
    assert fraction_better(dense, base, EDGE, sweep) == 0.0
    assert fraction_better(dense, base, EDGE, replace(sweep, tokens_per_s=(1.0, 1.9))) == 1.0


# -- draws ---------------------------------------------------------------------------------------


def test_memory_is_scaled_with_its_ratios() -> None:
    drawn = Draw(64.0, 1.25, 300.0, 0.5, 2.0, 3.0).hardware(EDGE)
    assert [t.read_pj_per_byte.value for t in drawn.tiers] == [0.25, 1.25, 64.0]
    written = [t.write_pj_per_byte.value for t in drawn.tiers if t.write_pj_per_byte]
    assert written == [0.25, 1.25, 64.0]
    assert {t.read_pj_per_byte.status for t in drawn.tiers} == {"assumed"}
    assert [t.size for t in drawn.tiers] == [65_536, 4_194_304, float("inf")]
    assert drawn.mac_pj["int8"].value == pytest.approx(0.15)
    flash = Draw(64.0, 1.25, 300.0, 1.0, 1.0, 3.0).hardware(MCU).tiers[-1]
    assert flash.read_pj_per_byte.value == pytest.approx(300.0) and not flash.write_pj_per_byte


def test_a_size_that_has_a_source_stays() -> None:
    known = Constant(32_768, "measured", "the data sheet")
    small = replace(EDGE, tiers=(replace(EDGE.tiers[0], size_bytes=known), *EDGE.tiers[1:]))
    drawn = Draw(64.0, 1.25, 300.0, 1.0, 2.0, 3.0).hardware(small)
    assert [t.size for t in drawn.tiers] == [32_768, 4_194_304, float("inf")]


def test_a_far_memory_is_never_cheaper_than_a_nearer_one() -> None:
    """Or it would be no profile: where both are there, DRAM may be drawn dearer than flash."""
    store = replace(MCU.tiers[-1], read_pj_per_byte=Constant(500, "assumed", "made up"))
    pj = Constant(160, "assumed", "made up")
    dram = Tier("dram", "dram", Constant(2**30, "assumed", "made up"), pj, pj)
    both = replace(MCU, name="both", tiers=(MCU.tiers[0], dram, store))
    drawn = Draw(320.0, 2.0, 200.0, 1.0, 1.0, 3.0).hardware(both)
    assert [t.read_pj_per_byte.value for t in drawn.tiers] == [2.0, 320.0, 320.0]


def test_every_range_is_drawn_from() -> None:
    generator, sweep = random.Random(0), Sweep()
    draws = [sweep.draw(generator) for _ in range(200)]
    for name in vars(draws[0]):
        low, high = getattr(sweep, name)
        values = [getattr(draw, name) for draw in draws]
        assert low <= min(values) < 1.1 * low and 0.9 * high < max(values) <= high


def test_profiles_that_differ_in_what_is_drawn_alone_are_one_hardware() -> None:
    groups = [[p.name for p in group] for group in distinct(shipped_profiles())]
    assert groups == [["edge45", "mobile-low", "mobile-high"], ["mcu"]]
    edge, low = EDGE, load_profile("mobile-low")
    busy = plan(20_000_000, 4_000_000, macs=2.5e8)
    shares = [fraction_better(busy, LARGE, profile, SWEEP) for profile in (edge, low)]
    assert shares[0] == shares[1], "so the second tells nothing new"
    other = replace(low, mac_pj={**low.mac_pj, "int4": Constant(0.2, "assumed", "made up")})
    assert len(distinct([edge, low, other])) == 2
    assert len(distinct([edge, replace(low, idle_mw=Constant(1.0, "assumed", "made up"))])) == 2


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
