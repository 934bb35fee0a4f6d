"""`offramp demo`: the main jobs on real input, with the checkpoints that ship.

For each prompt: the text as drafts make it, then the same text token by token, whether the two
are identical, and what each cost. For a recording: what each exit writes, where the exit policy
leaves, and what that saves; its text as it comes in, which is what hearing it at once gives; and
what a Speech-LM writes, in fewer calls of its decoder with drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from offramp import terminal
from offramp.api import DraftOptions, Model, load
from offramp.audio.io import SAMPLE_RATE, read_audio
from offramp.audio.live import BLOCK_S
from offramp.audio.vad import VadOptions
from offramp.data.corpora import parse_prompt
from offramp.data.speech import normalize_text
from offramp.decoding.exit_policies import Confidence, edit_distance
from offramp.decoding.speech_lm import SpeechLMOptions, available_drafts
from offramp.decoding.stopping import Stop
from offramp.errors import OfframpError
from offramp.recognizer import Recognizer, TranscribeOptions
from offramp.results import DecodeStats, Transcript, ratio
from offramp.speech_lm_recognizer import SpeechLMRecognizer
from offramp.stream_events import Endpoint, Final
from offramp.streaming import StreamingRecognizer

UTTERANCES = (
    "How long will it take to drive from Chicago to Mississippi",
    "Are there any free concerts in Seattle this weekend",
)
BEGINNING = "The count opened the"
RECORDING = Path(__file__).parent / "samples" / "kathleen_a0339.flac"
SAID = "They obeyed him, and went here and there at his commands."
_ONE_SENTENCE = VadOptions(detector="energy")  # nothing to find, and no extra needed


def run() -> None:
    """Print the demonstration; OfframpError if the two texts differ."""
    # Models so small gain little from a second thread, and on a busy machine two threads that
    # wait for each other are a hundred times slower than one.
    torch.set_num_threads(1)
    parser = load("parse-tiny")
    _warm_up(parser)
    if terminal.out.is_terminal:
        terminal.out.print(
            "[green]drafted by the lower layers and accepted[/]  "
            "[red strike]drafted and refused[/]  [bold]chosen by the whole tower[/]\n"
        )
    for utterance in UTTERANCES:
        _show(parser, "parse-tiny", parse_prompt(utterance), 128)
    _show(load("lm-tiny"), "lm-tiny", BEGINNING, 60)
    _speech()
    _stream()
    _speech_llm()


def _warm_up(model: Model) -> None:
    for draft in (DraftOptions(), DraftOptions("none")):
        model.generate("Parse: warm up =>", draft=draft, stop=Stop(16))


def _show(model: Model, name: str, prompt: str, max_tokens: int) -> None:
    terminal.out.print(f"{name}: {prompt}", style="cyan")
    drafted = model.stream(prompt, stop=Stop(max_tokens))
    terminal.stream_drafts(model, drafted)
    plain = model.generate(prompt, draft=DraftOptions("none"), stop=Stop(max_tokens))
    made = drafted.generations[0]
    if made.tokens != plain.tokens:
        raise OfframpError(
            f"{name} wrote {made.text!r} with drafts and {plain.text!r} without; "
            "this is a defect of ours, please report it"
        )
    # Times of one short text are noisy: the median of a few runs of each, in turns.
    stats = _medians(model, prompt, Stop(max_tokens))
    terminal.table("identical text, both ways", terminal.STATS_COLUMNS, terminal.stats_rows(stats))
    terminal.out.print()


def _medians(model: Model, prompt: str, stop: Stop, rounds: int = 5) -> dict[str, DecodeStats]:
    ways = {"token by token": DraftOptions("none"), "self-speculative": DraftOptions()}
    runs: dict[str, list[DecodeStats]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, draft in ways.items():
            runs[name].append(model.generate(prompt, draft=draft, stop=stop).stats)
    return {name: sorted(made, key=lambda s: s.seconds)[rounds // 2] for name, made in runs.items()}


def _speech(model: str = "asr-tiny") -> None:
    """A recording at every exit, and under the confidence policy."""
    recognizer, confidence = Recognizer.load(model), Confidence()
    policy = "confidence policy"
    ways = {
        f"exit {e}": TranscribeOptions(exit_layer=e, vad=_ONE_SENTENCE)
        for e in recognizer.config.exits
    }
    ways[policy] = TranscribeOptions(exit_policy=confidence, vad=_ONE_SENTENCE)
    made = _transcripts(
        {name: partial(recognizer.transcribe, RECORDING, how) for name, how in ways.items()}
    )
    terminal.out.print(f"{model}: {RECORDING.name}, {SAID!r}", style="cyan")
    for name, transcript in made.items():
        terminal.out.print(f"{name:>17}  {transcript.text}", markup=False)
    _show_costs(made, normalize_text(SAID).split())
    left = terminal.number(made[policy].mean_exit_layer, 0)
    terminal.out.print(
        f"The {policy} (--exit-policy confidence --threshold {confidence.threshold:g}) left after "
        f"{left} of {recognizer.config.num_layers} layers.\n"
    )


def _stream(model: str = "stream-tiny") -> None:
    """The recording as it comes in; OfframpError if that changes the text."""
    recognizer, samples = StreamingRecognizer.load(model), read_audio(RECORDING)
    whole = recognizer.transcribe(samples)
    terminal.out.print(f"{model}: {RECORDING.name}, as it comes in", style="cyan")
    stream, finals = recognizer.open(), list[str]()
    for event in stream.read(torch.split(samples, round(BLOCK_S * SAMPLE_RATE))):
        if isinstance(event, Endpoint):
            continue
        shown_s = event.end_s + event.latency_ms / 1000
        terminal.out.print(f"{shown_s:15.2f} s  {event.text}", markup=False)
        finals += [event.text] if isinstance(event, Final) else []
    if " ".join(finals) != whole:
        raise OfframpError(
            f"{model} wrote {' '.join(finals)!r} as the recording came in and {whole!r} at once; "
            "this is a defect of ours, please report it"
        )
    words = normalize_text(SAID).split()
    wrong = edit_distance(words, whole.split())
    terminal.out.print(
        f"The same text as at once, {wrong} of {len(words)} words wrong; RTF "
        f"{terminal.number(ratio(stream.seconds, stream.audio_s), 3)} on one thread.\n"
    )


def _speech_llm(model: str = "speech-llm-tiny") -> None:
    """The recording with each draft that the checkpoint has; OfframpError if that changes the
    text."""
    recognizer = SpeechLMRecognizer.load(model)
    options = {
        name: SpeechLMOptions(draft=name, vad=_ONE_SENTENCE)
        for name in available_drafts(recognizer.model)
    }
    made = _transcripts(
        {name: partial(recognizer.transcribe, RECORDING, how) for name, how in options.items()}
    )
    plain = made["none"].text
    terminal.out.print(f"{model}: {RECORDING.name}", style="cyan")
    for name, transcript in made.items():
        if transcript.text != plain:
            raise OfframpError(
                f"{model} wrote {transcript.text!r} with draft {name} and {plain!r} without; "
                "this is a defect of ours, please report it"
            )
    words = normalize_text(SAID).split()
    terminal.out.print(plain, markup=False)
    calls = ", ".join(f"{_calls(t)} with {name}" for name, t in made.items() if name != "none")
    terminal.out.print(
        f"The same text with every draft, {edit_distance(words, plain.split())} of {len(words)} "
        f"words wrong; {_calls(made['none'])} calls of the decoder without drafts, {calls}.\n"
    )


def _calls(transcript: Transcript) -> int:
    assert transcript.decoding is not None, "it is of a Speech-LM"
    return transcript.decoding.counts.calls


def _show_costs(made: dict[str, Transcript], words: list[str]) -> None:
    """A row per way: word errors, exit layer, and what it cost."""
    most = max(transcript.macs for transcript in made.values())
    rows = [
        [
            name,
            str(edit_distance(words, transcript.text.split())),
            terminal.number(transcript.mean_exit_layer, 0),
            terminal.number(transcript.macs / 1e6, 0),
            f"{100 * (1 - transcript.macs / most):.0f} %",
            terminal.number(transcript.rtf, 3),
        ]
        for name, transcript in made.items()
    ]
    columns = ("", f"wrong of {len(words)} words", "exit layer", "million MACs", "saved", "RTF")
    terminal.table("", columns, rows)


def _transcripts(
    ways: Mapping[str, Callable[[], Transcript]], rounds: int = 3
) -> dict[str, Transcript]:
    """The run of median time of each way, after one to warm up; the ways take turns."""
    runs: dict[str, list[Transcript]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, transcribe in ways.items():
            runs[name].append(transcribe())
    return {name: sorted(r[1:], key=lambda t: t.seconds)[rounds // 2] for name, r in runs.items()}
