"""Verbs that measure quality: eval exits, eval asr, eval stream."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.cli.parameters import (
    Beam,
    BlankSkip,
    Device,
    Json,
    Limit,
    LmWeight,
    ModelName,
    Split,
    StreamBeam,
    Threads,
    check_outputs,
    need_extra,
    set_threads,
)
from offramp.errors import InputError

if TYPE_CHECKING:
    from offramp.bench.asr import AsrData


def exits(
    *,
    model: ModelName,
    data: Path | None = None,
    limit: int | None = None,
    only: tuple[int, ...] = (),
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Quality at every exit: bits per byte of a text, or exact match of parses.

    Args:
        data: A .txt file, or a .tsv file with columns utterance and semantic_parse; default: the
            development data that a shipped model was made for.
        limit: Read so many characters or utterances at most.
        only: Evaluate this exit only (may be given several times).
    """
    check_outputs(json)
    set_threads(threads)
    from offramp import terminal
    from offramp.bench.exit_quality import ExitQualityOptions, run

    with terminal.progress(f"exits of {model}") as tell:
        report = run(model, ExitQualityOptions(data, limit, only or None, device), tell)
    terminal.show_exit_quality(report)
    terminal.write_json(json, report.to_dict())


def asr(
    *,
    model: ModelName = "asr-tiny",
    data: Path,
    split: Split = None,
    limit: Limit = None,
    confidence: float | None = None,
    entropy: float | None = None,
    agreement: float | None = None,
    beam_size: Beam = None,
    lm: Path | None = None,
    lm_weight: LmWeight = None,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Word and character error rates at every exit and under every exit policy.

    Of a Speech-LM: by every draft that it has, with what each takes; exit status 1: they do not all
    write the same. References and what is written are compared in lower case, without punctuation.

    Args:
        data: Manifest (.tsv or .jsonl): path, seconds, text.
        confidence: Threshold; default: the calibrated one, or 0.76.
        entropy: Threshold; default: the calibrated one, or 0.67.
        agreement: Threshold; default: the calibrated one, or 0.91.
        beam_size: Also search with so many texts, at the last exit.
        lm: Also search with this n-gram language model (an ARPA file), at the last exit.
    """
    check_outputs(json)
    need_extra("wer", "eval asr")
    if lm is not None:
        need_extra("lm", "a language model")
    set_threads(threads)
    from offramp import terminal
    from offramp.bench.asr import AsrData, AsrOptions, run
    from offramp.recognizers import is_speech_lm

    asked = AsrData(data, split, limit)
    given = {"confidence": confidence, "entropy": entropy, "agreement": agreement}
    thresholds = {rule: value for rule, value in given.items() if value is not None}
    if is_speech_lm(model):
        of_no_use = thresholds | {"lm": lm, "lm_weight": lm_weight}
        _speech_lm(model, asked, beam_size, of_no_use, device, json)
        return
    options = AsrOptions(thresholds, beam_size, lm, lm_weight)
    with terminal.progress(f"asr, {model}") as tell:
        report = run(model, asked, options, device, tell)
    terminal.show_asr(report)
    terminal.write_json(json, report.to_dict())


def _speech_lm(
    model: str,
    data: AsrData,
    beam_size: int | None,
    of_no_use: Mapping[str, object],
    device: str,
    json: Path | None,
) -> None:
    """`asr` of a Speech-LM."""
    from offramp import terminal
    from offramp.bench.speech_lm_quality import run

    if given := [name for name, value in of_no_use.items() if value is not None]:
        raise InputError(f"{given[0]} is of no use to {model}, a Speech-LM; leave it out")
    with terminal.progress(f"asr, {model}") as tell:
        report = run(model, data, beam_size, device, tell)
    terminal.show_speech_lm(report)
    terminal.write_json(json, report.to_dict())
    if not report.identical:
        sys.exit(1)


def stream(
    *,
    model: ModelName = "stream-tiny",
    data: Path,
    split: Split = None,
    limit: Limit = None,
    chunk_ms: tuple[float, ...] = (),
    beam_size: StreamBeam = None,
    blank_skip: BlankSkip = None,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Word and character error rates of a streaming recogniser, its latency and its time.

    References and what is written are compared in lower case, without punctuation.

    Args:
        data: Manifest (.tsv or .jsonl): path, seconds, text.
        chunk_ms: Audio that is heard at once (may be given several times); default: what the model
            was made for.
    """
    check_outputs(json)
    need_extra("wer", "eval stream")
    set_threads(threads)
    from offramp import terminal, terminal_energy
    from offramp.bench.asr import AsrData
    from offramp.bench.stream_quality import StreamQualityOptions, run
    from offramp.decoding.stream_plan import StreamOptions

    how = StreamOptions(beam_size=beam_size, blank_skip=blank_skip)
    options = StreamQualityOptions(chunk_ms, how)
    with terminal.progress(f"streams, {model}") as tell:
        report = run(model, AsrData(data, split, limit), options, device, tell)
    terminal_energy.show_stream_quality(report)
    terminal.write_json(json, report.to_dict())
