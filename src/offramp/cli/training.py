"""Verbs that make models, and fetch what they learn from: train, train-ngram, fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.parameters import Device, Threads, set_threads
from offramp.errors import InputError


def train(
    recipe: Path,
    /,
    *,
    set: tuple[str, ...] = (),
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train by a recipe file; goes on where a killed run stopped. Works under torchrun.

    Args:
        recipe: A Python file that defines `recipe`, such as recipes/layerskip_books.py.
        set: key=value, over the recipe's own (may be given several times).
        out: Folder of the run; default: runs/ and the recipe's name.
    """
    if bad := [pair for pair in set if "=" not in pair]:
        raise InputError(f"--set got {bad[0]!r}; it takes key=value")
    set_threads(threads)
    from offramp import terminal
    from offramp.train.loop import STATE_FILE
    from offramp.train.recipes import load_recipe

    loaded = load_recipe(recipe, dict(pair.split("=", 1) for pair in set))
    folder = out or Path("runs") / loaded.name
    try:
        terminal.train_progress(loaded.name, loaded.train.steps, loaded.run(folder, device))
    except KeyboardInterrupt:
        saved = (folder / STATE_FILE).exists()
        goes_on = "goes on from the last saved step" if saved else "starts anew: none was saved"
        raise KeyboardInterrupt(f"interrupted; the same command {goes_on}") from None
    terminal.out.print(f"The checkpoint is in {folder / 'checkpoint'}", markup=False)


def train_ngram(
    texts: Annotated[tuple[Path, ...], Parameter(name="TEXTS")],
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    order: int = 3,
    min_count: int = 2,
    min_word_count: int = 1,
) -> None:
    """Make the language model that --lm takes (an ARPA file) from plain text.

    Args:
        texts: UTF-8 files: books with empty lines between paragraphs, or a sentence per line.
        out: File to write.
        order: Words looked at together.
        min_count: Leave out groups of three words and more that were seen less often.
        min_word_count: Leave out rarer words.
    """
    from offramp import terminal
    from offramp.data.sentences import file_sentences
    from offramp.decoding.ngram import NGramOptions
    from offramp.decoding.ngram import train_ngram as worker

    terminal.check_writable(out)
    options = NGramOptions(min_count, min_word_count)
    sizes = worker((s for text in texts for s in file_sentences(text)), order, out, options)
    groups = ", ".join(f"{size:,} groups of {n}" for n, size in enumerate(sizes[1:], start=2))
    terminal.out.print(f"{out} has {sizes[0]:,} words, {groups}", markup=False)


def fetch(name: str, /, *, root: Path | None = None, accept_unverified: bool = False) -> None:
    """Download a public corpus into the data folder.

    Args:
        name: Of the corpus, such as gutenberg_books; for one that there is not, all are listed.
        root: The data folder; default: OFFRAMP_DATA, else ../shared/data.
        accept_unverified: Take a file for which nobody publishes a checksum.
    """
    from offramp import terminal
    from offramp.data.corpora import data_root
    from offramp.data.sources import fetch as worker

    folder = worker(name, root or data_root(), accept_unverified=accept_unverified)
    terminal.out.print(f"{name} is in {folder}", markup=False)
