"""The command line: output, options, and one-line errors with exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.cli import main


def offramp(capsys, *words: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of one command, in this process."""
    try:
        main(list(words))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_generate_streams_the_same_text_with_and_without_drafts(capsys, checkpoint):
    words = ("generate", "--model", str(checkpoint), "the count", "--max-tokens", "12")
    status, drafted, _ = offramp(capsys, *words, "--exit-layer", "2")
    plain = offramp(capsys, *words, "--draft", "none")
    assert status == 0 and drafted == plain[1] != "\n"


def test_generate_json_has_events_and_stats(capsys, checkpoint):
    words = ("generate", "--model", str(checkpoint), "the count", "--max-tokens", "8", "--json")
    status, out, _ = offramp(capsys, *words)
    *steps, done = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {s["event"] for s in steps} == {"step"} and done["event"] == "done"
    assert [t for s in steps for t in s["tokens"]] == done["tokens"]
    assert done["stats"]["generated_tokens"] == len(done["tokens"])


def test_the_prompt_may_come_from_standard_input(checkpoint):
    words = [sys.executable, "-m", "offramp", "generate", "--model", str(checkpoint)]
    made = subprocess.run(
        [*words, "--max-tokens", "4"],
        input="the count",
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "a", "--model", "no-such-model"], "lm-tiny"),
        (["generate", "a", "--model", "{toy}", "--exit-layer", "0"], "between 1 and 4"),
        (["generate", "a", "--model", "{toy}", "--exit-layer", "5"], "between 1 and 4"),
        (["generate", "a", "--model", "{toy}", "--early-exit", "6"], "between 1 and 5"),
        (["generate", "", "--model", "{toy}"], "empty"),
        (["generate", "the count " * 60, "--model", "{toy}"], "context is 64"),
        (["generate", "a", "--model", "{toy}", "--temperature", "-1"], "temperature is -1"),
        (["generate", "a", "--model", "{toy}", "--threads", "0"], "threads is 0"),
        (["generate", "a", "--nonsense"], "nonsense"),
        (["generate", "--model", "{toy}", "--max-tokens", "many"], "max-tokens"),
        (["nonsense"], "nonsense"),
        (["train", "no-such-recipe.py"], "no recipe file"),
        (["train", "{recipe}", "--set", "steps"], "key=value"),
        (["train", "{recipe}", "--set", "nonsense=1"], "nonsense"),
        (["train", "{recipe}", "--set", "steps=0"], "steps is 0"),
        (["train", "{recipe}", "--set", "lr=fast"], "lr is 'fast'"),
        (["eval", "exits", "--model", "{toy}", "--data", "no-such-file.txt"], "no-such-file.txt"),
        (["eval", "exits", "--model", "{toy}", "--json", "no/such/folder.json"], "no/such"),
        (["fetch", "no-such-corpus"], "no-such-corpus"),
    ],
)
def test_errors_are_one_line_and_status_2(
    monkeypatch, capsys, tmp_path, checkpoint, words, message
):
    recipe = Path(__file__).parents[1] / "recipes" / "layerskip_books.py"
    filled = [w.format(toy=checkpoint, recipe=recipe) for w in words]
    monkeypatch.chdir(tmp_path)
    status, out, err = offramp(capsys, *filled)
    assert status == 2, err
    assert out == ""
    assert err.startswith("offramp: ") and err.count("\n") == 1, err
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_verb(capsys):
    status, out, _ = offramp(capsys, "--help")
    assert status == 0
    for verb in ("generate", "train", "eval", "tune", "bench", "fetch", "demo", "info"):
        assert verb in out
