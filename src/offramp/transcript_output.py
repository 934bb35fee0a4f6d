"""Where `offramp transcribe` puts its transcripts: a folder, or standard output as they come."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from offramp import terminal
from offramp.errors import AudioError, InputError
from offramp.files import check_writable_folder, replacing
from offramp.transcript_formats import FORMATS

if TYPE_CHECKING:  # what is refused here must not wait for torch
    from offramp.transcription import Transcription


class TranscriptOutput:
    """Where transcripts of `files` go: a folder, or standard output.

    What cannot be written is refused here, before the work. InputError.
    """

    def __init__(
        self, files: Sequence[str], format: str, folder: Path | None, trail: bool = False
    ) -> None:
        self._files, self._format, self._folder = files, format, folder
        if trail and format != "json":
            raise InputError(f"trail goes into json only, and the format is {format}")
        if folder is None and len(files) > 1 and format not in ("txt", "json"):
            raise InputError(
                f"several files as {format} do not fit into one; give a folder with -o"
            )
        if folder is not None:
            if folder.suffix.removeprefix(".") in FORMATS and not folder.is_dir():
                raise InputError(
                    f"{folder} is to be a folder, and is called like a file; give a folder with "
                    f"-o, or write one file with > {folder}"
                )
            check_writable_folder(folder)
            targets = [self._target(name) for name in files]
            if twice := next((t for t in targets if targets.count(t) > 1), None):
                raise InputError(
                    f"several files would be written to {twice}; transcribe them into two folders"
                )

    def write(self, listen: Callable[[str], Transcription]) -> int:
        """Transcribe all; of several files those that failed are named at the end, and counted.

        A single one that fails raises its AudioError.
        """
        failures: list[str] = []
        try:
            with files_progress(self._files) as tells:
                for name, tell in zip(self._files, tells, strict=True):
                    try:
                        self._one(name, listen(name), tell)
                    except AudioError as error:
                        if len(self._files) == 1:
                            raise
                        failures.append(str(error))
        finally:
            self._show(failures)
        return len(failures)

    def _show(self, failures: Sequence[str]) -> None:
        for failure in failures:
            print(f"offramp: {failure}", file=sys.stderr)
        if failures:
            print(f"offramp: {len(failures)} of {len(self._files)} files failed", file=sys.stderr)

    def _one(self, name: str, run: Transcription, tell: Callable[[float], None]) -> None:
        """tell: is called with how many seconds of the recording are done."""
        # On a terminal text is shown as it comes; in a file or pipe it is whole or absent.
        live = self._folder is None and self._format == "txt" and sys.stdout.isatty()
        several = len(self._files) > 1
        shown = False
        for segment in run:
            tell(segment.end_s)
            if live and segment.text:
                if several and not shown:
                    print(f"==> {_printable(name)} <==")
                print(segment.text, flush=True)
                shown = True
        if live and shown:
            return
        made = run.transcript
        if self._folder is not None:
            with replacing(self._target(name)) as temporary:
                temporary.write_text(FORMATS[self._format](made), encoding="utf-8")
        elif several and self._format == "json":
            terminal.print_json({"file": name} | made.to_dict())
        else:
            head = f"==> {_printable(name)} <==\n" if several else ""
            print(head + FORMATS[self._format](made), end="", flush=True)

    def _target(self, name: str) -> Path:
        assert self._folder is not None
        stem = "stdin" if name == "-" else Path(name).stem
        return self._folder / f"{stem}.{self._format}"


@contextmanager
def files_progress(names: Sequence[str]) -> Iterator[Iterator[Callable[[float], None]]]:
    """A bar on standard error, where that is a terminal, that counts files and parts of them.

    Yields what to call with the seconds done, for each file in turn.
    """
    columns = (
        TextColumn("transcribing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # What goes to the same terminal is written above the bar; a pipe stays as it is.
    above = sys.stdout.isatty()
    shown = terminal.err.is_terminal
    bar = Progress(
        *columns, console=terminal.err, transient=True, disable=not shown, redirect_stdout=above
    )

    def tell(number: int, seconds: float, done: float) -> None:
        bar.update(task, completed=number + min(1.0, done / seconds))

    def tells() -> Iterator[Callable[[float], None]]:
        for number, name in enumerate(names):
            yield partial(tell, number, known_seconds(name) if shown else math.inf)
            bar.update(task, completed=number + 1)

    with bar:
        task = bar.add_task("", total=len(names))
        yield tells()


def known_seconds(name: str) -> float:
    """The length of the recording; infinite where it cannot be told beforehand."""
    if name == "-" or not os.path.isfile(name):  # to look into a pipe is to take from it
        return math.inf
    from offramp.audio.io import duration_s

    try:
        return duration_s(Path(name)) or math.inf
    except AudioError:
        return math.inf  # transcribing it will say why


def _printable(name: str) -> str:
    """The name with escapes for what standard output cannot hold, as bytes that are no UTF-8."""
    encoding = sys.stdout.encoding or "utf-8"
    return name.encode(encoding, "backslashreplace").decode(encoding)
