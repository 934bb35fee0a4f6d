"""How sure "plan A takes less energy than plan B" is, when no constant is.

The absolute figures follow the constants; the ranking is the claim. It is tested twice: in every
shipped profile, and over random draws of the constants that matter most.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from offramp.config import check_counts, check_positive
from offramp.energy.modelled import ModelledEnergy, modelled_energy
from offramp.energy.placement import Component
from offramp.energy.profiles import Constant, Profile, Tier, shipped_profiles
from offramp.energy.trace import CallRate
from offramp.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """A model as it would run: its components, how often each is called, at which token rate.

    placements: by profile name, tier by component or `component.part`; where there is none for a
    profile, the placement of least energy.
    """

    components: tuple[Component, ...]
    rates: Mapping[str, CallRate]
    tokens_per_s: float
    placements: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def energy(self, profile: Profile, speech_rate: float = 1.0) -> ModelledEnergy:
        """On `profile`, for speech that is `speech_rate` times as dense in tokens."""
        tokens_per_s = self.tokens_per_s * speech_rate
        calls = {name: rate.at(tokens_per_s) for name, rate in self.rates.items()}
        return modelled_energy(self.components, calls, profile, self.placements.get(profile.name))


@dataclass(frozen=True)
class Sweep:
    """Ranges of which draws are log-uniform; those of memory in pJ/B, read.

    sram_pj_per_byte: of the largest SRAM; smaller ones keep their ratio to it, as writing keeps
    its ratio to reading. tokens_per_s: of the baseline; the plan's keeps its ratio to that, since
    vocabularies differ.
    """

    dram_pj_per_byte: tuple[float, float] = (64.0, 320.0)
    sram_pj_per_byte: tuple[float, float] = (1.25, 12.5)
    tokens_per_s: tuple[float, float] = (2.0, 6.0)
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(1, draws=self.draws)
        for name in ("dram_pj_per_byte", "sram_pj_per_byte", "tokens_per_s"):
            low, high = getattr(self, name)
            check_positive(**{f"the start of {name}": low, f"the end of {name}": high})
            if low > high:
                raise ConfigError(f"{name} is {low} to {high}; give the smaller number first")


DEFAULT_SWEEP = Sweep()


def fraction_better(
    plan: Plan, baseline: Plan, profile: Profile, sweep: Sweep = DEFAULT_SWEEP
) -> float:
    """Share of draws in which `plan` takes less energy than `baseline`, each placed once, before.

    Constants that are not drawn are those of `profile`.
    """
    check_positive(tokens_per_s=baseline.tokens_per_s)
    plan, baseline = _settled(plan, profile), _settled(baseline, profile)
    generator = random.Random(sweep.seed)
    better = 0
    for _ in range(sweep.draws):
        dram, sram, tokens_per_s = (
            _log_uniform(generator, limits)
            for limits in (sweep.dram_pj_per_byte, sweep.sram_pj_per_byte, sweep.tokens_per_s)
        )
        drawn = with_memory(profile, {"dram": dram, "sram": sram})
        rate = tokens_per_s / baseline.tokens_per_s
        energies = (p.energy(drawn, rate).mj_per_audio_s for p in (plan, baseline))
        better += next(energies) < next(energies)
    return better / sweep.draws


def better_by_profile(
    plan: Plan, baseline: Plan, profiles: Sequence[Profile] | None = None
) -> dict[str, bool]:
    """Whether `plan` takes less energy than `baseline`, by profile name (None: those we ship).

    Only what is better in all of them is robustly better.
    """
    return {
        profile.name: plan.energy(profile).mj_per_audio_s < baseline.energy(profile).mj_per_audio_s
        for profile in (shipped_profiles() if profiles is None else profiles)
    }


def with_memory(profile: Profile, pj_per_byte: Mapping[str, float]) -> Profile:
    """`profile` with other memory: by kind, what reading a byte of its largest tier takes.

    Other tiers of the kind keep their ratio to it, and writing its ratio to reading.
    """
    last = {tier.kind: tier.read_pj_per_byte.value for tier in profile.tiers}
    scales = {kind: pj / last[kind] for kind, pj in pj_per_byte.items() if kind in last}
    tiers = (_scaled(tier, scales.get(tier.kind, 1.0)) for tier in profile.tiers)
    return replace(profile, tiers=tuple(tiers))


def _settled(plan: Plan, profile: Profile) -> Plan:
    placement = plan.energy(profile).placement
    return replace(plan, placements={profile.name: placement})


def _scaled(tier: Tier, scale: float) -> Tier:
    def scaled(constant: Constant) -> Constant:
        return Constant(constant.value * scale, "assumed", "drawn")

    write = tier.write_pj_per_byte
    return replace(
        tier,
        read_pj_per_byte=scaled(tier.read_pj_per_byte),
        write_pj_per_byte=scaled(write) if write else None,
    )


def _log_uniform(generator: random.Random, limits: tuple[float, float]) -> float:
    return math.exp(generator.uniform(math.log(limits[0]), math.log(limits[1])))
