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


def _no_option(type_: object, file: str | None) -> None:
    _no_options(type_, () if file is None else (file,))


def _no_options(type_: object, files: tuple[str, ...]) -> None:
    """So that `-` may be a file, cyclopts takes unknown options for files too."""
    if unknown := next((f for f in files if f.startswith("-") and f != "-"), None):
        raise ValueError(f"unknown option {unknown} (a file of that name is ./{unknown})")


@app.command
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
    device: str = "cpu",
    dtype: str = "float32",
    threads: Threads = None,
    json: bool = False,
) -> None:
    """Continue a text, streaming it. Drafting is on by default and does not change the text.

    Parameters
    ----------
    prompt: The text to continue; default: standard input, if it is piped.
    draft: Where drafts come from; default: the checkpoint's exit, else adaptive.
    exit_layer: Draft with this many layers.
    num_draft_tokens: Tokens drafted per round, at most.
    min_confidence: Stop a draft at a token less probable than this; default: 0.6 on a CPU.
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
    run = load(model, device=device, dtype=dtype).stream(
        _piped() if prompt is None else prompt,
        sampling=sampling,
        draft=options,
        stop=ends,
        early_exit=early_exit,
    )
    terminal.stream_json(run) if json else terminal.stream_text(run)


@app.command
def transcribe(
    files: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True, validator=_no_options)],
    /,
    *,
    model: ModelName = "asr-tiny",
    format: Literal["txt", "srt", "vtt", "tsv", "json"] = "txt",
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    exit_policy: Literal["entropy", "confidence", "agreement"] | None = None,
    threshold: float | None = None,
    max_wer_increase: float | None = None,
    calibration: Path | None = None,
    exit_layer: int | None = None,
    budget_ms: float | None = None,
    budget_macs: float | None = None,
    beam_size: int | None = None,
    lm: Path | None = None,
    lm_weight: float | None = None,
    hotword: tuple[str, ...] = (),
    detector: Literal["auto", "silero", "energy"] = "auto",
    trail: bool = False,
    device: str = "cpu",
    threads: Threads = None,
) -> None:
    """Turn speech into text. Exit status 1: some of several files failed; they are named.

    Parameters
    ----------
    files: WAV, FLAC, OGG or MP3, of any length; - is standard input.
    out: Folder for a file per recording, NAME.txt and so on; default: standard output.
    exit_policy: Leave the tower as soon as this rule is satisfied; default: at the last exit.
    threshold: Of the rule; default: the calibrated one.
    max_wer_increase: Use a threshold certified for at most this many percent (offramp calibrate).
    calibration: File that calibrated thresholds are in; default: the checkpoint's.
    exit_layer: Always leave after this many layers.
    budget_ms: Go no deeper than fits this time, per segment of speech.
    budget_macs: Go no deeper than fits so many multiply-accumulates, per segment of speech.
    beam_size: Beam search with this many prefixes; default: greedy.
    lm: N-gram language model for the beam search: an ARPA file, such as train-ngram makes.
    lm_weight: How much the language model counts against what was heard; default: 0.5.
    hotword: Words to expect (may be given several times).
    detector: What finds speech; default: silero-vad if it is installed, else loudness.
    trail: With --format json: also what every tested exit wrote.
    """
    from offramp.audio.vad import VadOptions
    from offramp.recognizer import Recognizer, TranscribeOptions
    from offramp.transcript_output import TranscriptOutput

    options = TranscribeOptions(
        exit_policy,
        threshold,
        max_wer_increase,
        calibration,
        exit_layer,
        budget_ms,
        budget_macs,
        beam_size,
        lm,
        lm_weight,
        hotword,
        trail=trail,
        vad=VadOptions(detector=detector),
    )
    output = TranscriptOutput(files, format, out, trail)
    _set_threads(threads)
    if output.write(Recognizer.load(model, device=device), options):
        sys.exit(1)


@app.command
def stream(
    source: Annotated[
        str | None, Parameter(allow_leading_hyphen=True, validator=_no_option)
    ] = None,
    /,
    *,
    model: ModelName = "stream-tiny",
    mic: bool = False,
    sample_rate: int | None = None,
    chunk_ms: float | None = None,
    beam_size: int | None = None,
    hotword: tuple[str, ...] = (),
    blank_skip: float | None = None,
    json: bool = False,
    device: str = "cpu",
    threads: Threads = None,
) -> None:
    """Turn speech into text while it comes in. What breaks off is written as far as it came.

    Parameters
    ----------
    source: WAV, FLAC, OGG or MP3; - is standard input: 16-bit samples, mono, no header.
    mic: Listen to the microphone instead, until Ctrl-C (needs the extra offramp[mic]).
    sample_rate: Of standard input or the microphone, in Hz; default: 16000.
    chunk_ms: Audio that is heard at once; default: what the model was made for.
    beam_size: Beam search with this many hypotheses; default: greedy.
    hotword: Words to expect (may be given several times).
    blank_skip: Score no labels where the blank is this probable (models with their own blank).
    json: One JSON object per event, then one with latency and counts.
    """
    from offramp.audio.live import open_source
    from offramp.decoding.stream_plan import StreamOptions
    from offramp.streaming import StreamingRecognizer
    from offramp.terminal_energy import show_stream

    options = StreamOptions(chunk_ms, beam_size, hotword, blank_skip)
    blocks, rate = open_source(source, mic, sample_rate)
    _set_threads(threads)
    opened = StreamingRecognizer.load(model, device=device).open(options, rate)
    show_stream(opened, opened.read(blocks), json)


@app.command
def profile(
    recording: Path,
    /,
    *,
    model: ModelName = "stream-tiny",
    hardware: str = "edge45,mobile-low,mobile-high,mcu",
    chunk_ms: float | None = None,
    beam_size: int | None = None,
    blank_skip: float | None = None,
    device: str = "cpu",
    threads: Threads = None,
    json: Json = None,
    plot: Annotated[Path | None, Parameter(help="Also draw a figure here (.png).")] = None,
) -> None:
    """What streaming a recording runs, moves and takes in modelled energy, part by part.

    Parameters
    ----------
    recording: WAV, FLAC, OGG or MP3.
    hardware: Profiles, with commas between: edge45, mobile-low, mobile-high, mcu, or .toml files.
    chunk_ms: Audio that is heard at once; default: what the model was made for.
    beam_size: Beam search with this many hypotheses; default: greedy.
    blank_skip: Score no labels where the blank is this probable (models with their own blank).
    """
    from offramp import plots, terminal, terminal_energy
    from offramp.bench.stream_profile import ProfileOptions, run
    from offramp.decoding.stream_plan import StreamOptions

    terminal.check_writable(json)
    terminal.check_writable(plot)
    plots.check_plots(plot)
    _set_threads(threads)
    how = StreamOptions(chunk_ms, beam_size, blank_skip=blank_skip)
    report = run(model, recording, ProfileOptions(tuple(hardware.split(",")), how), device)
    terminal_energy.show_profile(report)
    terminal.write_json(json, report.to_dict())
    if plot is not None:
        plots.plot_energy(report.energies, plot)


@app.command
def compress(
    *,
    model: ModelName = "stream-tiny",
    data: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    max_wer_increase: float | None = None,
    energy_budget_mj: float | None = None,
    plan: Path | None = None,
    hardware: str = "edge45,mobile-low,mobile-high,mcu",
    chunk_ms: tuple[float, ...] = (),
    recipe: Path | None = None,
    finetune_steps: int = 0,
    curve_steps: int = 0,
    split: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    threads: Threads = None,
    plot: Annotated[Path | None, Parameter(help="Also draw a figure here (.png).")] = None,
) -> None:
    """Make a streaming recogniser smaller where that saves most energy. Goes on where it stopped.

    Parameters
    ----------
    data: Manifest (.tsv or .jsonl) of speech like what is to be recognised.
    out: Folder to write: the model, its plan and what was measured.
    max_wer_increase: Percent, over the model as it is; as little energy as that allows.
    energy_budget_mj: Per second of audio, on every profile; as little WER as that allows.
    plan: Carry out this plan (plan.json of an earlier run) instead of searching one.
    hardware: Profiles, with commas between: edge45, mobile-low, mobile-high, mcu, or .toml files.
    chunk_ms: Choose from these (may be given several times); default: the model's own.
    recipe: Fine-tune with the data of this recipe file.
    finetune_steps: So long, after pruning.
    curve_steps: And so long for each point of the sensitivity curves; that takes days.
    split: Take this split only.
    limit: Take so many utterances at most.
    """
    from offramp import plots, terminal, terminal_energy
    from offramp.bench.asr import AsrData
    from offramp.bench.compress import CompressOptions, run
    from offramp.compress.planner import Budget

    terminal.check_writable(plot)
    plots.check_plots(plot)
    _set_threads(threads)
    share = None if max_wer_increase is None else max_wer_increase / 100
    given = (share, energy_budget_mj) != (None, None)
    budget = Budget(share, energy_budget_mj) if given or plan is None else None
    tuning = (recipe, finetune_steps, curve_steps)
    options = CompressOptions(budget, plan, tuple(hardware.split(",")), chunk_ms, *tuning)
    with terminal.progress(f"compressing {model}") as tell:
        report = run(model, AsrData(data, split, limit), out, options, tell, device)
    terminal_energy.show_compression(report)
    if plot is not None and report.front:
        plots.plot_front(report.front, report.baselines, plot)


@app.command
def calibrate(
    *,
    model: ModelName = "asr-tiny",
    data: Path,
    max_wer_increase: float,
    rule: Literal["entropy", "confidence", "agreement"] = "confidence",
    cap: float = 100.0,
    split: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    device: str = "cpu",
    threads: Threads = None,
) -> None:
    """Find a threshold for 'at most +x WER'. Exit status 1: none can be certified.

    Parameters
    ----------
    data: Manifest (.tsv or .jsonl) of speech like what is to be transcribed.
    max_wer_increase: Percent, over the last exit.
    rule: What to find the threshold of.
    cap: Count at most so many percent for one utterance; less says less, and needs fewer of them.
    split: Take this split only.
    limit: Take so many utterances at most.
    out: File to write; default: calibration.json in the checkpoint, where transcribe finds it.
    """
    from offramp import terminal
    from offramp.bench.asr import AsrData, CalibrateOptions, calibrate_model
    from offramp.models.hub import resolve
    from offramp.recognizer import CALIBRATION

    target = out or resolve(model) / CALIBRATION
    terminal.check_writable(target)
    _set_threads(threads)
    options = CalibrateOptions(max_wer_increase, rule, cap)
    with terminal.progress(f"calibrating {model}") as tell:
        found = calibrate_model(model, AsrData(data, split, limit), options, device, tell)
    terminal.show_calibration(found)
    if found.threshold is None:
        sys.exit(1)
    found.save(target)


@app.command
def train(
    recipe: Path,
    *,
    set: Annotated[tuple[str, ...], Parameter(help="key=value, over the recipe's own.")] = (),
    out: Path | None = None,
    device: str = "cpu",
    threads: Threads = None,
) -> None:
    """Train by a recipe file; goes on where a killed run stopped. Works under torchrun.

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


