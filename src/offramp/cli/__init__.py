"""The command line: one file for a group of verbs, each of which imports its worker inside.

So `--help`, and what is wrong with a command line, do not wait for torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from cyclopts import App, CycloptsError, Parameter

from offramp.cli import about, bench, speech, streaming, text, training
from offramp.cli import eval as evaluation
from offramp.errors import InputError, OfframpError

Verb = Callable[..., None]

VERBS: tuple[Verb, ...] = (
    text.generate,
    text.tune,
    speech.transcribe,
    speech.calibrate,
    streaming.stream,
    streaming.profile,
    streaming.compress,
    training.train,
    training.train_ngram,
    training.fetch,
    about.demo,
    about.info,
)
GROUPS: dict[str, tuple[str, tuple[Verb, ...]]] = {
    "eval": ("Measure quality.", (evaluation.exits, evaluation.asr, evaluation.stream)),
    "bench": (
        "Measure what docs/results.md publishes.",
        (bench.layerskip, bench.splitformer, bench.energy, bench.speech_llm),
    ),
}


def _shown_default(value: object) -> object:
    """What goes without saying is not shown."""
    return None if value is False or value == () else value


app = App(
    name="offramp",
    help="Models that stop computing as soon as they can, and lose nothing.",
    default_parameter=Parameter(negative=(), show_default=_shown_default),
    suppress_keyboard_interrupt=False,  # `main` says that it was interrupted
)
for _verb in VERBS:
    app.command(_verb)
for _name, (_help, _verbs) in GROUPS.items():
    _group = App(name=_name, help=_help)
    app.command(_group)
    for _verb in _verbs:
        _group.command(_verb)


def main(words: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend are one line on standard error, exit status 2.

    words: the command line after the program's name; None: this process's.
    """
    words = sys.argv[1:] if words is None else words
    try:
        _refuse_empty(words)
        app(_without_delimiter(words), exit_on_error=False, print_error=False)
    except (OfframpError, CycloptsError) as error:
        print(f"offramp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"offramp: {str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def _refuse_empty(words: list[str]) -> None:
    """An empty word is a mistake wherever it stands; as a path it would mean this folder."""
    for before, word in zip(["", *words], words, strict=False):
        if word == "" or re.fullmatch(r"--[\w-]+=", word):
            option = word[:-1] or (before if before.startswith("-") else "an argument")
            raise InputError(f"{option} is empty; give a value (is a variable of the shell unset?)")


def _without_delimiter(words: list[str]) -> list[str]:
    """Recordings after `--`, where a name may begin with `-`, as paths that look like no option.

    The verbs that take `-` for a file are not told by cyclopts which words came after it.
    """
    if words[:1] not in (["transcribe"], ["stream"]) or "--" not in words:
        return words
    at = words.index("--")
    named = (f"./{w}" if w.startswith("-") and w != "-" else w for w in words[at + 1 :])
    return [*words[:at], *named]
