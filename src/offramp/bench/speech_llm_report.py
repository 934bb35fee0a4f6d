"""What `offramp bench speech-llm` found: figures of a set of utterances, and of all sets together.

Rates of several sets are those of all their utterances, not means of the sets' rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from offramp.bench.speech_llm_exact import BEAM_SIZE, SamplingReport, Searched
from offramp.bench.speech_llm_peers import GREEDY, NEAR_TIE
from offramp.bench.speech_lm_quality import Tally, WayQuality, quality
from offramp.bench.wer import (
    Difference,
    ErrorRate,
    as_reference,
    error_rate,
    paired_difference,
    word_edits,
)
from offramp.results import ratio

GARBAGE = "garbage"
BEAM = f"beam_{BEAM_SIZE}"
_LOSSY = "threshold_"


def lossy(threshold: float) -> str:
    """The name of decoding by that threshold."""
    return f"{_LOSSY}{threshold:g}"


@dataclass(frozen=True)
class CurvePoint:
    """Lossy decoding: heads are believed from `threshold` on. differing: texts that are not those
    of plain decoding."""

    threshold: float
    wer: ErrorRate
    calls_per_utterance: float | None
    differing: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "wer": self.wer.rate,
            "wer_ci95": _listed(self.wer),
            "decoder_calls_per_utterance": self.calls_per_utterance,
            "differing": self.differing,
        }


@dataclass(frozen=True)
class Figures:
    """Of one set, or of several joined. draft: the one that is taken where none is asked for.

    alone: drafts, and ways of transformers, utterance by utterance; together: drafts, thresholds
    and garbage, eight utterances at once. searched: by draft, by utterance. recognized: what the
    CTC recogniser wrote, as references are. gaps: by way of transformers, of the utterances that
    it wrote otherwise, as in `speech_llm_peers.gap`.
    """

    draft: str
    references: tuple[str, ...]
    left_out: int
    alone: Mapping[str, Tally]
    together: Mapping[str, Tally]
    searched: Mapping[str, Mapping[int, Searched]]
    recognized: tuple[str, ...]
    gaps: Mapping[str, Sequence[float]]

    @staticmethod
    def joined(parts: Sequence[Figures]) -> Figures:
        """Of all utterances; the same ways were taken in every part."""
        first, sizes = parts[0], [len(part.references) for part in parts]

        def tallies(name: str) -> dict[str, Tally]:
            found = [getattr(part, name) for part in parts]
            return {
                way: Tally.joined([(f[way], n) for f, n in zip(found, sizes, strict=True)])
                for way in found[0]
            }

        starts = [sum(sizes[:i]) for i in range(len(parts))]
        return Figures(
            draft=first.draft,
            references=tuple(text for part in parts for text in part.references),
            left_out=sum(part.left_out for part in parts),
            alone=tallies("alone"),
            together=tallies("together"),
            searched={
                draft: {
                    start + row: found
                    for part, start in zip(parts, starts, strict=True)
                    for row, found in part.searched[draft].items()
                }
                for draft in first.searched
            },
            recognized=tuple(text for part in parts for text in part.recognized),
            gaps={way: [g for part in parts for g in part.gaps[way]] for way in first.gaps},
        )

    # -- drafts ----------------------------------------------------------------------------

    @property
    def utterances(self) -> int:
        return len(self.references)

    @property
    def words(self) -> int:
        return sum(len(text.split()) for text in self.references)

    @property
    def drafts(self) -> list[str]:
        """`none` first."""
        return [name for name in self.alone if name in self.together]

    @cached_property
    def identical(self) -> dict[str, bool]:
        """Whether a draft wrote what plain decoding writes for one utterance alone: in every
        round, alone and together."""
        plain = self.alone["none"]
        return {
            name: not self.alone[name].differing(plain) and not self.together[name].differing(plain)
            for name in self.drafts
        }

    @cached_property
    def qualities(self) -> dict[str, WayQuality]:
        """By draft and way of transformers, alone."""
        plain = self.alone["none"]
        return {name: quality(t, plain, self.references) for name, t in self.alone.items()}

    def calls(self, draft: str) -> float | None:
        """Of the decoder, per utterance."""
        return ratio(self.alone[draft].counts.calls, self.utterances)

    def call_reduction(self, draft: str) -> float | None:
        return ratio(self.alone["none"].counts.calls, self.alone[draft].counts.calls)

    def decoder_speedup(self, draft: str, over: str = "none") -> float | None:
        return ratio(self.alone[over].times.decoder_s, self.alone[draft].times.decoder_s)

    def decoder_speedup_together(self, draft: str) -> float | None:
        return ratio(self.together["none"].times.decoder_s, self.together[draft].times.decoder_s)

    # -- words -----------------------------------------------------------------------------

    @cached_property
    def wer(self) -> dict[str, ErrorRate]:
        """By draft, threshold, and beam search."""
        found = {name: self.qualities[name].wer for name in self.drafts}
        found |= {lossy(point.threshold): point.wer for point in self.curve}
        texts = {row: as_reference(s.text) for row, s in self.searched["none"].items()}
        written = [texts.get(row, "") for row in range(self.utterances)]
        return found | {BEAM: error_rate(word_edits(self.references, written))}

    @cached_property
    def curve(self) -> list[CurvePoint]:
        """By rising threshold."""
        plain, made = self.together["none"], []
        for name, tally in self.together.items():
            if name.startswith(_LOSSY):
                found = quality(tally, plain, self.references)
                calls, differing = found.calls_per_utterance, found.differing or 0
                threshold = float(name.removeprefix(_LOSSY))
                made.append(CurvePoint(threshold, found.wer, calls, differing))
        return sorted(made, key=lambda point: point.threshold)

    @cached_property
    def recognizer_wer(self) -> ErrorRate:
        return error_rate(word_edits(self.references, self.recognized))

    @cached_property
    def wer_difference(self) -> Difference:
        """Ours, by the draft that is the default, minus the CTC recogniser's."""
        texts = self.alone[self.draft].texts(self.utterances)
        ours, theirs = (word_edits(self.references, w) for w in (texts, self.recognized))
        return paired_difference(ours, theirs)

    # -- what drafts must not change -------------------------------------------------------

    @property
    def garbage_above_plain(self) -> int:
        """Utterances that took more calls with garbage for drafts than without drafts."""
        garbage, plain = self.together[GARBAGE].written, self.together["none"].written
        return sum(garbage[row].counts.calls > plain[row].counts.calls for row in plain)

    def beam_equal(self, draft: str) -> bool:
        """Whether the search found the texts and scores of the plain one, in no more calls."""
        pairs = self._beams(draft)
        return all(a.equals(b) and a.calls <= b.calls for a, b in pairs)

    def beam_calls(self, draft: str) -> float | None:
        """Per utterance."""
        return ratio(sum(s.calls for s in self.searched[draft].values()), self.utterances)

    def _beams(self, draft: str) -> list[tuple[Searched, Searched]]:
        return [(s, self.searched["none"][row]) for row, s in self.searched[draft].items()]

    @property
    def holds(self) -> bool:
        """Whether all that must be equal is, sampling apart."""
        beams = all(map(self.beam_equal, self.searched))
        return all(self.identical.values()) and beams and not self.garbage_above_plain

    # -- JSON ------------------------------------------------------------------------------

    def headline(self) -> dict[str, Any]:
        """What the claim is about."""
        drafts = self.drafts
        return {
            "utterances": self.utterances,
            "identical": self.identical,
            "decoder_calls_per_utterance": {name: self.calls(name) for name in drafts},
            "call_reduction": {name: self.call_reduction(name) for name in drafts},
            "decoder_speedup": {name: self.decoder_speedup(name) for name in drafts},
            "speedup_vs_transformers": self.decoder_speedup(self.draft, GREEDY),
            "wer": {name: wer.rate for name, wer in self.wer.items()},
            "rtf_split": self.qualities[self.draft].rtf_split,
        }

    def details(self) -> dict[str, Any]:
        """All else."""
        return {
            "words": self.words,
            "left_out": self.left_out,
            "wer_ci95": {name: _listed(wer) for name, wer in self.wer.items()},
            "recognizer": {
                "wer": self.recognizer_wer.rate,
                "wer_ci95": _listed(self.recognizer_wer),
                "ours_minus_its": asdict(self.wer_difference),
            },
            "drafts": {name: self.qualities[name].to_dict() for name in self.drafts},
            "decoder_speedup_batch_8": {n: self.decoder_speedup_together(n) for n in self.drafts},
            "threshold_curve": [point.to_dict() for point in self.curve],
            "garbage": {
                "decoder_calls_per_utterance": ratio(
                    self.together[GARBAGE].counts.calls, self.utterances
                ),
                "utterances_above_plain": self.garbage_above_plain,
            },
            "beam": {draft: self._beam_told(draft) for draft in self.searched},
            "transformers": {way: self._peer_told(way) for way in self.gaps},
        }

    def _beam_told(self, draft: str) -> dict[str, Any]:
        apart = [a.score_apart(b) for a, b in self._beams(draft)]
        return {
            "equal": self.beam_equal(draft),
            "max_score_difference": max(apart, default=None),
            "decoder_calls_per_utterance": self.beam_calls(draft),
        }

    def _peer_told(self, way: str) -> dict[str, Any]:
        gaps = self.gaps[way]
        return {
            "decoder_speedup_of_ours": self.decoder_speedup(self.draft, way),
            "decoder_speedup_of_ours_without_drafts": self.decoder_speedup("none", way),
            "differing": len(gaps),
            "differing_at_near_ties": sum(g <= NEAR_TIE for g in gaps),
            "largest_gap": max(gaps, default=None),
        }


