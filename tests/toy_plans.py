"""Planner's problems in toy size: invented curves and bytes, random or all alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from offramp.compress.plan import Choice
from offramp.compress.problem import Candidate, Problem, Setting
from offramp.compress.sensitivity import Increase
from offramp.energy.placement import Component, Part
from offramp.energy.profiles import Constant, Profile, Tier, load_profile

EDGE = load_profile("edge45")
NAMES = ("encoder", "predictor", "joiner")
LEVELS = (0.25, 0.5, 0.75)


def constant(value: float) -> Constant:
    return Constant(value, "assumed", "a test")


def device(name: str, *tiers: tuple[str, int | None, float]) -> Profile:
    """tiers: name, bytes, pJ per byte read and written."""
    made = tuple(
        Tier(tier, "sram", None if size is None else constant(size), constant(pj), constant(2 * pj))
        for tier, size, pj in tiers
    )
    return replace(EDGE, name=name, tiers=made)


def increase(value: float) -> Increase:
    return Increase(value, (value - 0.001, value + 0.001))


def component(name: str, stored: int, macs: float = 0.0, cache: int = 0) -> Component:
    parts = [Part("weights", stored, float(stored))]
    if cache:
        parts.append(Part("cache", cache, float(cache), cache / 2))
    return Component(name, tuple(parts), {"int8": macs})


def drawn(seed: int) -> Problem:
    """Three components, two of them with a method at three levels and 8 or 4 bits, two settings,
    two devices whose near memory they compete for."""
    draw = random.Random(seed)
    candidates = {}
    for name in NAMES:
        full, cache = draw.randint(40, 200), draw.choice([0, 0, 7])
        steep = draw.uniform(0.002, 0.02)
        found = []
        for bits in (32, 8, 4):
            for level in (0.0, *LEVELS):
                choice = Choice("magnitude" if level else "none", level, bits)
                cost = 0.0 if bits == 32 else draw.choice([0.0, 0.001, steep])
                cost += steep * (4**level - 1)
                stored = max(1, round(full * bits / 32 * (1 - level) * draw.uniform(0.9, 1.1)))
                made = tuple(component(name, stored, 10 * (1 - level), cache) for _ in range(2))
                found.append(Candidate(choice, increase(cost), made))
        candidates[name] = tuple(found)
    candidates["blank_head"] = (
        Candidate(
            Choice(), increase(0.0), (component("blank_head", 3), component("blank_head", 3))
        ),
    )
    calls = {name: draw.choice([1.0, 6.0, 25.0]) for name in candidates}
    longer = calls | {"encoder": calls["encoder"] / 2}
    settings = (
        Setting(320.0, None, increase(0.0), calls),
        Setting(640.0, 0.5, increase(draw.choice([-0.002, 0.004])), longer),
    )
    devices = (
        device("small", ("near", draw.randint(20, 90), 1.0), ("far", None, 30.0)),
        device(
            "large", ("near", 30, 1.0), ("mid", draw.randint(60, 260), 9.0), ("far", None, 50.0)
        ),
    )
    shares = tuple(dict.fromkeys(NAMES, level) for level in LEVELS)
    problem = Problem.of("toy", 0.2, candidates, settings, devices)
    return replace(problem, global_levels=shares)


def alike(
    cost: Callable[[float], float], levels: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
) -> Problem:
    """Three components of one size, called equally often, that all cost the same WER by level."""
    candidates = {
        name: tuple(
            Candidate(
                Choice("magnitude" if level else "none", level),
                increase(cost(level)),
                (component(name, round(1000 * (1 - level))),),
            )
            for level in levels
        )
        for name in NAMES
    }
    setting = Setting(320.0, None, increase(0.0), dict.fromkeys(NAMES, 10.0))
    return Problem.of("toy", 0.2, candidates, (setting,), (device("one", ("far", None, 30.0)),))
