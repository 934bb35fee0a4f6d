"""What several verbs take: their parameters, and checks that need no torch and so come first."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.errors import InputError

ModelName = Annotated[str, Parameter(help="Shipped name, folder or hub id.")]
Device = Annotated[str, Parameter(help="cpu, cuda or cuda:0.")]
Dtype = Annotated[str, Parameter(help="float32, bfloat16 or float16.")]
Threads = Annotated[int | None, Parameter(help="CPU threads; default: what torch chooses.")]
Json = Annotated[Path | None, Parameter(help="Also write the figures here.")]
Plot = Annotated[Path | None, Parameter(help="Also draw a figure here (.png).")]

Hotwords = Annotated[
    tuple[str, ...], Parameter(help="Words to expect (may be given several times).")
]
LmWeight = Annotated[
    float | None,
    Parameter(help="How much the language model counts against what was heard; default: 0.4."),
]
Split = Annotated[str | None, Parameter(help="Take this split only.")]
Limit = Annotated[int | None, Parameter(help="Take so many utterances at most, drawn at random.")]

_BEAM = ["--beam-size", "--beam"]
Beam = Annotated[int | None, Parameter(name=_BEAM)]
StreamBeam = Annotated[
    int | None, Parameter(name=_BEAM, help="Beam search with so many hypotheses; default: greedy.")
]
MaxSymbols = Annotated[
    int | None,
    Parameter(
        help="Tokens that a frame may have in greedy search; default: one for every 40 ms of it."
    ),
]
BlankSkip = Annotated[
    float | None,
    Parameter(
        help="Score no labels where the blank is this probable (models with their own blank); "
        "default: what the model was made for."
    ),
]
Hardware = Annotated[
    str,
    Parameter(
        help="Profiles, with commas between: edge45, mobile-low, mobile-high, mcu, or .toml files."
    ),
]
HARDWARE = "edge45,mobile-low,mobile-high,mcu"

# What --lm and others need: (the module, the package), and the extra is called as here.
_EXTRAS = {
    "hf": ("transformers", "transformers"),
    "lm": ("flashlight", "flashlight-text"),
    "mic": ("sounddevice", "sounddevice"),
    "vad": ("silero_vad", "silero-vad"),
    "wer": ("jiwer", "jiwer"),
}


def hardware_names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(","))


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, so that what was found is still written."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    names = ("SIGTERM", "SIGHUP")  # not every system has both
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {s: signal.getsignal(s) for s in signals}
    before = {s: h for s, h in handlers.items() if h is not signal.SIG_IGN}  # as nohup has it
    try:
        for s in before:
            signal.signal(s, stop)
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def no_options(type_: object, given: str | tuple[str, ...] | None) -> None:
    """So that `-` may be a file, cyclopts takes unknown options for files too."""
    files = (given,) if isinstance(given, str) else given or ()
    if unknown := next((f for f in files if f.startswith("-") and f != "-"), None):
        raise ValueError(f"unknown option {unknown} (a file of that name is ./{unknown})")


def need_extra(extra: str, what: str) -> None:
    """InputError if the package is missing that `what` needs."""
    module, package = _EXTRAS[extra]
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs {package}: pip install 'offramp[{extra}]'")


def check_outputs(json: Path | None, plot: Path | None = None) -> None:
    """InputError if the work could not be written where it is wanted."""
    from offramp import plots, terminal

    terminal.check_writable(json)
    terminal.check_writable(plot)
    plots.check_plots(plot)


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise InputError(f"threads is {threads}; it must lie between 1 and {most}")
    import torch

    torch.set_num_threads(threads)
