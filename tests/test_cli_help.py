"""What --help says: every verb, and of each parameter what it does, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from cyclopts import App

from offramp.cli import GROUPS, VERBS, app, main


def verbs(group: App = app, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], App]]:
    """(the words that call it, it) of every verb."""
    for name in group:
        if not name.startswith("-"):
            found = group[name]
            if found.default_command is None:
                yield from verbs(found, (*path, name))
            else:
                yield (*path, name), found


FOUND = dict(verbs())
every_verb = pytest.mark.parametrize("path", FOUND, ids=" ".join)


def parameters(path: tuple[str, ...]) -> list[Any]:
    return list(FOUND[path].assemble_argument_collection(parse_docstring=True))


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def test_all_verbs_are_found() -> None:
    assert len(FOUND) == len(VERBS) + sum(len(group) for _, group in GROUPS.values())
    assert {("generate",), ("train-ngram",), ("eval", "asr"), ("bench", "splitformer")} <= set(
        FOUND
    )


@every_verb
def test_every_parameter_is_described(path: tuple[str, ...]) -> None:
    for parameter in parameters(path):
        said = parameter.parameter.help
        assert said and said[0].isalnum() and said.endswith("."), (parameter.names, said)


@every_verb
def test_every_verb_is_described_in_a_line(path: tuple[str, ...]) -> None:
    first = FOUND[path].help.splitlines()[0]
    assert first.endswith(".") and len(first) < 100


@every_verb
def test_no_option_is_there_twice(
    capsys: pytest.CaptureFixture[str], path: tuple[str, ...]
) -> None:
    """Neither as --no-mic or --empty-hotword, nor as --recipe for what has its place."""
    negative = re.findall(r"--(?:no|empty)-\S+", shown(capsys, *path))
    assert negative == (["--no-peers"] if path == ("bench", "layerskip") else [])
    for parameter in parameters(path):
        assert parameter.index is None or not any(n.startswith("-") for n in parameter.names)


def test_help_names_every_verb_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys)
    for path in FOUND:
        assert f" {path[0]} " in out
    for name, (_, group) in GROUPS.items():
        out = shown(capsys, name)
        assert all(f" {verb.__name__.replace('_', '-')} " in out for verb in group)


def test_help_shows_descriptions_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(shown(capsys, "stream").replace("│", " ").split())  # whatever the width
    assert "SOURCE WAV, FLAC, OGG or MP3" in out and "[default: stream-tiny]" in out
    assert "default: what the model was made for." in out
    assert "[default: False]" not in out and "[default: ()]" not in out
    assert "[default: 0.0]" in shown(capsys, "generate")
    assert "--no-peers" in shown(capsys, "bench", "layerskip")
