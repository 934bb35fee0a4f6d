"""Verbs that measure what docs/results.md publishes: bench layerskip, splitformer, energy,
speech-llm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.parameters import (
    HARDWARE,
    Device,
    Dtype,
    Hardware,
    Json,
    Limit,
    ModelName,
    Plot,
    Threads,
    check_outputs,
    hardware_names,
    need_extra,
    set_threads,
)


def layerskip(
    *,
    model: ModelName = "parse-tiny",
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    rounds: int = 3,
    prompts: int = 100,
    peers: Annotated[bool, Parameter(negative="--no-peers")] = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Plain, self-speculative and adaptive decoding beside transformers, in one process.

    Args:
        exit_layer: Draft with so many layers; default: what the checkpoint recommends.
        num_draft_tokens: Tokens drafted per round; default: what the checkpoint recommends.
        rounds: Times that every prompt is decoded in each way; the median counts.
        prompts: Utterances of the sample (1 to 100); the 20 passages of a novel are always read.
        peers: Also run transformers (needs the extra offramp[hf]).
    """
    check_outputs(json)
    set_threads(threads)
    from offramp import terminal
    from offramp.bench.layerskip import LayerSkipOptions, run

    options = LayerSkipOptions(
        exit_layer,
        num_draft_tokens,
        rounds=rounds,
        top_prompts=prompts,
        peers=peers,
        device=device,
        dtype=dtype,
    )
    with terminal.progress(f"bench layerskip, {model}") as tell:
        report = run(model, options, tell)
    terminal.show_layerskip(report)
    terminal.write_json(json, report.to_dict())


def splitformer(
    *,
    runs: Path | None = None,
    threads: Annotated[int, Parameter(help="CPU threads.")] = 1,
    json: Json = None,
) -> None:
    """WER, operations and CPU time of Splitformer, its controls and ours, at every exit.

    Args:
        runs: Folder that recipes/splitformer_ablation.py trained into, one ARM-SEED for each run;
            default: runs/splitformer-ablation.
    """
    check_outputs(json)
    set_threads(threads)
    from offramp import terminal
    from offramp.bench.splitformer import RUNS, SplitformerOptions, run

    with terminal.progress("bench splitformer") as tell:
        report = run(SplitformerOptions(runs or RUNS), tell)
    terminal.show_splitformer(report)
    terminal.write_json(json, report.to_dict())


def energy(
    *,
    model: ModelName = "stream-tiny",
    finetune_steps: int = 0,
    recipe: Path = Path("recipes/stream_tiny.py"),
    seeds: int | None = None,
    runs: Path = Path("runs/energy"),
    data: tuple[str, ...] = (),
    max_wer_increase: float = 1.0,
    levels: tuple[float, ...] = (),
    rounds: int = 3,
    hardware: Hardware = HARDWARE,
    limit: Limit = None,
    threads: Threads = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The planner beside simpler rules of compression: WER and time measured, energy modelled.

    The compressed models are made first, unless they are there already: in minutes without
    fine-tuning, in hours with it; how long is estimated first, and a run that was stopped goes on.

    Args:
        finetune_steps: Of every compressed model; 0: none is fine-tuned.
        recipe: With finetune_steps: the file that trained the model.
        seeds: With finetune_steps: so many of each model, 3 by default.
        runs: Folder of what was measured and made.
        data: Development sets by name, or manifests (may be given several times); default:
            kathleen_arctic and mini_librispeech_train_clean_5.
        max_wer_increase: Percentage points that compression may cost, over the model as it is.
        levels: Measure each method at these shares pruned only (may be given several times);
            default: 0.2, 0.4, 0.6 and 0.8.
        rounds: Plans that each rule may try.
    """
    check_outputs(json, plot)
    need_extra("wer", "bench energy")
    set_threads(threads)
    from offramp import plots, terminal, terminal_energy
    from offramp.bench import energy as bench
    from offramp.bench import energy_prepare as make
    from offramp.bench.energy_arms import DATA

    sets, names = data or DATA, hardware_names(hardware)
    options = make.ArmsOptions(
        model,
        runs,
        sets,
        limit,
        finetune_steps,
        recipe,
        tuple(range(seeds if seeds is not None else 3 if finetune_steps else 1)),
        max_wer_increase / 100,
        names,
        rounds=rounds,
        grids=make.grids_of(levels or make.LEVELS),
    )
    with terminal.progress(f"making {options.arms}") as tell:
        make.prepare(options, tell, terminal_energy.show_estimate)
    with terminal.progress("bench energy") as tell:
        report = bench.run(bench.EnergyOptions(options.arms, sets, limit, names), tell)
    terminal_energy.show_energy_bench(report)
    terminal.write_json(json, report.to_dict())
    if plot is not None:
        plots.plot_arms(report.rows, plot)


def speech_llm(
    *,
    model: ModelName = "speech-llm-tiny",
    data: tuple[str, ...] = (),
    limit: Limit = None,
    rounds: int = 3,
    threads: Threads = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """A Speech-LM with every draft that it has, beside plain decoding and transformers.

    Exit status 1: what must be equal is not: texts of drafts, of transformers apart, what beam
    search finds, or calls that wrong drafts add. Needs the extras offramp[wer,hf].

    Args:
        data: Development sets by name, or manifests (may be given several times); default:
            kathleen_arctic, ljspeech_part_1 and 50 of mini_librispeech_train_clean_5.
        rounds: Times that every utterance is decoded in each way; the median counts.
    """
    check_outputs(json, plot)
    for extra in ("wer", "hf"):
        need_extra(extra, "bench speech-llm")
    set_threads(threads)
    from offramp import plots, terminal, terminal_speech_lm
    from offramp.bench import speech_llm as bench

    options = bench.SpeechLLMOptions(data, limit, rounds, curve=plot is not None)
    with terminal.progress(f"bench speech-llm, {model}") as tell:
        report = bench.run(model, options, tell)
    terminal_speech_lm.show_speech_llm(report)
    terminal.write_json(json, report.to_dict())
    if plot is not None:
        plots.plot_thresholds(report.sets, plot)
    if not report.overall.holds:
        sys.exit(1)
