"""Many words per decoder call, the same text: every draft of a Speech-LM beside plain decoding.

On recordings taken whole, one by one and eight together of all lengths, where rows end far apart.
All ways, those of transformers on the same weights among them, take turns on each recording, in one
process; times are medians over rounds, the decoder's apart from the encoder's and the CTC's. Also:
word error rates beside a CTC recogniser's and in lossy decoding, beam search and sampling held
against their plain forms, and drafts that are always wrong.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import offramp
from offramp.audio.io import read_audio
from offramp.bench.arms import Progress
from offramp.bench.asr import AsrData
from offramp.bench.speech_llm_exact import (
    Draws,
    GarbagePlan,
    SamplingReport,
    Searched,
    SearchPlan,
    sampled,
)
from offramp.bench.speech_llm_peers import TransformersDecoder, gap, recognized
from offramp.bench.speech_llm_report import GARBAGE, Figures, SpeechLLMReport, lossy
from offramp.bench.speech_lm_quality import (
    Tally,
    as_ways,
    check_lengths,
    draft_options,
    measure,
)
from offramp.bench.wer import need_jiwer
from offramp.config import check_counts, check_share
from offramp.data.corpora import data_root
from offramp.data.manifest import Utterance
from offramp.data.speech import SPEECH_SETS
from offramp.decoding.speech_lm import (
    BEAM_DRAFTS,
    SpeechLMOptions,
    available_drafts,
)
from offramp.errors import InputError
from offramp.speech_lm_recognizer import SpeechLMRecognizer

# Development sets -> how many utterances of them.
DATA: dict[str, int | None] = {
    "kathleen_arctic": None,
    "ljspeech_part_1": None,
    "mini_librispeech_train_clean_5": 50,
}
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
_TOGETHER = 8  # utterances of a ragged batch
_PASSES = 4  # over every utterance: alone, together, beam search, the CTC recogniser


@dataclass(frozen=True)
class SpeechLLMOptions:
    """data: sets by name, or manifests, of which `dev` is taken; none: `DATA`. limit: so many
    utterances of each at most. rounds: how often each is decoded in each way. recognizer: the CTC
    recogniser that WERs are held against. curve: whether a model without heads, which has no
    lossy decoding, is refused."""

    data: tuple[str, ...] = ()
    limit: int | None = None
    rounds: int = 3
    thresholds: tuple[float, ...] = THRESHOLDS
    draws: Draws = field(default_factory=Draws)
    recognizer: str = "asr-tiny"
    curve: bool = False

    def __post_init__(self) -> None:
        check_counts(1, rounds=self.rounds)
        for threshold in self.thresholds:
            check_share(threshold=threshold)
        self.sets()  # which refuses what there is not

    def sets(self) -> dict[str, AsrData]:
        """By name."""
        return {name: self._set(name) for name in self.data or DATA}

    def _set(self, name: str) -> AsrData:
        if name.endswith((".tsv", ".jsonl")):
            return AsrData(Path(name), "dev", self.limit)
        if not SPEECH_SETS.get(name):
            known = ", ".join(known for known, has_text in SPEECH_SETS.items() if has_text)
            raise InputError(
                f"there is no set {name!r} with transcripts; give a manifest (.tsv or .jsonl), or "
                f"one of {known}"
            )
        limits = [n for n in (self.limit, None if self.data else DATA[name]) if n is not None]
        return AsrData(data_root() / name / "manifest.tsv", "dev", min(limits, default=None))


def run(
    model: str = "speech-llm-tiny",
    options: SpeechLLMOptions = SpeechLLMOptions(),
    on_progress: Progress | None = None,
) -> SpeechLLMReport:
    """Everything, on the CPU in float32; on_progress hears of passes over an utterance.

    InputError: an utterance is longer than the decoder has room for, or a package is missing.
    """
    need_jiwer()
    recognizer = SpeechLMRecognizer.load(model)
    if options.curve and recognizer.model.heads is None:
        raise InputError(f"{model} has no heads, and so no curve of thresholds; leave plot out")
    read = {name: data.utterances() for name, data in options.sets().items()}
    for utterances, _ in read.values():
        check_lengths(recognizer, utterances)
    bench = _Bench(recognizer, options, [u for utterances, _ in read.values() for u in utterances])
    tell = on_progress or (lambda done, total: None)
    sets, done = {}, 0
    total = _PASSES * bench.utterances + len(read)
    for name, (utterances, left_out) in read.items():
        sets[name] = bench.figures(utterances, left_out, _after(done, total, tell))
        done += _PASSES * len(utterances)
    return SpeechLLMReport(
        model=model,
        draft=bench.draft,
        recognizer=options.recognizer,
        threads=torch.get_num_threads(),
        rounds=options.rounds,
        sets=sets,
        sampling=bench.sampling([u for u, _ in read.values()], _after(done, total, tell)),
        refused=bench.refused,
        versions={
            "offramp": offramp.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": bench.transformers_version,
        },
    )


class _Bench:
    """A model in all ways that are compared. refused: what transformers says to ways of its own."""

    def __init__(
        self,
        recognizer: SpeechLMRecognizer,
        options: SpeechLLMOptions,
        utterances: Sequence[Utterance],
    ) -> None:
        self._recognizer, self._options, self.utterances = recognizer, options, len(utterances)
        self.draft = recognizer.plan(SpeechLMOptions()).draft
        self._drafts = available_drafts(recognizer.model)
        longest = max(utterances, key=lambda u: u.seconds)
        peer = TransformersDecoder(recognizer)
        self._peers, self.refused = peer.ways(read_audio(longest.path))
        self.transformers_version = peer.version
        own = as_ways(recognizer, draft_options(recognizer))
        believed = {lossy(t): SpeechLMOptions("mtp", threshold=t) for t in options.thresholds}
        wrong = GarbagePlan(recognizer.model, recognizer.tokenizer, SpeechLMOptions("none"))
        self._alone, self._together = own | self._peers, dict(own)
        if recognizer.model.heads is not None:
            self._together |= as_ways(recognizer, believed)
        self._together[GARBAGE] = partial(recognizer.decode, plan=wrong)

    def figures(
        self, utterances: Sequence[Utterance], left_out: int, on_progress: Progress
    ) -> Figures:
        """Of one set."""
        one, rounds, n = self._recognizer, self._options.rounds, len(utterances)
        passes = [_after(at * n, _PASSES * n, on_progress) for at in range(_PASSES)]
        singles = [[row] for row in range(n)]
        alone = measure(one, utterances, self._alone, singles, rounds, passes[0])
        batches = ragged(utterances)
        together = measure(one, utterances, self._together, batches, rounds, passes[1])
        searched = self._searched(utterances, passes[2])
        written = recognized(self._options.recognizer, utterances)
        passes[3](n, n)
        return Figures(
            draft=self.draft,
            references=tuple(u.text for u in utterances),
            left_out=left_out,
            alone=alone,
            together=together,
            searched=searched,
            recognized=tuple(written),
            gaps={way: self._gaps(utterances, alone, way) for way in self._peers},
        )

    def sampling(
        self, sets: Sequence[Sequence[Utterance]], on_progress: Progress
    ) -> SamplingReport:
        """On the utterance of median length of each set."""
        chosen = [sorted(found, key=lambda u: u.seconds)[len(found) // 2] for found in sets]
        draws = self._options.draws
        p_values: dict[str, list[float | None]] = {d: [] for d in self._drafts if d != "none"}
        for done, utterance in enumerate(chosen, start=1):
            made = sampled(self._recognizer, read_audio(utterance.path), self._drafts, draws)
            for draft, p in made.items():
                p_values[draft].append(p)
            on_progress(done, len(chosen))
        return SamplingReport(draws, tuple(str(u.path) for u in chosen), p_values)

    def _searched(
        self, utterances: Sequence[Utterance], on_progress: Progress
    ) -> dict[str, dict[int, Searched]]:
        """By draft, plain search first, by utterance."""
        names = [draft for draft in reversed(self._drafts) if draft in BEAM_DRAFTS]
        plans = {draft: SearchPlan(self._recognizer, draft) for draft in names}
        found: dict[str, dict[int, Searched]] = {draft: {} for draft in names}
        for row, utterance in enumerate(utterances):
            samples = read_audio(utterance.path)
            if self._recognizer.reader.num_inputs(len(samples)):
                inputs = self._recognizer.reader.inputs([samples])
                for draft, plan in plans.items():
                    found[draft][row] = plan.search(*inputs)
            on_progress(row + 1, len(utterances))
        return found

    def _gaps(
        self, utterances: Sequence[Utterance], alone: Mapping[str, Tally], way: str
    ) -> list[float]:
        """Of the utterances that a way of transformers wrote otherwise than we do."""
        ours, theirs = alone["none"], alone[way]
        return [
            gap(
                self._recognizer,
                read_audio(utterances[row].path),
                ours.written[row],
                theirs.written[row],
            )
            for row in theirs.differing(ours)
        ]


def ragged(utterances: Sequence[Utterance]) -> list[list[int]]:
    """Batches of at most eight, each of short and long utterances."""
    order = sorted(range(len(utterances)), key=lambda row: utterances[row].seconds)
    count = -(-len(order) // _TOGETHER)
    return [order[at::count] for at in range(count)]


def _after(before: int, total: int, tell: Progress) -> Progress:
    """`tell`, of something that begins when `before` of `total` have been done."""
    return lambda done, _: tell(before + done, total)