@dataclass(frozen=True)
class SpeechLLMReport:
    """draft: the one that is taken where none is asked for. recognizer: that WERs are held
    against. refused: ways of transformers -> what it says to them."""

    model: str
    draft: str
    recognizer: str
    threads: int
    rounds: int
    sets: Mapping[str, Figures]
    sampling: SamplingReport
    refused: Mapping[str, str]
    versions: Mapping[str, str]

    @cached_property
    def overall(self) -> Figures:
        return Figures.joined(list(self.sets.values()))

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        names = ("model", "draft", "recognizer", "threads", "rounds")
        return {
            "suite": "speech-llm",
            **self.overall.headline(),
            "details": {
                **{name: getattr(self, name) for name in names},
                "device": "cpu",
                "dtype": "float32",
                "of_the_draft": "rtf_split, speedup_vs_transformers, recognizer",
                "identical_over": "every utterance and round, alone and in ragged batches of 8",
                "times": "wall-clock medians over rounds, one utterance at a time",
                **self.overall.details(),
                "sampling": self.sampling.to_dict(),
                "transformers_refused": dict(self.refused),
                "by_set": {name: f.headline() | f.details() for name, f in self.sets.items()},
                "versions": dict(self.versions),
            },
        }


def _listed(wer: ErrorRate) -> list[float] | None:
    return None if wer.ci95 is None else list(wer.ci95)
