"""Placement in tiers: as good as trying all, and a byte too many is too many."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from offramp.energy.placement import Component, Part, Placement, place, tiers_of
from offramp.energy.profiles import Constant, Profile, Tier, load_profile
from offramp.errors import ConfigError, InputError

EDGE = load_profile("edge45")


def constant(value: float) -> Constant:
    return Constant(value, "assumed", "a test")


def device(*tiers: tuple[str, int | None, float, float | None]) -> Profile:
    """tiers: name, size, pJ per byte read and written."""
    made = tuple(
        Tier(
            name,
            "sram",
            None if size is None else constant(size),
            constant(read),
            None if write is None else constant(write),
        )
        for name, size, read, write in tiers
    )
    return replace(EDGE, name="toy", tiers=made)


def one(name: str, *sizes: int) -> Component:
    """Matrices of these sizes, each read whole."""
    return Component(name, tuple(Part(f"w{at}", size, size) for at, size in enumerate(sizes)), {})


def energy(
    components: list[Component], calls: dict[str, float], profile: Profile, tiers: dict[str, str]
) -> float:
    found = tiers_of(components, profile, tiers)
    return sum(
        calls[c.name] * part.pj_per_call(found[c.key(part)]) for c in components for part in c.parts
    )


def least_by_trying_all(
    components: list[Component], calls: dict[str, float], profile: Profile
) -> float:
    keys = [c.key(part) for c in components for part in c.parts]
    best = math.inf
    for names in itertools.product([tier.name for tier in profile.tiers], repeat=len(keys)):
        try:
            pj = energy(components, calls, profile, dict(zip(keys, names, strict=True)))
        except InputError:
            continue
        best = min(best, pj)
    return best


def drawn(generator: random.Random) -> tuple[list[Component], dict[str, float], Profile]:
    components = []
    for name in "abc":
        parts = []
        for at in range(generator.randint(1, 2)):
            stored = generator.choice([1, 5, 5, 8, 13])
            written = generator.choice([0, 0, 0, stored / 2])
            parts.append(Part(f"w{at}", stored, generator.choice([1, stored]), written))
        components.append(Component(name, tuple(parts), {}))
    calls = {name: generator.choice([0.0, 1.0, 3.0, 25.0]) for name in "abc"}
    last = (None, 40.0, None) if generator.random() < 0.4 else (None, 40.0, 90.0)
    sizes = sorted(generator.sample(range(3, 20), 2))
    profile = device(("near", sizes[0], 1, 4), ("mid", sizes[1], 9, 9), ("far", *last))
    return components, calls, profile


def test_no_placement_takes_less_energy() -> None:
    generator = random.Random(0)
    better, refused = 0, 0
    for _ in range(80):
        components, calls, profile = drawn(generator)
        least = least_by_trying_all(components, calls, profile)
        if least == math.inf:
            with pytest.raises(InputError, match=r"found no room for .* in the memory of toy"):
                place(components, calls, profile)
            refused += 1
            continue
        found = place(components, calls, profile)
        assert found.exact
        assert energy(components, calls, profile, dict(found.tiers)) == pytest.approx(least)
        obvious = dict(place(components, calls, profile, max_nodes=0).tiers)
        assert energy(components, calls, profile, obvious) >= least * (1 - 1e-9)
        better += energy(components, calls, profile, obvious) > least * (1 + 1e-9)
    assert better > 0 and refused > 0  # so the cases are not all easy ones


def test_a_search_that_may_give_up_finds_the_same_or_nothing() -> None:
    generator = random.Random(2)
    given_up = 0
    for _ in range(40):
        components, calls, profile = drawn(generator)
        least = least_by_trying_all(components, calls, profile)
        if least == math.inf:
            continue
        found = place(components, calls, profile, at_most=least)
        assert energy(components, calls, profile, dict(found.tiers)) == pytest.approx(least)
        if least:
            with pytest.raises(InputError, match="no placement in the memory of toy takes so"):
                place(components, calls, profile, at_most=0.999 * least)
            given_up += 1
    assert given_up > 10


def obvious_rule(
    components: list[Component], calls: dict[str, float], profile: Profile
) -> dict[str, str]:
    free = {tier.name: tier.size for tier in profile.tiers}
    parts = [(c, part) for c in components for part in c.parts]
    parts.sort(key=lambda p: -calls[p[0].name] * p[1].read_bytes / p[1].stored_bytes)
    found = {}
    for component, part in parts:
        name = next(n for n in free if free[n] >= part.stored_bytes)
        free[name] -= part.stored_bytes
        found[component.key(part)] = name
    return found


def test_without_search_it_is_the_obvious_rule() -> None:
    generator = random.Random(1)
    profile = device(("near", 20, 1, 1), ("mid", 100, 9, 9), ("far", None, 40, 40))
    for _ in range(20):
        components = [one(name, *generator.sample(range(1, 60), 4)) for name in "abcd"]
        calls = {name: generator.uniform(1, 30) for name in "abcd"}
        for at, component in enumerate(components):  # no ties, which either may break its own way
            parts = tuple(
                replace(p, read_bytes=generator.uniform(1, p.stored_bytes)) for p in component.parts
            )
            components[at] = replace(component, parts=parts)
        found = place(components, calls, profile, max_nodes=0)
        assert found.tiers == obvious_rule(components, calls, profile)


def test_the_dearest_byte_first_is_not_always_best() -> None:
    """6 bytes often read keep out 10 bytes that are read nearly as often."""
    components = [one("small", 6), one("large", 10)]
    profile, calls = device(("near", 10, 1, 1), ("far", None, 100, 100)), {"small": 11, "large": 10}
    assert place(components, calls, profile, max_nodes=0).tiers == {
        "small.w0": "near",
        "large.w0": "far",
    }
    assert place(components, calls, profile) == Placement(
        {"small.w0": "far", "large.w0": "near"}, True
    )


def test_a_component_may_be_split_by_matrix() -> None:
    components = [one("joiner", 30, 30, 30)]
    profile = device(("near", 60, 1, 1), ("far", None, 100, 100))
    found = place(components, {"joiner": 25.0}, profile)
    assert sorted(found.tiers.values()) == ["far", "near", "near"]


def test_many_equal_layers_are_placed_soon() -> None:
    """One order of equal parts stands for all, and 99 bytes that no part fills count for none."""
    components = [one(f"layer{at:02}", 1000, 300) for at in range(60)]
    calls = {c.name: 6.25 for c in components}
    profile = device(("near", 4999, 1, 1), ("mid", 33_333, 9, 9), ("far", None, 100, 100))
    found = place(components, calls, profile)
    assert found.exact
    used = {tier: 0 for tier in ("near", "mid", "far")}
    for component in components:
        for part in component.parts:
            used[found.tiers[component.key(part)]] += part.stored_bytes
    assert (used["near"], used["mid"]) == (4900, 33_300)


def test_a_search_that_is_cut_short_says_so_and_still_beats_the_obvious_rule() -> None:
    generator = random.Random(3)
    components = [one(f"c{at}", generator.randint(300, 999)) for at in range(40)]
    calls = {c.name: generator.uniform(9, 11) for c in components}
    profile = device(("near", 5000, 1, 1), ("far", None, 100, 100))
    found, obvious = (place(components, calls, profile, max_nodes=n) for n in (300, 0))
    assert not found.exact
    assert energy(components, calls, profile, dict(found.tiers)) < energy(
        components, calls, profile, dict(obvious.tiers)
    )


def test_one_byte_too_many_is_rejected() -> None:
    """The reference's trap: half of a joiner of 4,199,425 int8 weights exceeds 2 MiB."""
    half = 4_199_425 // 2
    assert half == 2_099_712 > 2**21
    for size, allowed in ((2**21, True), (2**21 + 1, False), (half, False)):
        joiner = one("joiner", size)
        if allowed:
            assert tiers_of([joiner], EDGE, {"joiner": "shared"})["joiner.w0"].name == "shared"
        else:
            with pytest.raises(InputError, match=rf"shared of edge45 holds 2097152 .* hold {size}"):
                tiers_of([joiner], EDGE, {"joiner": "shared"})
        assert place([joiner], {"joiner": 28.4}, EDGE).tiers == {
            "joiner.w0": "shared" if allowed else "dram"
        }


