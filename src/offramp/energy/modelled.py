"""Modelled energy: how often a component runs, times what it moves and from which memory.

    energy per audio second = sum of calls/s * (bytes * pJ/byte of their tier + MACs * pJ/MAC)

The premise of arXiv 2402.13076 is that such traffic, not arithmetic and not size, sets the power
of on-device recognition. What comes out is a model's figure under one published table of
constants; what a sensor says is `meter.Measured`, another type, and the two never meet in a sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offramp.config import check_range
from offramp.energy.placement import Component, place, tiers_of
from offramp.energy.profiles import Profile, Tier
from offramp.errors import ConfigError, InputError

_PJ_PER_MJ = 1e9


@dataclass(frozen=True)
class ComponentEnergy:
    """A component's work and modelled energy per audio second.

    weight_bytes_per_s: read; cache_bytes_per_s: read and written, of parts that calls write.
    tiers: stored bytes by tier, nearest first.
    """

    name: str
    calls_per_s: float
    weight_bytes_per_s: float
    cache_bytes_per_s: float
    macs_per_s: float
    tiers: Mapping[str, int]
    memory_mj_per_audio_s: float
    mac_mj_per_audio_s: float

    @property
    def mj_per_audio_s(self) -> float:
        return self.memory_mj_per_audio_s + self.mac_mj_per_audio_s


@dataclass(frozen=True)
class ModelledEnergy:
    """Millijoules per audio second (mW, where audio comes in as it is spoken) on one profile.

    placement: tier by `component.part`. The profile's idle power, if it is known, is in the sum.
    """

    profile: Profile
    components: tuple[ComponentEnergy, ...]
    placement: Mapping[str, str]

    @property
    def label(self) -> str:
        """Belongs beside every figure taken from here."""
        profile = f"profile {self.profile.name} version {self.profile.version}"
        return f"modelled, memory-traffic energy, {profile}; not measured"

    @property
    def idle_mj_per_audio_s(self) -> float:
        return self.profile.idle_mw.value if self.profile.idle_mw else 0.0

    @property
    def mj_per_audio_s(self) -> float:
        return math.fsum(c.mj_per_audio_s for c in self.components) + self.idle_mj_per_audio_s

    @property
    def share_percent(self) -> dict[str, float]:
        """Of each component, and of `idle` where it is known; {} where nothing was spent."""
        parts = {c.name: c.mj_per_audio_s for c in self.components}
        if self.profile.idle_mw:
            parts["idle"] = self.idle_mj_per_audio_s
        total = self.mj_per_audio_s
        return {name: 100 * part / total for name, part in parts.items()} if total else {}

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with every constant of the profile and its provenance."""
        rows = [
            asdict(c)
            | {"mj_per_audio_s": c.mj_per_audio_s, "share_percent": self.share_percent.get(c.name)}
            for c in self.components
        ]
        return {
            "kind": "modelled",
            "label": self.label,
            "mj_per_audio_s": self.mj_per_audio_s,
            "idle_mj_per_audio_s": self.idle_mj_per_audio_s if self.profile.idle_mw else None,
            "components": rows,
            "placement": dict(self.placement),
            "profile": asdict(self.profile),
        }


def modelled_energy(
    components: Sequence[Component],
    calls_per_s: Mapping[str, float],
    profile: Profile,
    placement: Mapping[str, str] | None = None,
) -> ModelledEnergy:
    """Energy of `components` that run so often per audio second.

    placement: tier by component or by `component.part`; None: the one of least energy.
    InputError: names that do not match, or a placement that does not fit.
    """
    names = [component.name for component in components]
    if len(set(names)) < len(names) or set(names) != set(calls_per_s):
        raise InputError(
            f"calls are counted for {', '.join(calls_per_s)}; the components are "
            f"{', '.join(names)}; count each of them once"
        )
    check_range(0, **calls_per_s)
    if placement is None:
        placement = place(components, calls_per_s, profile).tiers
    tiers = tiers_of(components, profile, placement)
    rows = tuple(_row(c, calls_per_s[c.name], profile, tiers) for c in components)
    return ModelledEnergy(profile, rows, {key: tier.name for key, tier in tiers.items()})


def _row(
    component: Component, calls_per_s: float, profile: Profile, tiers: Mapping[str, Tier]
) -> ComponentEnergy:
    weights = caches = memory_pj = 0.0
    stored = {tier.name: 0 for tier in profile.tiers}
    for part in component.parts:
        tier = tiers[component.key(part)]
        stored[tier.name] += part.stored_bytes
        memory_pj += part.pj_per_call(tier)
        if part.written_bytes:
            caches += part.read_bytes + part.written_bytes
        else:
            weights += part.read_bytes
    mac_pj = math.fsum(
        count * _mac_pj(component, dtype, profile) for dtype, count in component.macs.items()
    )
    return ComponentEnergy(
        name=component.name,
        calls_per_s=calls_per_s,
        weight_bytes_per_s=calls_per_s * weights,
        cache_bytes_per_s=calls_per_s * caches,
        macs_per_s=calls_per_s * sum(component.macs.values()),
        tiers={name: size for name, size in stored.items() if size},
        memory_mj_per_audio_s=calls_per_s * memory_pj / _PJ_PER_MJ,
        mac_mj_per_audio_s=calls_per_s * mac_pj / _PJ_PER_MJ,
    )


def _mac_pj(component: Component, dtype: str, profile: Profile) -> float:
    if dtype not in profile.mac_pj:
        raise ConfigError(
            f"{component.name} computes in {dtype!r}; allowed: {', '.join(profile.mac_pj)}"
        )
    return profile.mac_pj[dtype].value