@app.command
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

    Parameters
    ----------
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
    terminal.out.print(f"{out} has {sizes[0]:,} words, {groups}")


@eval_app.command
def exits(
    *,
    model: ModelName,
    data: Path | None = None,
    limit: int | None = None,
    only: tuple[int, ...] = (),
    device: str = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Quality at every exit: bits per byte of a text, or exact match of parses.

    Parameters
    ----------
    data: A .txt file, or a .tsv file with columns utterance and semantic_parse; default: the
        development data that a shipped model was made for.
    limit: Read this many characters or utterances at most.
    only: Evaluate this exit only (may be given several times).
    """
    from offramp import terminal
    from offramp.bench.exit_quality import ExitQualityOptions, run

    terminal.check_writable(json)
    _set_threads(threads)
    with terminal.progress(f"exits of {model}") as tell:
        report = run(model, ExitQualityOptions(data, limit, only or None, device), tell)
    terminal.show_exit_quality(report)
    terminal.write_json(json, report.to_dict())


@eval_app.command
def asr(
    *,
    model: ModelName = "asr-tiny",
    data: Path,
    split: str | None = None,
    limit: int | None = None,
    confidence: float | None = None,
    entropy: float | None = None,
    agreement: float | None = None,
    beam_size: int | None = None,
    lm: Path | None = None,
    lm_weight: float | None = None,
    device: str = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Word and character error rates at every exit and under every exit policy.

    References and what is written are compared in lower case, without punctuation.

    Parameters
    ----------
    data: Manifest (.tsv or .jsonl): path, seconds, text.
    split: Take this split only.
    limit: Take so many utterances at most.
    confidence: Threshold; default: the calibrated one, or 0.95.
    entropy: Threshold; default: the calibrated one, or 0.1.
    agreement: Threshold; default: the calibrated one, or 1.
    beam_size: Also search with this many prefixes, at the last exit.
    lm: Also search with this n-gram language model (an ARPA file), at the last exit.
    lm_weight: How much the language model counts against what was heard; default: 0.5.
    """
    from offramp import terminal
    from offramp.bench.asr import AsrData, AsrOptions, run

    terminal.check_writable(json)
    _set_threads(threads)
    given = {"confidence": confidence, "entropy": entropy, "agreement": agreement}
    thresholds = {rule: value for rule, value in given.items() if value is not None}
    options = AsrOptions(thresholds, beam_size, lm, lm_weight)
    with terminal.progress(f"asr, {model}") as tell:
        report = run(model, AsrData(data, split, limit), options, device, tell)
    terminal.show_asr(report)
    terminal.write_json(json, report.to_dict())


@app.command
def tune(
    *,
    model: ModelName = "lm-tiny",
    data: Path | None = None,
    prompts: int = 30,
    rounds: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
    save: bool = False,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure which exit layer and draft length are fastest on this machine.

    Parameters
    ----------
    data: A .txt or .tsv file that prompts are taken from; default: as for eval exits.
    prompts: How many prompts.
    rounds: Times that each is decoded in each way; the median counts.
    save: Write the result into the checkpoint folder (offramp.json), where generate finds it.
    """
    from offramp import terminal
    from offramp.bench.tune import TuneOptions, run
    from offramp.models.hub import resolve

    terminal.check_writable(json)
    _set_threads(threads)
    options = TuneOptions(data, prompts=prompts, rounds=rounds, device=device, dtype=dtype)
    with terminal.progress(f"tuning {model}") as tell:
        report = run(model, options, tell)
    terminal.show_tuning(report)
    terminal.write_json(json, report.to_dict())
    if save:
        report.save(resolve(model))


@bench_app.command
def layerskip(
    *,
    model: ModelName = "parse-tiny",
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    rounds: int = 3,
    prompts: int = 100,
    peers: bool = True,
    device: str = "cpu",
    dtype: str = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Plain, self-speculative and adaptive decoding beside transformers, in one process.

    Parameters
    ----------
    exit_layer: Default: what the checkpoint recommends, as for num_draft_tokens.
    rounds: Times that every prompt is decoded in each way; the median counts.
    prompts: Utterances of the sample (1 to 100); the 20 passages of a novel are always read.
    peers: Also run transformers (needs the extra offramp[hf]).
    """
    from offramp import terminal
    from offramp.bench.layerskip import LayerSkipOptions, run

    terminal.check_writable(json)
    _set_threads(threads)
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


@bench_app.command
def splitformer(
    *,
    runs: Path | None = None,
    threads: Annotated[int, Parameter(help="CPU threads.")] = 1,
    json: Json = None,
) -> None:
    """WER, operations and CPU time of Splitformer, its controls and ours, at every exit.

    Parameters
    ----------
    runs: Folder that recipes/splitformer_ablation.py trained into, one ARM-SEED for each run.
    """
    from offramp import terminal
    from offramp.bench.splitformer import RUNS, SplitformerOptions, run

    terminal.check_writable(json)
    _set_threads(threads)
    with terminal.progress("bench splitformer") as tell:
        report = run(SplitformerOptions(runs or RUNS), tell)
    terminal.show_splitformer(report)
    terminal.write_json(json, report.to_dict())


@app.command
def fetch(name: str, *, root: Path | None = None, accept_unverified: bool = False) -> None:
    """Download a public corpus into the data folder.

    Parameters
    ----------
    name: One of the names in offramp.data.sources.
    root: The data folder; default: OFFRAMP_DATA, else ../shared/data.
    accept_unverified: Take a file for which nobody publishes a checksum.
    """
    from offramp import terminal
    from offramp.data.corpora import data_root
    from offramp.data.sources import fetch as worker

    folder = worker(name, root or data_root(), accept_unverified=accept_unverified)
    terminal.out.print(f"{name} is in {folder}")


@app.command
def demo() -> None:
    """The main jobs on real input, with the models that ship."""
    from offramp.demo import run

    run()


@app.command
def info() -> None:
    """Versions, devices and shipped models."""
    import torch

    from offramp import __version__, terminal
    from offramp.models.hub import shipped

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [
        ["offramp", __version__],
        ["torch", torch.__version__],
        ["CPU threads", str(torch.get_num_threads())],
        ["CUDA device", cuda],
        ["engine", "eager (PyTorch)"],
        ["shipped models", ", ".join(shipped())],
    ]
    terminal.table("", ("", ""), rows)


def _piped() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("there is no prompt; give one, or pipe text into standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text at byte {error.start}") from error


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


def main(words: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend are one line on standard error, exit status 2.

    words: the command line after the program's name; None: this process's.
    """
    try:
        app(sys.argv[1:] if words is None else words, exit_on_error=False, print_error=False)
    except (OfframpError, CycloptsError) as error:
        print(f"offramp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("offramp: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
