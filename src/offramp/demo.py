"""`offramp demo`: the main job on real input, with the checkpoints that ship.

For each prompt: the text as drafts make it, then the same text token by token, whether the two
are identical, and what each cost.
"""

from __future__ import annotations

import torch

from offramp import terminal
from offramp.api import DraftOptions, Model, load
from offramp.data.corpora import parse_prompt
from offramp.decoding.stopping import Stop
from offramp.errors import OfframpError
from offramp.results import DecodeStats

UTTERANCES = (
    "How long will it take to drive from Chicago to Mississippi",
    "Are there any free concerts in Seattle this weekend",
)
BEGINNING = "The count opened the"


def run() -> None:
    """Print the demonstration; OfframpError if the two texts differ."""
    # Models so small gain little from a second thread, and on a busy machine two threads that
    # wait for each other are a hundred times slower than one.
    torch.set_num_threads(1)
    parser = load("parse-tiny")
    _warm_up(parser)
    if terminal.out.is_terminal:
        terminal.out.print(
            "[green]drafted by the lower layers and accepted[/]  "
            "[red strike]drafted and refused[/]  [bold]chosen by the whole tower[/]\n"
        )
    for utterance in UTTERANCES:
        _show(parser, "parse-tiny", parse_prompt(utterance), 128)
    _show(load("lm-tiny"), "lm-tiny", BEGINNING, 60)


def _warm_up(model: Model) -> None:
    for draft in (DraftOptions(), DraftOptions("none")):
        model.generate("Parse: warm up =>", draft=draft, stop=Stop(16))


def _show(model: Model, name: str, prompt: str, max_tokens: int) -> None:
    terminal.out.print(f"{name}: {prompt}", style="cyan")
    drafted = model.stream(prompt, stop=Stop(max_tokens))
    terminal.stream_drafts(model, drafted)
    plain = model.generate(prompt, draft=DraftOptions("none"), stop=Stop(max_tokens))
    made = drafted.generations[0]
    if made.tokens != plain.tokens:
        raise OfframpError(
            f"{name} wrote {made.text!r} with drafts and {plain.text!r} without; "
            "this is a defect of ours, please report it"
        )
    # Times of one short text are noisy: the median of a few runs of each, in turns.
    stats = _medians(model, prompt, Stop(max_tokens))
    terminal.table("identical text, both ways", terminal.STATS_COLUMNS, terminal.stats_rows(stats))
    terminal.out.print()


def _medians(model: Model, prompt: str, stop: Stop, rounds: int = 5) -> dict[str, DecodeStats]:
    ways = {"token by token": DraftOptions("none"), "self-speculative": DraftOptions()}
    runs: dict[str, list[DecodeStats]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, draft in ways.items():
            runs[name].append(model.generate(prompt, draft=draft, stop=stop).stats)
    return {name: sorted(made, key=lambda s: s.seconds)[rounds // 2] for name, made in runs.items()}
