"""What the command line shows of `offramp bench speech-llm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from offramp import terminal

if TYPE_CHECKING:
    from offramp.bench.speech_llm_report import Figures, SpeechLLMReport
    from offramp.bench.wer import ErrorRate


def show_speech_llm(report: SpeechLLMReport) -> None:
    """Calls and time by draft, words by way of decoding, by set; then what was held equal."""
    sets = {"all": report.overall, **report.sets}
    _show_drafts(report, sets)
    _show_words(report, sets)
    _show_checks(report)
    _show_transformers(report)
    if report.overall.left_out:
        terminal.show_left_out(report.overall.left_out)


def _show_drafts(report: SpeechLLMReport, sets: Mapping[str, Figures]) -> None:
    rows = []
    for draft in report.overall.drafts:
        cells = [draft, terminal.number(report.overall.calls(draft), 1)]
        for made in sets.values():
            ratios = (made.call_reduction(draft), made.decoder_speedup(draft))
            cells.append(" / ".join(map(terminal.number, ratios)))
        rows.append([*cells, "yes" if report.overall.identical[draft] else "NO"])
    size = terminal.count(report.overall.utterances, "utterance")
    title = (
        f"{report.model}: decoder calls, and how many times fewer they are and faster the decoder "
        f"is than without drafts ({size}, fp32, {terminal.count(report.threads, 'CPU thread')})"
    )
    columns = ("draft", "calls", *(f"{name}, fewer / faster" for name in sets), "same text")
    terminal.table(title, columns, rows)


def _show_words(report: SpeechLLMReport, sets: Mapping[str, Figures]) -> None:
    from offramp.bench.speech_llm_report import BEAM, lossy

    calls = {name: report.overall.calls(name) for name in report.overall.drafts}
    named = {point.threshold: point.calls_per_utterance for point in report.overall.curve}
    calls |= {lossy(threshold): each for threshold, each in named.items()}
    calls[BEAM] = report.overall.beam_calls("none")
    rows = [
        [name, terminal.number(calls.get(name), 1), *(_wer(s.wer[name]) for s in sets.values())]
        for name in report.overall.wer
    ]
    rows.append([report.recognizer, "-", *(_wer(s.recognizer_wer) for s in sets.values())])
    counts = ", ".join(f"{name} {s.words:,}" for name, s in sets.items())
    title = f"WER, % (95 %); words: {counts}; threshold: LOSSY, heads are believed unverified"
    terminal.table(title, ("", "calls", *sets), rows)
    apart = report.overall.wer_difference
    if apart.difference is not None:
        between = ""
        if apart.ci95 is not None:
            low, high = (100 * edge for edge in apart.ci95)
            between = f" (95 % {low:+.1f} to {high:+.1f})"
        points = f"{100 * apart.difference:+.1f} points{between}"
        terminal.out.print(
            f"WER with draft {report.draft} less that of {report.recognizer}: {points}"
        )


def _wer(found: ErrorRate) -> str:
    if found.ci95 is None:
        return terminal.percent(found.rate)
    low, high = map(terminal.percent, found.ci95)
    return f"{terminal.percent(found.rate)} ({low}-{high})"


def _show_checks(report: SpeechLLMReport) -> None:
    made, same = report.overall, report.overall.identical
    differ = [name for name, equal in same.items() if not equal]
    terminal.out.print(
        "Text identical to plain decoding for utterances alone and eight together, every draft: "
        + (f"NO ({', '.join(differ)})" if differ else "yes")
    )
    beams = (
        f"{draft} {'equal' if made.beam_equal(draft) else 'NOT EQUAL'}, "
        f"{terminal.number(made.beam_calls(draft), 1)} calls"
        for draft in made.searched
    )
    terminal.out.print(f"Beam search, texts and scores: {'; '.join(beams)}")
    above = terminal.count(made.garbage_above_plain, "utterance")
    terminal.out.print(f"More calls with random drafts than without drafts: {above}")
    draws, least = report.sampling.draws, report.sampling.least
    checked = "all draws alike" if least is None else f"least p {least:.3g}"
    terminal.out.print(
        f"Sampling, chi-square of {draws.count:,} draws of {draws.tokens} tokens against plain "
        f"ones: {checked}{'' if report.sampling.exact else ' NOT THE SAME'}"
    )
    split = made.qualities[report.draft].rtf_split
    parts = ", ".join(f"{name} {terminal.number(rtf, 4)}" for name, rtf in split.items())
    rtf = terminal.number(made.qualities[report.draft].rtf, 4)
    terminal.out.print(f"RTF with draft {report.draft}: {rtf} ({parts})")


def _show_transformers(report: SpeechLLMReport) -> None:
    from offramp.bench.speech_llm_peers import NEAR_TIE

    made = report.overall
    for way, gaps in made.gaps.items():
        ratios = [terminal.number(made.decoder_speedup(d, way)) for d in (report.draft, "none")]
        near = sum(gap <= NEAR_TIE for gap in gaps)
        terminal.out.print(
            f"{way.replace('_', ' ')} on the same weights and embeddings: our decoder part is "
            f"{ratios[0]} times as fast with draft {report.draft}, {ratios[1]} without drafts; "
            f"{terminal.count(len(gaps), 'text')} differing, {near} of them at a near-tie"
        )
    for way, said in report.refused.items():
        terminal.out.print(f"{way.replace('_', ' ')} refuses such a prompt: {said}", markup=False)
