"""Verbs for recordings: transcribe, calibrate."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from offramp.cli.parameters import (
    Beam,
    Device,
    Hotwords,
    Limit,
    LmWeight,
    ModelName,
    Split,
    Threads,
    need_extra,
    no_options,
    set_threads,
)


def transcribe(
    files: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True, validator=no_options)],
    /,
    *,
    model: ModelName = "asr-tiny",
    format: Literal["txt", "srt", "vtt", "tsv", "json"] = "txt",
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    exit_policy: Literal["entropy", "confidence", "agreement"] | None = None,
    draft: Literal["ctc+mtp", "ctc", "mtp", "exit", "none"] | None = None,
    guard: Literal["flag", "stop"] | None = None,
    threshold: float | None = None,
    max_wer_increase: float | None = None,
    calibration: Path | None = None,
    exit_layer: int | None = None,
    budget_ms: float | None = None,
    budget_macs: float | None = None,
    beam_size: Beam = None,
    lm: Path | None = None,
    lm_weight: LmWeight = None,
    hotword: Hotwords = (),
    detector: Literal["auto", "silero", "energy"] = "auto",
    trail: bool = False,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Turn speech into text. Exit status 1: some of several files failed; they are named.

    Args:
        files: WAV, FLAC, OGG or MP3, of any length; - is standard input.
        format: Plain text, subtitles, a table of them, or all that is known.
        out: Folder for a file per recording, NAME.txt and so on; default: standard output.
        exit_policy: Leave the tower as soon as this rule is satisfied; default: at the last exit.
        draft: Of a Speech-LM: where drafts come from, which change the time and not the text;
            default: the fastest that the checkpoint has.
        guard: Of a Speech-LM: flag words that the audio does not hold (in json), or stop there;
            default: flag them.
        threshold: Of the rule; default: the calibrated one. With --draft mtp: believe a head that
            is so certain, unverified; the text may change.
        max_wer_increase: Use a threshold certified for at most so many percent (see calibrate).
        calibration: File that calibrated thresholds are in; default: the checkpoint's.
        exit_layer: Always leave after so many layers. With --draft exit: draft with so many.
        budget_ms: Go no deeper than fits this time, per segment of speech.
        budget_macs: Go no deeper than fits so many multiply-accumulates, per segment of speech.
        beam_size: Beam search with so many texts; default: greedy, or 16 with --lm, --hotword.
        lm: N-gram language model for the beam search: an ARPA file, such as train-ngram makes.
        detector: What finds speech; default: silero-vad if it is installed, else loudness.
        trail: With --format json: also what every tested exit wrote.
    """
    from offramp.transcript_output import TranscriptOutput

    output = TranscriptOutput(files, format, out, trail)
    if lm is not None:
        need_extra("lm", "a language model")
    if detector == "silero":
        need_extra("vad", "the detector silero")
    set_threads(threads)
    from offramp import terminal
    from offramp.audio.vad import VadOptions
    from offramp.recognizers import options_for, transcriber

    given: dict[str, object] = {
        "exit_policy": exit_policy,
        "draft": draft,
        "guard": guard,
        "threshold": threshold,
        "max_wer_increase": max_wer_increase,
        "calibration": calibration,
        "exit_layer": exit_layer,
        "budget_ms": budget_ms,
        "budget_macs": budget_macs,
        "beam_size": beam_size,
        "lm": lm,
        "lm_weight": lm_weight,
        "hotwords": hotword or None,
        "trail": trail or None,
        "vad": VadOptions(detector=detector),
    }
    options = options_for(model, {name: v for name, v in given.items() if v is not None})
    listen = transcriber(model, options, device)
    if draft == "mtp" and threshold is not None:
        terminal.say_lossy(threshold)
    if output.write(listen):
        sys.exit(1)


def calibrate(
    *,
    model: ModelName = "asr-tiny",
    data: Path,
    max_wer_increase: float = 0.5,
    rule: Literal["entropy", "confidence", "agreement"] = "confidence",
    cap: float = 100.0,
    split: Split = None,
    limit: Limit = None,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Find a threshold for 'at most +x WER'. Exit status 1: none can be certified.

    Args:
        data: Manifest (.tsv or .jsonl) of speech like what is to be transcribed.
        max_wer_increase: Percent, over the last exit.
        rule: What to find the threshold of.
        cap: Count at most so many percent for one utterance; less says less, and needs fewer.
        out: File to write; default: calibration.json in the checkpoint, where transcribe finds it;
            for a model that ships, in the present folder.
    """
    need_extra("wer", "calibrate")
    set_threads(threads)
    from offramp import terminal
    from offramp.bench.asr import AsrData, CalibrateOptions, calibrate_model
    from offramp.models.hub import resolve
    from offramp.recognizer import CALIBRATION

    target = out or _default_calibration(model)
    terminal.check_writable(target)
    options = CalibrateOptions(max_wer_increase, rule, cap)
    with terminal.progress(f"calibrating {model}") as tell:
        found = calibrate_model(model, AsrData(data, split, limit), options, device, tell)
    terminal.show_calibration(found)
    if found.threshold is None:
        sys.exit(1)
    found.save(target)
    uses = ["--model", model, "--max-wer-increase", str(max_wer_increase)]
    found_there = target == resolve(model) / CALIBRATION
    uses += [] if found_there else ["--calibration", str(target)]
    told = f"Written to {target}; this uses it:\nofframp transcribe {shlex.join(uses)} FILE"
    terminal.out.print(told, markup=False)


def _default_calibration(model: str) -> Path:
    """Where transcribe looks for that of `model`; nothing is written into what was installed."""
    from offramp.models.hub import SHIPPED, resolve
    from offramp.recognizer import CALIBRATION

    folder = resolve(model)
    installed = folder.resolve() in [shipped.resolve() for shipped in SHIPPED.values()]
    return Path(CALIBRATION) if installed else folder / CALIBRATION