def test_index_and_scales_that_are_stored_take_room_too() -> None:
    parts = (Part("values", 2**21 - 100, 1), Part("index", 80, 1), Part("scales", 21, 1))
    with pytest.raises(InputError, match=r"with joiner.scales it would have to hold 2097153"):
        tiers_of([Component("joiner", parts, {})], EDGE, {"joiner": "shared"})


def test_what_is_written_does_not_go_to_flash() -> None:
    mcu = load_profile("mcu")
    busy = Component("joiner", (Part("w", 400_000, 400_000),), {})
    cache = Component("encoder", (Part("left_context", 200_000, 10, 5),), {})
    calls = {"joiner": 25.0, "encoder": 1.0}
    found = place([busy, cache], calls, mcu).tiers
    assert found == {"joiner.w": "flash", "encoder.left_context": "sram"}
    with pytest.raises(
        InputError, match="left_context is written in every call; tier flash is read"
    ):
        tiers_of([cache], mcu, {"encoder": "flash"})
    large = replace(cache, parts=(Part("left_context", 600_000, 10, 5),))
    with pytest.raises(InputError, match="found no room for 600000 bytes in the memory of mcu"):
        place([large], calls, mcu)


def test_a_search_that_finds_no_room_ends() -> None:
    """Bin packing proper: no two of 30 parts fit together, and 29 boxes hold one each."""
    components = [Component("c", tuple(Part(f"w{at}", 501 + at, 1) for at in range(30)), {})]
    boxes = ((f"box{at}", 1000 + at, 1.0, 1.0) for at in range(29))
    with pytest.raises(InputError, match="found no room for 15465 bytes in the memory of toy"):
        place(components, {"c": 1.0}, device(*boxes))


def test_placements_that_name_something_else_are_refused() -> None:
    joiner = one("joiner", 10, 20)
    with pytest.raises(InputError, match="the placement names joyner, which the model does not"):
        tiers_of([joiner], EDGE, {"joyner": "dram"})
    with pytest.raises(InputError, match=r"the placement lacks joiner.w1; give it a tier"):
        tiers_of([joiner], EDGE, {"joiner.w0": "dram"})
    with pytest.raises(ConfigError, match="no tier 'L1'; allowed: local, shared, dram"):
        tiers_of([joiner], EDGE, {"joiner": "L1"})
    both = tiers_of([joiner], EDGE, {"joiner": "dram", "joiner.w1": "local"})
    assert {key: tier.name for key, tier in both.items()} == {
        "joiner.w0": "dram",
        "joiner.w1": "local",
    }
    with pytest.raises(InputError, match="joiner has two parts 'w'; give each its own name"):
        Component("joiner", (Part("w", 1, 1), Part("w", 2, 2)), {})
    with pytest.raises(ConfigError, match="stored_bytes is 0; it must be a whole number"):
        Part("w", 0, 0)
