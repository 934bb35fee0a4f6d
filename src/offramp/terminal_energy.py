"""What the command line shows of streams and their energy: text as it comes, tables, bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.table import Table

from offramp import terminal
from offramp.results import ratio
from offramp.stream_events import Endpoint, Event, Final, Latency, Partial

if TYPE_CHECKING:
    from offramp.bench.compress import CompressReport
    from offramp.bench.energy import EnergyReport
    from offramp.bench.energy_prepare import Estimate
    from offramp.bench.stream_profile import StreamProfile
    from offramp.bench.stream_quality import StreamQuality
    from offramp.compress.plan import Choice, CompressionPlan
    from offramp.decoding.speech_stream import Stream
    from offramp.energy.modelled import ModelledEnergy

_BAR_WIDTH = 16


def show_stream(stream: Stream, events: Iterator[Event], json: bool) -> None:
    """Every event as it comes, then what the stream took; so too where it breaks off."""
    shown: list[Event] = []

    def show(event: Event) -> None:
        shown.append(event)
        terminal.print_json(event.to_dict()) if json else _show_event(event)

    try:
        for event in events:
            show(event)
    except KeyboardInterrupt:  # between two events it is not the stream that hears of it
        for event in stream.finish():
            show(event)
        raise
    finally:
        if stream.audio_s:
            (_json_summary if json else _summary)(stream, shown)


def _json_summary(stream: Stream, shown: Sequence[Event]) -> None:
    latency, trace = asdict(Latency.of(shown)), asdict(stream.trace)
    figures = {"audio_s": stream.audio_s, "seconds": stream.seconds, "rtf": _rtf(stream)}
    terminal.print_json({"event": "done", **figures, "latency_ms": latency, "trace": trace})


def _summary(stream: Stream, shown: Sequence[Event]) -> None:
    count = sum(isinstance(event, Final) for event in shown)
    said = f"{count} utterance{'' if count == 1 else 's'} in {stream.audio_s:.2f} s"
    rtf = terminal.number(_rtf(stream), 3)
    terminal.err.print(f"{said}; {_latency(Latency.of(shown))}; RTF {rtf}")


def _rtf(stream: Stream) -> float | None:
    return ratio(stream.seconds, stream.audio_s)


def _show_event(event: Event) -> None:
    """A line each; on a terminal a partial text makes place for the next one."""
    if isinstance(event, Endpoint):
        print(f"{'endpoint':16} {event.at_s:7.2f}  {event.rule.replace('_', ' ')}", flush=True)
        return
    live = sys.stdout.isatty()
    kind = "partial" if isinstance(event, Partial) else "final"
    line = f"{kind:8} {event.start_s:7.2f} {event.end_s:7.2f}  {event.text}"
    if isinstance(event, Final):
        line += "".join(
            f"\n{'or':8} {other.score:15.2f}  {other.text}" for other in event.alternatives
        )
    if not live:
        print(line, flush=True)
    elif isinstance(event, Final):
        print(f"\r\x1b[K{line}", flush=True)
    else:
        width = terminal.out.width - 1
        shown = line if len(line) <= width else f"{line[:26]}...{event.text[29 - width :]}"
        print(f"\r\x1b[K{shown}", end="", flush=True)


def _latency(latency: Latency) -> str:
    if latency.first_partial_ms is None:
        return "no text"
    return (
        f"a text came after its last token was heard: the first {latency.first_partial_ms:.0f} ms, "
        f"median {latency.median_ms:.0f} ms, 90 % within {latency.p90_ms:.0f} ms"
    )


def show_stream_quality(report: StreamQuality) -> None:
    """A row per chunk size."""
    rows = []
    for size, made in report.chunks.items():
        low, high = (None, None) if made.wer.ci95 is None else made.wer.ci95
        latency, wait = made.timing.after_speech, made.timing.after_emission
        after = (latency.first_partial_ms, latency.median_ms)
        rows.append(
            [
                f"{size:g} ms",
                terminal.percent(made.wer.rate),
                f"{terminal.percent(low)}-{terminal.percent(high)}",
                terminal.percent(made.cer),
                "/".join(terminal.number(ms, 0) for ms in after),
                terminal.number(wait.median_ms, 0),
                terminal.number(made.timing.rtf, 4),
                f"{made.identical} of {report.streamed}",
            ]
        )
    columns = ("chunk", "WER, %", "95 %", "CER, %", "latency, ms", "wait", "RTF", "as whole")
    words = terminal.count(report.words, "word")
    heard = f"{terminal.count(report.utterances, 'utterance')}, {words}"
    terminal.table(f"{report.model} on {report.data}: {heard}", columns, rows)
    terminal.out.print(
        f"Of {terminal.count(report.streamed, 'recording')}, really streamed: latency since the "
        "end of a word in the audio (by forced alignment, right to about a frame), of the first "
        "text / of the words that were recognised, medians; wait, from the model's last token to "
        "the text, in ms; RTF (one thread); and texts that a stream writes as they are written at "
        "once."
    )
    if report.left_out:
        terminal.show_left_out(report.left_out)


def show_profile(report: StreamProfile) -> None:
    """What ran, then the modelled energy on each hardware profile, then the sensor's word."""
    trace = report.trace
    terminal.table(
        f"{report.model} on {report.source}: {trace.audio_s:.1f} s, of which "
        f"{trace.vad_active_s:.1f} s went through the encoder in chunks of {report.chunk_ms:g} ms",
        ("per second of audio", "calls", "weights read, kB", "caches, kB", "MMAC"),
        [
            [
                c.name,
                terminal.number(c.calls_per_s, 1),
                terminal.number(c.weight_bytes_per_s / 1e3, 1),
                terminal.number(c.cache_bytes_per_s / 1e3, 1),
                terminal.number(c.macs_per_s / 1e6, 2),
            ]
            for c in report.energies[0].components
        ],
    )
    for energy in report.energies:
        _show_energy(energy)
    if report.measured is None:
        terminal.out.print(f"Not measured: {report.not_measured}.")
    else:
        joules = report.measured.joules / trace.audio_s
        terminal.out.print(f"{joules:.3g} J per second of audio ({report.measured.label})")
    rtf = terminal.number(report.rtf, 3)
    terminal.out.print(f"Processing: RTF {rtf}; {_latency(report.latency)}.")


