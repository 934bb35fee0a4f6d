"""Verbs for language models: generate, tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from offramp.cli.parameters import (
    Device,
    Dtype,
    Json,
    ModelName,
    Threads,
    check_outputs,
    set_threads,
)
from offramp.errors import InputError


def generate(
    prompt: str | None = None,
    /,
    *,
    model: ModelName = "lm-tiny",
    draft: Literal["exit", "adaptive", "ngram", "model", "none"] | None = None,
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    min_confidence: float | None = None,
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
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    json: bool = False,
) -> None:
    """Continue a text, streaming it. Drafting is on by default and does not change the text.

    Args:
        prompt: The text to continue; default: standard input, if it is piped.
        draft: Where drafts come from; default: the checkpoint's exit, else adaptive.
        exit_layer: Draft with so many layers; default: what the checkpoint recommends.
        num_draft_tokens: Tokens drafted per round, at most; default: what the checkpoint
            recommends.
        min_confidence: Stop a draft at a token less probable than this; default: 0.6 on a CPU.
        draft_model: Checkpoint that drafts (--draft model).
        early_exit: Leave the tower here for every token: faster, another text, no drafts.
        max_tokens: Tokens to write, at most.
        stop: End the text before this string (may be given several times).
        stop_token: End the text at this token id (may be given several times).
        temperature: 0 takes the most probable token; the higher, the more varied.
        top_k: Sample from so many tokens, the most probable; 0: from all.
        top_p: Sample from the most probable tokens that make up this share.
        repetition_penalty: Above 1, tokens that have been there become less probable.
        seed: Of the sampling; the same seed draws the same text.
        json: One JSON object per round, then one with text and counts.
    """
    if prompt is None:
        prompt = _piped()
    from offramp import terminal
    from offramp.api import DraftOptions, load
    from offramp.decoding.sampling import Sampling
    from offramp.decoding.stopping import Stop

    set_threads(threads)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    drafting = DraftOptions(draft, exit_layer, num_draft_tokens, min_confidence, draft_model)
    ends = Stop(max_tokens, frozenset(stop_token), stop)
    loaded = load(model, device=device, dtype=dtype)
    run = loaded.stream(prompt, sampling=sampling, draft=drafting, stop=ends, early_exit=early_exit)
    terminal.stream_json(run) if json else terminal.stream_text(run)


def tune(
    *,
    model: ModelName = "lm-tiny",
    data: Path | None = None,
    prompts: int = 30,
    rounds: int = 3,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    save: bool = False,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure which exit layer and draft length are fastest on this machine.

    Args:
        data: A .txt or .tsv file that prompts are taken from; default: as for eval exits.
        prompts: How many prompts.
        rounds: Times that each is decoded in each way; the median counts.
        save: Write the result into the checkpoint folder (offramp.json), where generate finds it.
    """
    check_outputs(json)
    from offramp import terminal
    from offramp.bench.tune import TuneOptions, run
    from offramp.models.hub import resolve

    set_threads(threads)
    options = TuneOptions(data, prompts=prompts, rounds=rounds, device=device, dtype=dtype)
    with terminal.progress(f"tuning {model}") as tell:
        report = run(model, options, tell)
    terminal.show_tuning(report)
    terminal.write_json(json, report.to_dict())
    if save:
        report.save(resolve(model))


def _piped() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("there is no prompt; give one, or pipe text into standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text at byte {error.start}") from error
