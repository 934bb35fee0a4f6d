"""Recipe files: a short Python file that defines `recipe`, and settings that override its own."""

from __future__ import annotations

import dataclasses
import json
import runpy
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from offramp.errors import ConfigError
from offramp.train.loop import TrainConfig, TrainEvent


class Recipe(Protocol):
    """A frozen dataclass of settings that can run."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> TrainConfig: ...

    def run(self, out: Path, device: str = "cpu") -> Iterator[TrainEvent]:
        """Train or resume in `out`."""
        ...


def load_recipe(path: Path, overrides: Mapping[str, str]) -> Recipe:
    """The `recipe` that the Python file at `path` defines, with `overrides` applied."""
    if not path.is_file():
        raise ConfigError(f"there is no recipe file {path}; those of the project are in recipes/")
    try:
        found = runpy.run_path(str(path)).get("recipe")
    except SyntaxError as error:
        raise ConfigError(f"{path} line {error.lineno} is not Python: {error.msg}") from error
    except Exception as error:  # whatever the file does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path} cannot be loaded: {reason}; mend the recipe") from error
    if isinstance(found, type) or not dataclasses.is_dataclass(found) or not hasattr(found, "run"):
        raise ConfigError(f"{path} defines no `recipe`; see docs/how-to/add-a-recipe.md")
    for key, value in overrides.items():
        found = _override(found, key, value)
    return typing.cast(Recipe, found)


def _override(settings: Any, key: str, text: str) -> Any:
    """`settings` with the value at `key` replaced: `lr`, or `train.lr` where `lr` is not unique."""
    paths = _paths(settings)
    places = [p for p in paths if p == key] or [p for p in paths if p.endswith(f".{key}")]
    if len(places) != 1:
        known = places or sorted(paths)
        problem = "is not unique" if places else "is not one of the recipe's settings"
        raise ConfigError(f"{key} {problem}; choose from {', '.join(known)}")
    return _replace(settings, places[0].split("."), key, text)


def _paths(settings: Any, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(value):
            found += _paths(value, f"{prefix}{field.name}.")
    return found


def _replace(settings: Any, path: list[str], key: str, text: str) -> Any:
    old = getattr(settings, path[0])
    if len(path) > 1:
        return dataclasses.replace(settings, **{path[0]: _replace(old, path[1:], key, text)})
    return dataclasses.replace(settings, **{path[0]: _parse(key, text, old)})


def _parse(key: str, text: str, old: Any) -> Any:
    """`text` as a value of the kind of `old`."""
    if isinstance(old, str) or (dataclasses.is_dataclass(old) and key == "model"):
        return text
    try:
        value = json.loads(text, parse_int=float if isinstance(old, float) else int)
    except ValueError:
        value = text
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(value)
    if type(value) is not type(old) and old is not None:
        shown = json.dumps(old, default=repr)  # as it is to be written
        eaten = ""
        if isinstance(old, tuple) and text.startswith("["):
            eaten = f"; a shell takes quotes away where nothing quotes them: --set '{key}=[...]'"
        raise ConfigError(
            f"{key} is {text!r}; it must be of the kind of its present value, {shown}{eaten}"
        )
    return value
