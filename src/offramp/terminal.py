"""What the command line shows: drafts in colour as they come, tables, progress bars.

Only the command line imports this. Text goes to standard output; progress and remarks go to
standard error, so that output can be piped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from offramp.files import replacing
from offramp.results import DecodeStats, Step

if TYPE_CHECKING:
    from offramp.api import Model, Run
    from offramp.train.loop import TrainEvent

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*row)
    out.print(made)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    print(json.dumps(value), flush=True)


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`, if there is one; never a half file."""
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def stream_text(run: Run) -> None:
    """Write the text of a run as it comes."""
    for step in run:
        print(step.text, end="", flush=True)
    print()


def stream_json(run: Run) -> None:
    """One line per round, then one with the whole text and the counts."""
    for step in run:
        print_json({"event": "step"} | vars(step))
    made = run.generations[0]
    print_json(
        {
            "event": "done",
            "text": made.text,
            "tokens": made.tokens,
            "finish_reason": made.finish_reason,
            "stats": made.stats.to_dict(),
        }
    )


def stream_drafts(model: Model, run: Run) -> None:
    """The text as it comes, coloured by origin: green was drafted and accepted, bold is the
    tower's own, red and struck out was drafted and refused."""
    for step in run:
        out.print(_coloured(model, step), end="")
    out.print()


def _coloured(model: Model, step: Step) -> Text:
    assert model.tokenizer is not None
    shown = Text()
    kept, own = step.tokens[: step.accepted], step.tokens[step.accepted :]
    refused = step.drafted[step.accepted :]
    shown.append(model.tokenizer.decode(kept), style="green")
    if not own:
        return shown
    if refused:
        shown.append(model.tokenizer.decode(refused).strip(), style="red strike")
    shown.append(model.tokenizer.decode(own), style="bold")
    return shown


def stats_rows(stats: Mapping[str, DecodeStats]) -> list[list[str]]:
    """A table row per way of decoding."""
    return [
        [
            name,
            number(s.tokens_per_s, 0),
            number(s.layer_calls_per_token, 1),
            "-" if s.acceptance_rate is None else f"{100 * s.acceptance_rate:.0f} %",
            number(s.mean_accepted_length, 1),
        ]
        for name, s in stats.items()
    ]


STATS_COLUMNS = ("", "tokens/s", "layers run per token", "drafts accepted", "tokens per verify")


def train_progress(name: str, steps: int, events: Iterable[TrainEvent]) -> None:
    """A progress bar on standard error, and a line for every evaluation."""
    from offramp.train.loop import Evaluated, StepDone

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[pace]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        shown = bar.add_task(name, total=steps, loss=float("nan"), pace=0.0)
        for event in events:
            if isinstance(event, StepDone):
                bar.update(shown, completed=event.step, loss=event.loss, pace=event.tokens_per_s)
            elif isinstance(event, Evaluated):
                figures = "  ".join(f"{k} {v:.3f}" for k, v in event.metrics.items())
                err.print(f"step {event.step}: {figures}")
