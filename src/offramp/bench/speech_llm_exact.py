"""What drafts must leave as it is: what a beam finds, what sampling draws, the number of calls.

Each is a plan with one part changed, so that all else is what `transcribe` runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.config import check_counts, check_positive
from offramp.decoding.drafts import DecodeState, Draft, Proposal
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.speech_lm import DraftName, SpeechLMOptions, SpeechLMPlan, most_tokens
from offramp.decoding.stopping import RowEnd, Stop
from offramp.decoding.tower_beam import TextHypothesis
from offramp.results import ratio
from offramp.speech_lm_recognizer import SpeechLMRecognizer

BEAM_SIZE = 4
SCORES_APART = 1e-3  # of one text, read in calls of other shapes: rounding in float32
_GARBAGE_TOKENS = 4  # drafted in every call
_ROWS = 50  # of a sampling batch
_RARE = 10  # draws of both kinds together: fewer are counted with other rare ones
_CHANCE = 0.01  # that sampling is called inexact though it is exact

# -- drafts that are wrong -----------------------------------------------------------------------


class GarbagePlan(SpeechLMPlan):
    """Drafts tokens at random, at every call."""

    def _make_draft(self, said: Sequence[tuple[int, ...]]) -> Draft:
        return _Garbage()


class _Garbage(Draft):
    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def open(self, state: DecodeState, k: int) -> Proposal:
        return self.propose(state, k)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        shape = (len(state.texts), min(k, _GARBAGE_TOKENS))
        tokens = torch.randint(state.tower.config.vocab_size, shape, generator=self._generator)
        return Proposal(tokens.to(state.tower.device))


# -- beam search ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """What a beam search found for one utterance, in so many calls of the decoder."""

    found: TextHypothesis
    text: str
    calls: int

    def equals(self, plain: Searched) -> bool:
        """The same text with the same score."""
        same = (self.found.tokens, self.found.finish_reason)
        return same == (plain.found.tokens, plain.found.finish_reason) and (
            self.score_apart(plain) <= SCORES_APART
        )

    def score_apart(self, plain: Searched) -> float:
        return abs(self.found.score - plain.found.score)


class SearchPlan(SpeechLMPlan):
    """A beam search that also tells the score, which a transcript has no place for."""

    def __init__(self, recognizer: SpeechLMRecognizer, draft: DraftName) -> None:
        options = SpeechLMOptions(draft, beam_size=BEAM_SIZE)
        super().__init__(recognizer.model, recognizer.tokenizer, options)

    @torch.inference_mode()
    def search(self, inputs: Tensor, lengths: Tensor) -> Searched:
        """What the encoder reads of one utterance, and how long it is [1]."""
        heard = self._model.hear(inputs, lengths)
        (prefix,), (said,) = self._model.prefixes(heard), self._said(heard)
        (most,) = most_tokens(self._model, heard, lengths)
        found, calls = self._search(prefix, said, most, BEAM_SIZE)
        tokens = [token for token in found.tokens if token not in self._eos_ids]
        text = " ".join(self._tokenizer.decode(tokens).split())
        return Searched(found, text, calls)


# -- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """count: texts drawn in each way of each utterance; tokens: how many of each text are drawn."""

    count: int = 1000
    tokens: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_counts(1, count=self.count, tokens=self.tokens)
        check_positive(temperature=self.temperature)


@dataclass(frozen=True)
class SamplingReport:
    """p_values: by draft, of each of `utterances`; None: all draws there began alike."""

    draws: Draws
    utterances: tuple[str, ...]
    p_values: Mapping[str, Sequence[float | None]]

    @property
    def least(self) -> float | None:
        return min(self._known, default=None)

    @property
    def exact(self) -> bool:
        """Whether no draft is known to draw otherwise, all of them looked at together."""
        return self.least is None or self.least * len(self._known) > _CHANCE

    @property
    def _known(self) -> list[float]:
        return [p for found in self.p_values.values() for p in found if p is not None]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "draws": self.draws.count,
            "first_tokens": self.draws.tokens,
            "temperature": self.draws.temperature,
            "utterances": list(self.utterances),
            "p_values": {name: list(found) for name, found in self.p_values.items()},
            "exact": self.exact,
        }


class SampledPlan(SpeechLMPlan):
    """Draws texts of one utterance instead of writing the one that greedy decoding finds."""

    @torch.inference_mode()
    def beginnings(
        self, inputs: Tensor, lengths: Tensor, draws: Draws, first_row: int
    ) -> Counter[tuple[int, ...]]:
        """How often each beginning was drawn, with the noise of rows from `first_row` on."""
        model = self._model
        heard = model.hear(inputs, lengths)
        (prefix,), (said,) = model.prefixes(heard), self._said(heard)
        stop = Stop(min(draws.tokens, model.room(int(lengths[0]))), self._eos_ids)
        sampling, size = Sampling(draws.temperature), model.config.decoder.vocab_size
        found: Counter[tuple[int, ...]] = Counter()
        for at in range(0, draws.count, _ROWS):
            rows = range(first_row + at, first_row + min(at + _ROWS, draws.count))
            prompts, n = [[model.first_token] for _ in rows], len(rows)
            chooser = Chooser(sampling, prompts, rows, size, model.device)
            ends = [RowEnd(stop, None) for _ in rows]
            draft = self._make_draft([said] * n)
            drawn: list[tuple[int, ...]] = [()] * n
            for step in speculate(
                model.decoder, prompts, draft, draws.tokens, chooser, ends, [prefix] * n
            ):
                drawn[step.row] += step.tokens
            found.update(drawn)
        return found


def sampled(
    recognizer: SpeechLMRecognizer, samples: Tensor, drafts: Sequence[DraftName], draws: Draws
) -> dict[str, float | None]:
    """By draft the p-value that it draws texts of an utterance as plain sampling does."""
    inputs = recognizer.reader.inputs([samples])

    def drawn(draft: DraftName, first_row: int) -> Counter[tuple[int, ...]]:
        plan = SampledPlan(recognizer.model, recognizer.tokenizer, SpeechLMOptions(draft))
        return plan.beginnings(*inputs, draws, first_row)

    plain, others = drawn("none", 0), [draft for draft in drafts if draft != "none"]
    # Each has noise of its own: with the same one all write the same, whatever is drawn.
    return {
        draft: homogeneity(drawn(draft, number * draws.count), plain)
        for number, draft in enumerate(others, start=1)
    }


def homogeneity(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float | None:
    """The p-value of Pearson's chi-square test that two samples are of one distribution.

    What was rare in both together counts as one. None: there is only one thing that was drawn.
    """
    both, cells = a + b, []
    rare = [key for key, n in both.items() if n < _RARE]
    cells = [(a[key], b[key]) for key in both if both[key] >= _RARE]
    if rare:
        cells.append((sum(a[key] for key in rare), sum(b[key] for key in rare)))
    if len(cells) < 2:
        return None
    share = ratio(a.total(), both.total())
    assert share is not None, "cells were drawn"
    statistic = sum(
        (n - (n + m) * of) ** 2 / ((n + m) * of)
        for x, y in cells
        for n, m, of in ((x, y, share), (y, x, 1 - share))
    )
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
