"""What lies in which memory: weights and caches, the tiers of a profile, and who gets the near one.

The energy of a byte differs tenfold and more between tiers, so a small matrix that is read often
belongs in the small memory. That is a 0/1 knapsack with several knapsacks: solved exactly by
branch and bound where that ends soon, and never worse than the obvious rule (most energy per
stored byte first, into the nearest tier that has room).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from offramp.config import check_counts, check_range
from offramp.energy.profiles import Profile, Tier
from offramp.errors import InputError

MAX_NODES = 5_000  # under a second for a hundred parts


@dataclass(frozen=True)
class Part:
    """Bytes that are placed as one: a matrix, a whole component's weights, a cache.

    stored_bytes: packed, with index and scales. read_bytes, written_bytes: per call, on average;
    of an embedding one row. Weights are never written.
    """

    name: str
    stored_bytes: int
    read_bytes: float
    written_bytes: float = 0.0

    def __post_init__(self) -> None:
        check_counts(1, stored_bytes=self.stored_bytes)
        check_range(0, read_bytes=self.read_bytes, written_bytes=self.written_bytes)

    def fits(self, tier: Tier) -> bool:
        """Whether it may lie there alone."""
        writable = tier.write_pj_per_byte is not None or not self.written_bytes
        return writable and self.stored_bytes <= tier.size

    def pj_per_call(self, tier: Tier) -> float:
        """Energy of one call's traffic from and to `tier`."""
        written = self.written_bytes * tier.write_pj_per_byte.value if tier.write_pj_per_byte else 0
        return self.read_bytes * tier.read_pj_per_byte.value + written


