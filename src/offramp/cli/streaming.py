"""Verbs for streaming recognisers: stream, profile, compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.parameters import (
    HARDWARE,
    BlankSkip,
    Device,
    Hardware,
    Hotwords,
    Json,
    Limit,
    MaxSymbols,
    ModelName,
    Plot,
    Split,
    StreamBeam,
    Threads,
    check_outputs,
    ended_as_by_ctrl_c,
    hardware_names,
    need_extra,
    no_options,
    set_threads,
)


def stream(
    source: Annotated[
        str | None, Parameter(allow_leading_hyphen=True, validator=no_options)
    ] = None,
    /,
    *,
    model: ModelName = "stream-tiny",
    mic: bool = False,
    sample_rate: int | None = None,
    chunk_ms: float | None = None,
    beam_size: StreamBeam = None,
    n_best: int = 1,
    max_symbols: MaxSymbols = None,
    hotword: Hotwords = (),
    blank_skip: BlankSkip = None,
    json: bool = False,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Turn speech into text while it comes in. What breaks off is written as far as it came.

    Args:
        source: WAV, FLAC, OGG or MP3; - is standard input: 16-bit samples, mono, raw or as WAV.
        mic: Listen to the microphone instead, until Ctrl-C (needs the extra offramp[mic]).
        sample_rate: Of raw samples or the microphone, in Hz; default: 16000.
        chunk_ms: Audio that is heard at once; default: what the model was made for.
        n_best: Show so many texts of a beam at most, the best first, when an utterance is over.
        json: One JSON object per event, then one with latency and counts.
    """
    if mic and source is None:
        need_extra("mic", "the microphone")
    set_threads(threads)
    from offramp.audio.live import open_source
    from offramp.decoding.stream_plan import StreamOptions
    from offramp.streaming import StreamingRecognizer
    from offramp.terminal_energy import show_stream

    options = StreamOptions(
        chunk_ms, beam_size, hotword, blank_skip, max_symbols=max_symbols, n_best=n_best
    )
    blocks, rate = open_source(source, mic, sample_rate)
    opened = StreamingRecognizer.load(model, device=device).open(options, rate)
    with ended_as_by_ctrl_c():
        show_stream(opened, opened.read(blocks), json)


def profile(
    recording: Path,
    /,
    *,
    model: ModelName = "stream-tiny",
    hardware: Hardware = HARDWARE,
    chunk_ms: float | None = None,
    beam_size: StreamBeam = None,
    max_symbols: MaxSymbols = None,
    blank_skip: BlankSkip = None,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """What streaming a recording runs, moves and takes in modelled energy, part by part.

    Args:
        recording: WAV, FLAC, OGG or MP3.
        chunk_ms: Audio that is heard at once; default: what the model was made for.
    """
    check_outputs(json, plot)
    set_threads(threads)
    from offramp import plots, terminal, terminal_energy
    from offramp.bench.stream_profile import ProfileOptions, run
    from offramp.decoding.stream_plan import StreamOptions

    how = StreamOptions(chunk_ms, beam_size, blank_skip=blank_skip, max_symbols=max_symbols)
    report = run(model, recording, ProfileOptions(hardware_names(hardware), how), device)
    terminal_energy.show_profile(report)
    terminal.write_json(json, report.to_dict())
    if plot is not None:
        plots.plot_energy(report.energies, plot)


def compress(
    *,
    model: ModelName = "stream-tiny",
    data: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    max_wer_increase: float | None = None,
    energy_budget_mj: float | None = None,
    plan: Path | None = None,
    hardware: Hardware = HARDWARE,
    chunk_ms: tuple[float, ...] = (),
    recipe: Path | None = None,
    finetune_steps: int = 0,
    curve_steps: int = 0,
    split: Split = None,
    limit: Limit = None,
    device: Device = "cpu",
    threads: Threads = None,
    plot: Plot = None,
) -> None:
    """Make a streaming recogniser smaller where that saves most energy. Goes on where it stopped.

    Args:
        data: Manifest (.tsv or .jsonl) of speech like what is to be recognised.
        out: Folder to write: the model, its plan and what was measured.
        max_wer_increase: Percentage points over the model as it is; as little energy as they allow.
        energy_budget_mj: Per second of audio, on every profile; as little WER as that allows.
        plan: Carry out this plan (plan.json of an earlier run) instead of searching one.
        chunk_ms: Choose from these (may be given several times); default: the model's own.
        recipe: Fine-tune with the data of this recipe file.
        finetune_steps: So long, after pruning.
        curve_steps: And so long for each point of the sensitivity curves; that takes days.
    """
    check_outputs(None, plot)
    need_extra("wer", "compress")
    set_threads(threads)
    from offramp import plots, terminal, terminal_energy
    from offramp.bench.asr import AsrData
    from offramp.bench.compress import CompressOptions, run
    from offramp.compress.problem import Budget

    share = None if max_wer_increase is None else max_wer_increase / 100
    given = (share, energy_budget_mj) != (None, None)
    budget = Budget(share, energy_budget_mj) if given or plan is None else None
    tuning = (recipe, finetune_steps, curve_steps)
    options = CompressOptions(budget, plan, hardware_names(hardware), chunk_ms, *tuning)
    with terminal.progress(f"compressing {model}") as tell:
        report = run(model, AsrData(data, split, limit), out, options, tell, device)
    terminal_energy.show_compression(report)
    if plot is not None and report.front:
        plots.plot_front(report.front, report.baselines, plot)
