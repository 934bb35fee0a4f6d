"""What the command line shows: drafts in colour as they come, tables, progress bars.

Only the command line imports this. Text goes to standard output; progress and remarks go to
standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from offramp.errors import InputError
from offramp.files import replacing
from offramp.results import DecodeStats, Step

if TYPE_CHECKING:
    from offramp.api import Model, Run
    from offramp.bench.asr import AsrReport
    from offramp.bench.exit_quality import ExitQuality
    from offramp.bench.layerskip import LayerSkipReport
    from offramp.bench.speech_lm_quality import SpeechLMQuality
    from offramp.bench.splitformer import SplitformerReport
    from offramp.bench.tune import TuneReport
    from offramp.decoding.calibration import Calibration
    from offramp.train.loop import StepDone, TrainEvent

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        made.add_row(*row)
    out.print(made)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    print(json.dumps(value), flush=True)


def check_writable(path: Path | None) -> None:
    """Refuse a place that cannot be written to before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file's name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: {path.parent} is no folder you may write to")


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`, if there is one; never a half file."""
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def stream_text(run: Run) -> None:
    """Write the text of a run as it comes."""
    for step in run:
        print(step.text, end="", flush=True)
    print()


def stream_json(run: Run) -> None:
    """One line per round, then one with the whole text and the counts."""
    for step in run:
        print_json({"event": "step"} | vars(step))
    made = run.generations[0]
    print_json(
        {
            "event": "done",
            "text": made.text,
            "tokens": made.tokens,
            "finish_reason": made.finish_reason,
            "stats": made.stats.to_dict(),
        }
    )


def stream_drafts(model: Model, run: Run) -> None:
    """The text as it comes, coloured by origin: green was drafted and accepted, bold is the
    tower's own, red and struck out was drafted and refused."""
    for step in run:
        out.print(_coloured(model, step), end="")
    out.print()


def _coloured(model: Model, step: Step) -> Text:
    assert model.tokenizer is not None
    shown = Text()
    kept, own = step.tokens[: step.accepted], step.tokens[step.accepted :]
    refused = step.drafted[step.accepted :]
    shown.append(model.tokenizer.decode(kept), style="green")
    if not own:
        return shown
    if refused and out.is_terminal:  # without colours they would read as text
        shown.append(model.tokenizer.decode(refused).strip(), style="red strike")
    shown.append(model.tokenizer.decode(own), style="bold")
    return shown


def stats_rows(stats: Mapping[str, DecodeStats]) -> list[list[str]]:
    """A table row per way of decoding."""
    return [
        [
            name,
            number(s.tokens_per_s, 0),
            number(s.layer_calls_per_token, 1),
            "-" if s.acceptance_rate is None else f"{100 * s.acceptance_rate:.0f} %",
            number(s.mean_accepted_length, 1),
        ]
        for name, s in stats.items()
    ]


STATS_COLUMNS = ("", "tokens/s", "layers run per token", "drafts accepted", "tokens per verify")


def show_exit_quality(report: ExitQuality) -> None:
    """A row per exit; the unit is in the column's name."""
    from offramp.bench.exit_quality import ParseExit, TextExit

    title = f"{report.model} on {', '.join(report.data)}"
    if report.kind == "text":
        rows = [
            [str(e.exit_layer), number(e.bits_per_byte, 3), percent(e.top1_agreement)]
            for e in report.exits
            if isinstance(e, TextExit)
        ]
        columns = ("exit layer", "bits per byte", "chooses as the last layer, %")
        return table(f"{title} ({report.items:,} tokens)", columns, rows)
    rows = [
        [str(e.exit_layer), percent(e.exact_match), percent(e.exact_match_supported)]
        for e in report.exits
        if isinstance(e, ParseExit)
    ]
    columns = (
        "exit layer",
        f"exact match, % of all {report.items:,}",
        f"% of the {report.supported_items or 0:,} that TOP's paper counts",
    )
    return table(title, columns, rows)


def show_tuning(report: TuneReport) -> None:
    """The measured candidates, fastest first."""
    rows = [["plain", "-", number(report.plain_tokens_per_s, 0), "1.00", "-"]]
    for c in report.candidates:
        setting = [str(c.exit_layer), str(c.num_draft_tokens)]
        speed = [number(c.tokens_per_s, 0), number(c.speedup)]
        rows.append([*setting, *speed, percent(c.acceptance_rate)])
    columns = ("exit layer", "draft tokens", "tokens/s", "speed-up", "accepted, %")
    table(f"{report.model}: {report.prompts} prompts, {report.threads} threads", columns, rows)
    best = report.best
    if best is None:
        out.print("No draft beat plain decoding here.")
    else:
        options = f"--exit-layer {best.exit_layer} --num-draft-tokens {best.num_draft_tokens}"
        out.print(f"Fastest: {options}")


def show_layerskip(report: LayerSkipReport) -> None:
    """A row per way of decoding, two columns per set of prompts; then what was held equal."""
    from offramp.bench.layerskip import OURS, PEERS

    sets = {"all prompts": report.overall, **report.by_prompt_set}
    rows = []
    for name in (*OURS, *PEERS):
        cells = [name.replace("_", " ")]
        for figures in sets.values():
            gain = figures.speedup(name, "autoregressive")
            cells += [number(figures.tokens_per_s(name), 0), number(gain)]
        rows.append(cells)
    columns = ["tokens/s and ratio to plain", *(part for name in sets for part in (name, "x"))]
    setting = f"exit layer {report.exit_layer}, {report.num_draft_tokens} draft tokens"
    machine = f"{report.threads} threads, {report.dtype}"
    table(f"{report.model}: {setting}, {machine}", columns, rows)
    made = report.overall
    accepted = percent(made.arms["self_speculative"].acceptance_rate)
    out.print(
        f"Identical text in all our ways: {'yes' if made.identical else 'NO'}; the same as "
        f"transformers' for {percent(made.identical_to_transformers)} % of the prompts.\n"
        f"Accepted: {accepted} % of drafted tokens. Adaptive decoding "
        f"where every draft fails: {report.fallback.vs_autoregressive:.2f} of plain speed."
    )


def show_splitformer(report: SplitformerReport) -> None:
    """A row per arm and exit; then ours beside the baselines at equal time."""
    from offramp.bench.splitformer import BASELINES

    rows = []
    for arm, made in report.arms.items():
        for exit_layer, e in made.exits.items():
            rates = [percent(w.mean) + _spread(w.std) for w in e.wer.values()]
            costs = [number(e.macs_per_audio_s / 1e6, 1), number(1e3 * e.cpu_s_per_audio_s, 2)]
            rows.append([arm, str(exit_layer), *rates, *costs])
    sets = [name.replace("_", " ") for name in report.words]
    words = ", ".join(f"{count:,} words" for count in report.words.values())
    machine = f"seeds {', '.join(map(str, report.seeds))}; CPU threads: {report.threads}"
    title = f"WER, %, on connected digits ({words}; {machine}), and cost per second of audio"
    table(title, ("arm", "exit", *sets, "MMAC", "CPU ms"), rows)
    rows = []
    for baseline, by_exit in report.paired.items():
        for exit_layer, pair in by_exit.items():
            gaps = [
                f"{100 * gap.difference:+.1f}{'*' if gap.significant else ' '}"
                for gap in pair.gaps.values()
            ]
            cells = [f"{baseline} {exit_layer}", str(pair.our_exit), number(pair.cpu_ratio)]
            rows.append([*cells, *gaps])
    title = "WER of ours less theirs, points (*: outside the intervals over strings and takes)"
    table(title, ("at the time of", "our exit", "time, ratio", *sets), rows)
    for exit_layer, best in report.best.items():
        shown = f"{best.arm} at exit {best.exit_layer} (WER {percent(best.wer_mean)} %)"
        out.print(f"Best in the time of {BASELINES[0]} {exit_layer}: {shown}")


def show_asr(report: AsrReport) -> None:
    """A row per exit and policy, and below the thresholds of those that have one."""
    rows, settings = [], []
    for name, made in report.policies.items():
        if made.threshold is not None or made.calibrated:
            shown = _setting(name, made.threshold, digits=4)
            settings.append(f"{name} {shown}" + (" (calibrated)" if made.calibrated else ""))
        low, high = (None, None) if made.wer_ci95 is None else made.wer_ci95
        mmacs = None if made.macs_per_audio_s is None else made.macs_per_audio_s / 1e6
        rows.append(
            [
                name,
                percent(made.wer),
                f"{percent(low)}-{percent(high)}",
                percent(made.cer),
                number(made.mean_exit_layer, 1),
                number(mmacs, 1),
                number(made.rtf, 4),
            ]
        )
    columns = ("", "WER, %", "95 %", "CER, %", "exit", "MMAC/s", "RTF")
    size = f"{count(report.utterances, 'utterance')}, {count(report.words, 'word')}"
    table(f"{report.model} on {report.data}: {size}", columns, rows)
    if settings:
        out.print("; ".join(settings))
    if report.left_out:
        show_left_out(report.left_out)


def show_speech_lm(report: SpeechLMQuality) -> None:
    """A row per draft, and what was held equal."""
    rows = []
    for name, made in report.ways.items():
        low, high = (None, None) if made.wer.ci95 is None else made.wer.ci95
        rows.append(
            [
                name,
                percent(made.wer.rate),
                f"{percent(low)}-{percent(high)}",
                percent(made.cer),
                number(made.calls_per_utterance, 1),
                number(made.rtf, 4),
                number(made.rtf_split["decoder"], 4),
                "-" if made.differing is None else "NO" if made.differing else "yes",
            ]
        )
    columns = ("", "WER, %", "95 %", "CER, %", "calls", "RTF", "decoder's", "same text")
    size = f"{count(report.utterances, 'utterance')}, {count(report.words, 'word')}"
    table(f"{report.model} on {report.data}: {size}", columns, rows)
    for name, made in report.ways.items():
        if made.differing:
            texts = count(made.differing, "text")
            err.print(f"{name}: {texts} differ from those of plain decoding", markup=False)
    if report.left_out:
        show_left_out(report.left_out)


def say_lossy(threshold: float) -> None:
    told = f"threshold {threshold:g} is lossy: tokens are not verified, and the text may change"
    err.print(told, markup=False)


def show_left_out(utterances: int) -> None:
    left_out = count(utterances, "utterance")
    err.print(f"{left_out} left out: a text with numbers or signs has no single reading")


def show_calibration(found: Calibration) -> None:
    """The guarantee in words, and what it was like on the development set."""
    out.print(found.guarantee)
    if found.threshold is not None:
        setting = _setting(found.rule, found.setting, digits=6)
        out.print(
            f"{found.rule} {setting}: saves {percent(found.saving)} % of the MACs, "
            f"mean exit layer {found.mean_exit_layer:.1f}, WER per utterance "
            f"{100 * found.mean_excess:+.2f} on this data"
        )


def _setting(rule: str, threshold: float | None, digits: int) -> str:
    """What `--threshold` takes, or what it means where no score is beyond it."""
    if threshold is None:
        return "never leaves early"
    # Entropies lie from 0 on and leave below the threshold; other scores from 0 to 1, above it.
    entropy = rule == "entropy"
    if threshold < 0 if entropy else threshold > 1:
        return "never leaves early"
    if threshold >= sys.float_info.max if entropy else threshold <= 0:
        return "always leaves at the first exit"
    return f"{threshold:.{digits}g}" + (" nats" if entropy else "")


def _spread(std: float | None) -> str:
    return "" if std is None else f"±{percent(std)}"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def percent(share: float | None) -> str:
    return "-" if share is None else number(100 * share, 1)


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields what to call with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        shown = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(shown, completed=done, total=total)


def train_progress(name: str, steps: int, events: Iterable[TrainEvent]) -> None:
    """A progress bar on standard error, and a line for every evaluation.

    Under torchrun only the first process shows them.
    """
    from offramp.train.loop import Evaluated, StepDone, is_first_process

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]}  {task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    shown = None
    bar = Progress(*columns, console=err, disable=not is_first_process())
    try:
        for event in events:
            if shown is None:  # nothing to show before the first step: loading may yet fail
                shown = bar.add_task(name, total=steps, loss="", pace="")
                bar.start()
            if isinstance(event, StepDone):
                loss, pace = _loss(event), _pace(event)
                bar.update(shown, completed=event.step, loss=loss, pace=pace)
            elif isinstance(event, Evaluated):
                figures = "  ".join(f"{k} {v:.3f}" for k, v in event.metrics.items())
                err.print(f"step {event.step}: {figures}")
    finally:
        if shown is not None:
            bar.stop()


def _loss(event: StepDone) -> str:
    """At every exit where that is known, the last one's at the end; where the loss is not that of
    the last exit, both."""
    exits = " ".join(f"{loss:.2f}" for loss in event.exit_losses.values())
    if not exits:
        return f"{event.loss:.3f}"
    is_last = event.loss == list(event.exit_losses.values())[-1]
    return exits if is_last else f"{event.loss:.3f}, exits {exits}"


def _pace(event: StepDone) -> str:
    if event.audio_s_per_s is None:
        return f"{event.tokens_per_s:,.0f} tokens/s"
    return f"{event.audio_s_per_s:,.0f} s of audio/s"
