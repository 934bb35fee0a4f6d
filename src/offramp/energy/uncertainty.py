"""How sure "plan A takes less energy than plan B" is, when no constant is.

The absolute figures follow the constants; the ranking is the claim. It is tested twice: in every
profile, and over random draws of what the profiles take for granted. Profiles that differ only in
what is drawn are one piece of hardware here, and count once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from offramp.config import check_counts, check_positive
from offramp.energy.modelled import ModelledEnergy, modelled_energy
from offramp.energy.placement import Component, place
from offramp.energy.profiles import Constant, Profile, Tier
from offramp.energy.trace import CallRate
from offramp.errors import ConfigError, InputError


@dataclass(frozen=True)
class Plan:
    """A model as it would run: its components, how often each is called, at which token rate."""

    components: tuple[Component, ...]
    rates: Mapping[str, CallRate]
    tokens_per_s: float

    def calls_per_s(self, speech_rate: float = 1.0) -> dict[str, float]:
        """By component, for speech that is `speech_rate` times as dense in tokens."""
        return {name: rate.at(self.tokens_per_s * speech_rate) for name, rate in self.rates.items()}

    def energy(self, profile: Profile) -> ModelledEnergy:
        """On `profile`, placed where it takes least."""
        return modelled_energy(self.components, self.calls_per_s(), profile)


@dataclass(frozen=True)
class Sweep:
    """Ranges of which draws are log-uniform; of memory in pJ per byte, read.

    sram_pj_per_byte and the like: of the largest tier of the kind; smaller ones keep their ratio to
    it, as writing keeps its ratio to reading. mac_scale: times every pJ per MAC; 0.25 is about 7 nm
    (Jouppi et al., ISCA 2021, second-hand). size_scale: times every size of a tier that is assumed.
    tokens_per_s: of the baseline; the plan's keeps its ratio to that, since vocabularies differ.

    DRAM and SRAM are published ranges; flash and the ranges of both scales are assumed.
    """

    dram_pj_per_byte: tuple[float, float] = (64.0, 320.0)
    sram_pj_per_byte: tuple[float, float] = (1.25, 12.5)
    flash_pj_per_byte: tuple[float, float] = (200.0, 1000.0)
    mac_scale: tuple[float, float] = (0.25, 2.0)
    size_scale: tuple[float, float] = (0.5, 2.0)
    tokens_per_s: tuple[float, float] = (2.0, 6.0)
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(1, draws=self.draws)
        for name in _DRAWN:
            low, high = getattr(self, name)
            check_positive(**{f"the start of {name}": low, f"the end of {name}": high})
            if low > high:
                raise ConfigError(f"{name} is {low} to {high}; give the smaller number first")

    def draw(self, generator: random.Random) -> Draw:
        return Draw(**{name: _log_uniform(generator, getattr(self, name)) for name in _DRAWN})


@dataclass(frozen=True)
class Draw:
    """One of each range of a `Sweep`."""

    dram_pj_per_byte: float
    sram_pj_per_byte: float
    flash_pj_per_byte: float
    mac_scale: float
    size_scale: float
    tokens_per_s: float

    def hardware(self, profile: Profile) -> Profile:
        """`profile` with what was drawn; a far tier is never drawn cheaper than a nearer one."""
        last = {tier.kind: tier.read_pj_per_byte.value for tier in profile.tiers}
        tiers, nearer = list[Tier](), 0.0
        for tier in profile.tiers:
            scale, own = 1.0, tier.read_pj_per_byte.value
            if own:
                scale = getattr(self, f"{tier.kind}_pj_per_byte") / last[tier.kind]
                scale = max(scale, nearer / own)
            tiers.append(_scaled(tier, scale, self.size_scale))
            nearer = tiers[-1].read_pj_per_byte.value
        macs = {dtype: _times(pj, self.mac_scale) for dtype, pj in profile.mac_pj.items()}
        return replace(profile, tiers=tuple(tiers), mac_pj=macs)


_DRAWN = tuple(f.name for f in fields(Draw))
DEFAULT_SWEEP = Sweep()


def fraction_better(
    plan: Plan, baseline: Plan, profile: Profile, sweep: Sweep = DEFAULT_SWEEP
) -> float:
    """Share of draws in which `plan` takes less energy than `baseline`.

    What is not drawn is as in `profile`. Both are placed anew in every draw, by the obvious rule
    (`placement.place`). One that finds no room loses to one that does; draws in which neither does
    do not count. InputError: none counts.
    """
    check_positive(tokens_per_s=baseline.tokens_per_s)
    generator = random.Random(sweep.seed)
    better = counted = 0
    for _ in range(sweep.draws):
        draw = sweep.draw(generator)
        hardware, rate = draw.hardware(profile), draw.tokens_per_s / baseline.tokens_per_s
        ours, theirs = (_mj(p, hardware, rate) for p in (plan, baseline))
        counted += min(ours, theirs) < math.inf
        better += ours < theirs
    if not counted:
        raise InputError(
            f"no draw of {profile.name} has room for either plan; take smaller models, or draw "
            "larger memories"
        )
    return better / counted


def distinct(profiles: Sequence[Profile]) -> list[tuple[Profile, ...]]:
    """The profiles in groups that draws make the same hardware of."""
    draw = Draw(*(1.0 for _ in _DRAWN))
    groups: dict[Any, list[Profile]] = {}
    for profile in profiles:
        hardware = draw.hardware(profile)
        tiers = tuple(
            (t.kind, t.size, _rounded(t.read_pj_per_byte), _rounded(t.write_pj_per_byte))
            for t in hardware.tiers
        )
        macs = tuple((dtype, _rounded(pj)) for dtype, pj in sorted(hardware.mac_pj.items()))
        groups.setdefault((tiers, macs, _rounded(hardware.idle_mw)), []).append(profile)
    return [tuple(group) for group in groups.values()]


def _mj(plan: Plan, profile: Profile, rate: float) -> float:
    """Per audio second; infinite where it finds no room."""
    calls = plan.calls_per_s(rate)
    try:
        tiers = place(plan.components, calls, profile, max_nodes=0).tiers
    except InputError:
        return math.inf
    return modelled_energy(plan.components, calls, profile, tiers).mj_per_audio_s


def _scaled(tier: Tier, energy: float, size: float) -> Tier:
    write, room = tier.write_pj_per_byte, tier.size_bytes
    if room is not None and room.status == "assumed":
        room = Constant(max(1, round(room.value * size)), "assumed", "drawn")
    return replace(
        tier,
        size_bytes=room,
        read_pj_per_byte=_times(tier.read_pj_per_byte, energy),
        write_pj_per_byte=_times(write, energy) if write else None,
    )


def _times(constant: Constant, scale: float) -> Constant:
    return Constant(constant.value * scale, "assumed", "drawn")


def _rounded(constant: Constant | None) -> float | None:
    """Without what another order of the same sums would change."""
    return None if constant is None else float(f"{constant.value:.9g}")


def _log_uniform(generator: random.Random, limits: tuple[float, float]) -> float:
    return math.exp(generator.uniform(math.log(limits[0]), math.log(limits[1])))