def _show_energy(energy: ModelledEnergy) -> None:
    """A row and a bar per component."""
    made = Table(title=energy.label, title_justify="left", title_style="bold")
    made.add_column(energy.profile.name)
    for column in ("mJ per s", "%"):
        made.add_column(column, justify="right")
    made.add_column("", width=_BAR_WIDTH)
    made.add_column("stored in")
    rows = {c.name: c.mj_per_audio_s for c in energy.components}
    if energy.profile.idle_mw is not None:
        rows["idle"] = energy.idle_mj_per_audio_s
    for name, mj in rows.items():
        share = energy.share_percent.get(name, 0.0)
        bar = Bar(100, 0, share, width=_BAR_WIDTH)
        made.add_row(name, f"{mj:.3g}", f"{share:.1f}", bar, _tiers(energy, name))
    made.add_row("all", f"{energy.mj_per_audio_s:.3g}", "", "", "")
    terminal.out.print(made)


def _tiers(energy: ModelledEnergy, name: str) -> str:
    """Such as `shared 412 kB, dram 3,120 kB`."""
    held = (c.tiers for c in energy.components if c.name == name)
    return ", ".join(f"{tier} {_kb(size)} kB" for tiers in held for tier, size in tiers.items())


def show_compression(report: CompressReport) -> None:
    """What was chosen, before and after, what else there was to choose, and a line of it all."""
    plan = report.best.plan
    terminal.table(
        f"{report.model}: {_setting(plan)}, chosen by {plan.made_by}",
        ("component", "choice"),
        [[name, _stored(choice)] for name, choice in plan.choices.items()],
    )
    after, files = report.best.mj_per_audio_s, report.file_bytes
    rows = [
        _less("kB of weights as they run", report.dense_bytes, report.best.stored_bytes),
        _less("kB of model.safetensors", files["dense"], files["compressed"]),
    ]
    for energy in report.dense:
        was, now = energy.mj_per_audio_s, after[energy.profile.name]
        less = f"{100 * (1 - now / was):.0f}"
        rows.append([f"mJ per s, {energy.profile.name}", f"{was:.3g}", f"{now:.3g}", less])
    columns = ("modelled, memory-traffic energy; not measured", "before", "after", "% less")
    terminal.table("", columns, rows)
    if report.front:
        _show_front(report.front, report.baselines)
    terminal.out.print(report.summary)


def _less(what: str, before: int, after: int) -> list[str]:
    return [what, _kb(before), _kb(after), f"{100 * (1 - after / before):.0f}"]


def _stored(choice: Choice) -> str:
    """With how its products are computed, where there are codes."""
    return f"{choice}" if choice.bits == 32 else f"{choice}, {choice.activations} products"


def _setting(plan: CompressionPlan) -> str:
    skip = "" if plan.blank_skip is None else f", blanks skipped from {plan.blank_skip:g}"
    return f"chunks of {plan.chunk_ms:g} ms{skip}"


def _show_front(front: Sequence[CompressionPlan], baselines: Mapping[str, CompressionPlan]) -> None:
    """A row and a bar for each plan; the bar is of the first hardware profile."""
    names = list(front[0].modelled_mj_per_audio_s)
    made = Table(title="What can be had, as predicted", title_justify="left", title_style="bold")
    made.add_column("")
    for column in ("WER increase", *(f"mJ per s, {name}" for name in names), "kB"):
        made.add_column(column, justify="right")
    made.add_column(names[0], width=_BAR_WIDTH)
    most = max(p.modelled_mj_per_audio_s[names[0]] for p in (*front, *baselines.values()))
    for name, plan in (*(("planner", p) for p in front), *baselines.items()):
        mj = plan.modelled_mj_per_audio_s
        figures = [f"{100 * plan.wer_increase:+.2f}", *(f"{mj[n]:.3g}" for n in names)]
        bar = Bar(most, 0, mj[names[0]], width=_BAR_WIDTH)
        made.add_row(name.replace("_", " "), *figures, _kb(plan.stored_bytes), bar)
    terminal.out.print(made)


