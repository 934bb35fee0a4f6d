"""Hardware profiles: what a byte of each memory and a multiply-accumulate cost, and who says so.

A profile is a versioned TOML file; profiles/ holds the shipped ones. No constant of the field is
certain (published figures for DRAM alone differ by five), so every number has a status and a
source, and results are told for several profiles, never for one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from offramp.config import check_choice, check_counts, check_range, strict
from offramp.errors import ConfigError

SHIPPED = ("edge45", "mobile-low", "mobile-high", "mcu")
DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
KINDS = ("sram", "dram", "flash")
STATUSES = ("paper", "second-hand", "measured", "estimate", "assumed")

_FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Constant:
    """A number, how well it is known (one of STATUSES) and where it comes from.

    paper: read there by us; second-hand: as others print it; estimate: our arithmetic from such
    figures; assumed: no source.
    """

    value: float
    status: str
    source: str

    def __post_init__(self) -> None:
        check_range(0, value=self.value)
        check_choice(status=(self.status, STATUSES))
        _check_text(source=self.source)


@dataclass(frozen=True)
class Tier:
    """A memory. size_bytes None: unlimited. write_pj_per_byte None: not written during a run."""

    name: str
    kind: str
    size_bytes: Constant | None
    read_pj_per_byte: Constant
    write_pj_per_byte: Constant | None

    def __post_init__(self) -> None:
        _check_text(name=self.name)
        check_choice(kind=(self.kind, KINDS))
        if self.size_bytes is not None:
            check_counts(1, size_bytes=self.size_bytes.value)

    @property
    def size(self) -> float:
        """Bytes it holds, infinite where unlimited."""
        return float("inf") if self.size_bytes is None else self.size_bytes.value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        values = dict(values)
        words = {"size_bytes": "unlimited", "read_pj_per_byte": None, "write_pj_per_byte": "never"}
        for key, word in words.items():
            if key in values:
                values[key] = _constant(key, values[key], word)
        return strict(cls, values)


@dataclass(frozen=True)
class Profile:
    """A named, versioned device: tiers from small and cheap to large and dear, pJ per MAC by dtype.

    idle_mw: what it draws anyway, in mW; None: not known, hence not in any sum.
    """

    name: str
    version: int
    description: str
    tiers: tuple[Tier, ...]
    mac_pj: Mapping[str, Constant]
    idle_mw: Constant | None = None

    def __post_init__(self) -> None:
        _check_text(name=self.name, description=self.description)
        check_counts(1, version=self.version)
        if missing := [dtype for dtype in DTYPES if dtype not in self.mac_pj]:
            raise ConfigError(f"mac_pj lacks {', '.join(missing)}; add it")
        if unknown := sorted(set(self.mac_pj) - set(DTYPES)):
            raise ConfigError(
                f"mac_pj has no dtype {', '.join(unknown)}; allowed: {', '.join(DTYPES)}"
            )
        if not self.tiers:
            raise ConfigError("tiers are missing; list at least one")
        if len({tier.name for tier in self.tiers}) < len(self.tiers):
            raise ConfigError("two tiers have the same name; give each its own")
        for near, far in pairwise(self.tiers):
            _check_order(near, far)

    def tier(self, name: str) -> Tier:
        """ConfigError names what there is."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        names = ", ".join(tier.name for tier in self.tiers)
        raise ConfigError(f"profile {self.name} has no tier {name!r}; allowed: {names}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Strict: what is missing, unknown, negative or out of order is an error that names it."""
        values = dict(values)
        if "tiers" in values:
            values["tiers"] = tuple(_tiers(values["tiers"]))
        if "mac_pj" in values:
            table = _table("mac_pj", values["mac_pj"])
            with _at("mac_pj"):
                values["mac_pj"] = {key: _constant(key, raw) for key, raw in table.items()}
        if "idle_mw" in values:
            values["idle_mw"] = _constant("idle_mw", values["idle_mw"])
        return strict(cls, values)


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or the TOML file at a path.

    ConfigError: no such profile, or a file that is not one; it names file and key.
    """
    path = _FOLDER / f"{name}.toml" if name in SHIPPED else Path(name)
    if path.suffix != ".toml":
        raise ConfigError(
            f"no hardware profile {name!r}; allowed: {', '.join(SHIPPED)}, or the path of a .toml "
            "file"
        )
    with _at(str(path)):
        profile = Profile.from_dict(_read(path))
        if profile.name in SHIPPED and name not in SHIPPED:
            raise ConfigError(
                f"name is {profile.name!r}, a shipped profile's; give yours a name of its own"
            )
    return profile


def shipped_profiles() -> tuple[Profile, ...]:
    return tuple(load_profile(name) for name in SHIPPED)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ConfigError(f"is not TOML: {error}") from error


def _tiers(raw: Any) -> Iterator[Tier]:
    if not isinstance(raw, list):
        raise ConfigError(f"tiers is {raw!r}; write each as a [[tiers]] table")
    for at, values in enumerate(raw, 1):
        values = _table("tiers", values)
        with _at(f"tiers.{values.get('name', at)}"):
            yield Tier.from_dict(values)


def _constant(key: str, raw: Any, word: str | None = None) -> Any:
    """A Constant from its table; None where it is `word`, which stands for "no such number"."""
    if word is not None and raw == word:
        return None
    if not isinstance(raw, Mapping):
        allowed = "{ value, status, source }" + (f' or "{word}"' if word else "")
        raise ConfigError(f"{key} is {raw!r}; allowed: {allowed}")
    with _at(key):
        return strict(Constant, raw)


def _table(key: str, raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{key} is {raw!r}; it must be a table")
    return raw


def _check_order(near: Tier, far: Tier) -> None:
    """Later tiers are larger and no cheaper: the placement rules rely on it."""
    if near.size >= far.size:
        raise ConfigError(
            f"tiers are out of order: {far.name} is not larger than {near.name}; list them from "
            "small to large"
        )
    writes = [t.write_pj_per_byte.value for t in (near, far) if t.write_pj_per_byte is not None]
    if far.read_pj_per_byte.value < near.read_pj_per_byte.value or writes != sorted(writes):
        raise ConfigError(
            f"tiers are out of order: {far.name} costs less per byte than {near.name}; list them "
            "from cheap to dear"
        )


def _check_text(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{name} is {value!r}; it must be text")


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors inside say where they arose."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