@dataclass(frozen=True)
class Component:
    """What is called as one. macs: multiply-accumulates per call, by dtype of the profile."""

    name: str
    parts: tuple[Part, ...]
    macs: Mapping[str, float]

    def __post_init__(self) -> None:
        check_range(0, **self.macs)
        names = [part.name for part in self.parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{self.name} has two parts {twice[0]!r}; give each its own name")

    def key(self, part: Part) -> str:
        """Of a part in a placement."""
        return f"{self.name}.{part.name}"


@dataclass(frozen=True)
class Placement:
    """Tier of every part, by `component.part`. exact: no other has less energy."""

    tiers: Mapping[str, str]
    exact: bool


@dataclass(frozen=True)
class _Item:
    key: str
    part: Part
    pj_per_s: tuple[float, ...]  # by tier; infinite where it must not lie
    least: tuple[float, ...]  # the same or less, if any tier would do, and never falling
    traffic: float  # bytes per second

    @property
    def density(self) -> float:
        return self.traffic / self.part.stored_bytes

    def same(self, other: _Item) -> bool:
        return (self.part.stored_bytes, self.pj_per_s) == (other.part.stored_bytes, other.pj_per_s)


def tiers_of(
    components: Sequence[Component], profile: Profile, placement: Mapping[str, str]
) -> dict[str, Tier]:
    """The tier of every part, by `component.part`; `placement` names parts or whole components.

    InputError: a part without a place, a name that is none, or a tier that is too small, even by
    one byte. ConfigError: no such tier.
    """
    found: dict[str, Tier] = {}
    used: dict[str, int] = {}
    known = {c.name for c in components} | {c.key(p) for c in components for p in c.parts}
    if unknown := sorted(set(placement) - known):
        raise InputError(f"the placement names {', '.join(unknown)}, which the model does not have")
    for component in components:
        for part in component.parts:
            key = component.key(part)
            name = placement.get(key, placement.get(component.name))
            if name is None:
                raise InputError(f"the placement lacks {key}; give it a tier of {profile.name}")
            tier = found[key] = profile.tier(name)
            if part.written_bytes and tier.write_pj_per_byte is None:
                raise InputError(f"{key} is written in every call; tier {name} is read only")
            used[name] = used.get(name, 0) + part.stored_bytes
            if used[name] > tier.size:
                raise InputError(
                    f"tier {name} of {profile.name} holds {tier.size:.0f} bytes; with {key} it "
                    f"would have to hold {used[name]}; move or prune something"
                )
    return found


def place(
    components: Sequence[Component],
    calls_per_s: Mapping[str, float],
    profile: Profile,
    max_nodes: int = MAX_NODES,
    at_most: float = math.inf,
) -> Placement:
    """The placement of least energy, or the best found within `max_nodes` steps of the search.

    The first one found, and the only one with `max_nodes` 0, is the obvious rule's: most energy
    per stored byte first, into the nearest tier that has room (before all else, though, what must
    not lie in the far tier, since that is read only). calls_per_s: by component. at_most: pJ per
    second of traffic; a search that need not find more than it ends sooner. InputError: no room
    was found, or none within that.
    """
    items = _items(components, calls_per_s, profile)
    tiers, exact = _search(items, profile, max_nodes, at_most)
    return Placement(
        {i.key: profile.tiers[t].name for i, t in zip(items, tiers, strict=True)}, exact
    )


def _items(
    components: Sequence[Component], calls_per_s: Mapping[str, float], profile: Profile
) -> list[_Item]:
    """In the order of the obvious rule."""
    items = []
    # Never falling from tier to tier, as the bound needs it.
    pj_per_byte = [*accumulate((_least_pj(tier) for tier in profile.tiers[::-1]), min)][::-1]
    for component in components:
        calls = calls_per_s[component.name]
        for part in component.parts:
            traffic = calls * (part.read_bytes + part.written_bytes)
            pj = (calls * part.pj_per_call(t) if part.fits(t) else math.inf for t in profile.tiers)
            least = tuple(traffic * least_pj for least_pj in pj_per_byte)
            items.append(_Item(component.key(part), part, tuple(pj), least, traffic))
    return sorted(
        items, key=lambda i: (i.pj_per_s[-1] < math.inf, -i.density, -i.part.stored_bytes)
    )


def _least_pj(tier: Tier) -> float:
    write = tier.write_pj_per_byte
    return min(tier.read_pj_per_byte.value, write.value if write else math.inf)


def _search(
    items: list[_Item], profile: Profile, max_nodes: int, at_most: float
) -> tuple[list[int], bool]:
    """Depth first, nearest tier first, so that the first leaf is the obvious rule's."""
    # Room that no sum of parts fills is no room: it would only keep the bound from closing.
    unit = math.gcd(*(item.part.stored_bytes for item in items)) or 1
    sizes = tuple(
        tier.size if tier.size == math.inf else tier.size // unit * unit for tier in profile.tiers
    )
    rest = [sorted(items[at:], key=lambda i: -i.density) for at in range(len(items) + 1)]
    best: list[int] | None = None
    best_pj, nodes = at_most * (1 + 1e-9), 0
    stack: list[tuple[float, tuple[float, ...], list[int]]] = [(0.0, sizes, [])]
    while stack:
        pj, free, taken = stack.pop()
        if pj + _bound(rest[len(taken)], free) >= best_pj * (1 - 1e-12):
            continue
        if len(taken) == len(items):
            best, best_pj = taken, pj
            continue
        nodes += 1
        if nodes > max_nodes + len(items) and best is not None:
            return best, False
        if nodes > max_nodes + len(items) + MAX_NODES:
            break
        stack.extend(reversed(list(_children(items, pj, free, taken))))
    if best is not None:
        return best, True
    if at_most < math.inf:
        raise InputError(f"no placement in the memory of {profile.name} takes so little energy")
    raise _no_room(items, profile)


def _children(
    items: list[_Item], pj: float, free: tuple[float, ...], taken: list[int]
) -> Iterator[tuple[float, tuple[float, ...], list[int]]]:
    """Every tier with room for the next item; never nearer than an equal item before it."""
    item = items[len(taken)]
    first = taken[-1] if taken and item.same(items[len(taken) - 1]) else 0
    for tier in range(first, len(free)):
        left = free[tier] - item.part.stored_bytes
        if left >= 0 and item.pj_per_s[tier] < math.inf:
            room = (*free[:tier], left, *free[tier + 1 :])
            yield pj + item.pj_per_s[tier], room, [*taken, tier]


def _bound(items: list[_Item], free: tuple[float, ...]) -> float:
    """At least what `items`, densest first, cost if they could be cut anywhere."""
    pj, tier, room = 0.0, 0, free[0]
    for item in items:
        left: float = item.part.stored_bytes
        while left > room:
            pj += item.least[tier] * (room / item.part.stored_bytes)
            left -= room
            tier += 1
            if tier == len(free):
                return math.inf
            room = free[tier]
        pj += item.least[tier] * (left / item.part.stored_bytes)
        room -= left
    return pj


def _no_room(items: list[_Item], profile: Profile) -> InputError:
    stored = sum(item.part.stored_bytes for item in items)
    sizes = ", ".join(f"{tier.name} {tier.size:.0f}" for tier in profile.tiers)
    return InputError(
        f"found no room for {stored} bytes in the memory of {profile.name} ({sizes} bytes); take a "
        "smaller model"
    )