def show_estimate(estimate: Estimate) -> None:
    """Before the work."""
    seconds = estimate.points * estimate.seconds
    long = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"
    terminal.err.print(
        f"Curves: at most {terminal.count(estimate.points, 'WER')} of about "
        f"{estimate.seconds:.0f} s each, {long}; then at most "
        f"{terminal.count(estimate.plans, 'plan')} carried out, each with "
        f"{terminal.count(estimate.finetune_steps, 'step')} of fine-tuning and a WER. Less: "
        "--levels, --limit, --rounds, --seeds."
    )


def show_energy_bench(report: EnergyReport) -> None:
    """What was measured and counted of every arm, what is modelled, then what the planner saves."""
    from offramp.bench.energy_arms import PLANNER, PLANNER_FREE

    rows = []
    for name, row in report.rows.items():
        latency = row.timing.after_speech
        waits = [terminal.number(ms, 0) for ms in (latency.first_partial_ms, latency.median_ms)]
        low, high = (f"{100 * edge:.1f}" for edge in row.wer_ci95)
        figures = [f"{100 * row.wer:.2f}", f"{low}-{high}", _kb(row.stored_bytes)]
        rows.append([_named(name), *figures, terminal.number(row.timing.rtf, 4), "/".join(waits)])
    steps = {row.outcome.finetune_steps for row in report.rows.values()}
    seeds = " and ".join(
        f"{terminal.count(count, 'step')} of fine-tuning" for count in sorted(steps)
    )
    if any(steps):
        seeds += f", {terminal.count(len(report.seeds), 'seed')}"
    title = f"Measured: {report.words:,} words of {', '.join(report.data)}; {seeds}; one CPU thread"
    columns = ("", "WER, %", "95 %", "kB", "RTF", "latency, first/median, ms")
    terminal.table(title, columns, rows)
    names = [profile.name for profile in report.profiles]
    terminal.table(
        "mJ per second of audio: modelled, memory-traffic energy; not measured",
        ("", *names),
        [
            [_named(name), *(f"{row.mj_per_audio_s[n]:.3g}" for n in names)]
            for name, row in report.rows.items()
        ],
    )
    _show_fractions(report)
    for name, missed in report.missed.items():
        terminal.out.print(
            f"{_named(name)}: nothing that was tried kept to the WER that it was to keep to; the "
            f"nearest is {100 * missed:.2f} points above it, and shown here"
        )
    for arm in (PLANNER, PLANNER_FREE):
        terminal.out.print(_saved(report, arm))
    terminal.out.print(
        f"Over draws of what the profiles take for granted the planner takes less than any "
        f"arm above in at least {100 * report.rank_stability:.1f} % of them (than "
        "one with longer chunks, the planner with free chunks)."
    )


def _show_fractions(report: EnergyReport) -> None:
    """The planner against each arm: in which share of the draws, and in every profile or not."""
    hardware = list(next(iter(report.fractions.values())))
    terminal.table(
        "Draws in which the planner takes less, %: modelled",
        ("than", *hardware, "in every profile"),
        [
            [
                _named(name),
                *(f"{100 * shares[h]:.1f}" for h in hardware),
                "yes" if report.robustly_better(name) else "no",
            ]
            for name, shares in report.fractions.items()
        ],
    )


def _saved(report: EnergyReport, arm: str) -> str:
    """Against the best of uniform and global pruning."""
    from offramp.bench.energy_arms import EQUAL_WER

    chunk, apart = report.rows[arm].plan.chunk_ms, report.differences[arm]
    ours, theirs = (100 * report.rows[n].wer for n in (arm, report.best))
    between = ""
    if apart.ci95 is not None:
        low, high = (100 * edge for edge in apart.ci95)
        between = f", difference {ours - theirs:+.2f}, 95 % {low:+.2f} to {high:+.2f}"
    shares = ", ".join(f"{100 * share:.0f} % on {n}" for n, share in report.less(arm).items())
    known, within = None not in report.saving(arm).values(), f"{100 * EQUAL_WER:g}"
    what = (
        f"within {within}" if known else f"not within {within}, so this is no saving at equal WER"
    )
    return (
        f"{_named(arm)} (chunks of {chunk:g} ms) against {_named(report.best)}: WER {ours:.2f} and "
        f"{theirs:.2f} %{between}, {what}; modelled energy less by {shares}"
    )


def _named(arm: str) -> str:
    return arm.replace("_", " ")


def _kb(size: int) -> str:
    return terminal.number(size / 1e3, 0)
