"""The command line: verbs. Each is short and imports its worker inside, so that --help is fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from offramp.errors import InputError, OfframpError

app = App(name="offramp", help="Models that stop computing as soon as they can, and lose nothing.")
eval_app = App(name="eval", help="Measure quality.")
bench_app = App(name="bench", help="Measure speed, side by side with the peers we name.")
app.command(eval_app)
app.command(bench_app)

ModelName = Annotated[str, Parameter(name="--model", help="Shipped name, folder or hub id.")]
Json = Annotated[Path | None, Parameter(name="--json", help="Also write the figures here.")]
Threads = Annotated[int | None, Parameter(help="CPU threads; default: what torch chooses.")]


@app.command
def generate(
    prompt: str,
    *,
    model: ModelName = "lm-tiny",
    draft: Literal["exit", "adaptive", "ngram", "model", "none"] | None = None,
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    min_confidence: float = 0.0,
    draft_model: str | None = None,
    early_exit: int | None = None,
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
    stop_token: tuple[int, ...] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    threads: Threads = None,
    json: bool = False,
) -> None:
    """Continue a text, streaming it. Drafting is on by default and does not change the text.

    Parameters
    ----------
    prompt: The text to continue; - reads standard input.
    draft: Where drafts come from; default: the checkpoint's exit, else adaptive.
    exit_layer: Draft with this many layers.
    num_draft_tokens: Tokens drafted per round, at most.
    min_confidence: Stop a draft at a token less probable than this.
    draft_model: Checkpoint that drafts (--draft model).
    early_exit: Leave the tower here for every token: faster, another text, no drafts.
    max_tokens: Tokens to write, at most.
    stop: End the text before this string (may be given several times).
    stop_token: End the text at this token id (may be given several times).
    temperature: 0 takes the most probable token.
    json: One JSON object per round, then one with text and counts.
    """
    from offramp import terminal
    from offramp.api import DraftOptions, load
    from offramp.decoding.sampling import Sampling
    from offramp.decoding.stopping import Stop

    _set_threads(threads)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    options = DraftOptions(draft, exit_layer, num_draft_tokens, min_confidence, draft_model)
    ends = Stop(max_tokens, frozenset(stop_token), stop)
    text = sys.stdin.read() if prompt == "-" else prompt
    run = load(model, device=device, dtype=dtype).stream(
        text, sampling=sampling, draft=options, stop=ends, exit_layer=early_exit
    )
    terminal.stream_json(run) if json else terminal.stream_text(run)


@app.command
def train(
    recipe: Path,
    *,
    set: Annotated[tuple[str, ...], Parameter(help="key=value, over the recipe's own.")] = (),
    out: Path | None = None,
    device: str = "cpu",
    threads: Threads = None,
) -> None:
    """Train by a recipe file; goes on where a killed run stopped. Under torchrun: on many processes.

    Parameters
    ----------
    recipe: A Python file that defines `recipe`, such as recipes/layerskip_books.py.
    out: Folder of the run; default: runs/ and the recipe's name.
    """
    from offramp import terminal
    from offramp.train.recipes import load_recipe

    _set_threads(threads)
    if bad := [pair for pair in set if "=" not in pair]:
        raise InputError(f"--set got {bad[0]!r}; it takes key=value")
    loaded = load_recipe(recipe, dict(pair.split("=", 1) for pair in set))
    folder = out or Path("runs") / loaded.name
    terminal.train_progress(loaded.name, loaded.train.steps, loaded.run(folder, device))
    terminal.out.print(f"The checkpoint is in {folder / 'checkpoint'}")


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    import os

    import torch

    if not 1 <= threads <= 4 * (os.cpu_count() or 1):
        raise InputError(
            f"threads is {threads}; it must lie between 1 and {4 * (os.cpu_count() or 1)}"
        )
    torch.set_num_threads(threads)


def main() -> None:
    """Entry point: errors that a user can mend are one line on standard error, exit status 2."""
    try:
        app(exit_on_error=False, print_error=False)
    except (OfframpError, CycloptsError) as error:
        print(f"offramp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
