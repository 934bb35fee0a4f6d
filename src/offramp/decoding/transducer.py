"""Transducer search over encoder output as it comes: greedy, or a beam with n-best texts.

Both read frame by frame. The whole of a stream between two chunks is a `SearchState`, a value:
`step` makes a new one, so that a stream can be kept, copied and resumed, and streams can join
and leave a batch. The beam is icefall's modified beam search: one token per frame at most, and
hypotheses with the same tokens become one. Unlike torchaudio's, whose beam runs the predictor
again on the last token with each chunk, the predictor here runs once per token, ever.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.config import check_counts
from offramp.decoding.beam import Scorer
from offramp.decoding.ctc import Hypothesis
from offramp.decoding.transducer_state import OpenHypothesis, SearchCounts, SearchState
from offramp.errors import ConfigError, InputError
from offramp.nn.predictors import PredictorState


class Predictor(Protocol):
    """What the search needs of a predictor; see `nn.predictors`."""

    def initial_state(self, batch_size: int) -> PredictorState:
        """Before the first step, which takes the blank."""
        ...

    def step(self, tokens: Tensor, state: PredictorState) -> tuple[Tensor, PredictorState]:
        """tokens [B], the newest of each hypothesis -> (output [B, J], the state after it)."""
        ...


class Joiner(Protocol):
    """What the search needs of a joiner; see `models.transducer`."""

    def log_probs(
        self, encoder_out: Tensor, predictor_out: Tensor, blank_logit: Tensor | None = None, /
    ) -> Tensor:
        """[N, J] and [N, J] -> [N, V], normalised. blank_logit: [N], where it is known already."""
        ...

    def blank_logit(self, encoder_out: Tensor, predictor_out: Tensor, /) -> Tensor:
        """[N], whose sigmoid is the probability of blank; asked only with `blank_skip`."""
        ...


@dataclass(frozen=True)
class TransducerOptions:
    """beam_size: hypotheses kept per frame; None: greedy. n_best: texts returned at most.

    max_symbols: tokens per frame at most. With 1 the joiner runs exactly once per frame, which is
    what the beam does; with more, once more after each token but the last that a frame may have.
    Frames of 40 ms leave 25 tokens a second with 1, far more than anyone speaks; longer frames may
    need more, greedy only.

    min_log_prob: less likely tokens extend no hypothesis in that frame, save the likeliest one.
    blank_skip: where the joiner's own scorer of the blank gives it at least this probability, the
    frame is blank, and labels are not scored (arXiv 2211.00896); needs a factorised blank.
    ctc_blank_skip: where a CTC head does so, the frame is passed over, and nothing runs at all.
    None never skips, which is exact.
    """

    beam_size: int | None = None
    n_best: int = 1
    max_symbols: int = 1
    min_log_prob: float = -5.0
    blank_skip: float | None = None
    ctc_blank_skip: float | None = None

    def __post_init__(self) -> None:
        check_counts(1, n_best=self.n_best, max_symbols=self.max_symbols)
        if self.beam_size is not None:
            check_counts(1, beam_size=self.beam_size)
            if self.max_symbols > 1:
                raise ConfigError(
                    f"max_symbols is {self.max_symbols} with beam_size {self.beam_size}; a beam "
                    "writes at most 1 token per frame: set max_symbols 1, or beam_size None"
                )
        if self.n_best > (self.beam_size or 1):
            raise ConfigError(
                f"n_best is {self.n_best}; it must be at most the beam size, {self.beam_size or 1}"
            )
        if not self.min_log_prob < 0.0:  # not so for NaN
            raise InputError(f"min_log_prob is {self.min_log_prob}; it must be less than 0")
        for name in ("blank_skip", "ctc_blank_skip"):
            threshold = getattr(self, name)
            if threshold is not None and not 0.0 < threshold <= 1.0:
                raise InputError(f"{name} is {threshold}; it must be greater than 0 and at most 1")


class _Scored(NamedTuple):
    """The joiner's word on one hypothesis: log P(blank), the likeliest token and its log P; row
    [V] of all log probabilities, None where only the blank was scored."""

    blank: float
    token: int
    best: float
    row: Tensor | None


class _Way(NamedTuple):
    """How a hypothesis may go on in a frame: `token` after `parent`, or blank (None).

    alignment: frames and confidences; score and extra, with the scorer's state: after it."""

    parent: OpenHypothesis
    token: int | None
    score: float
    extra: float
    scorer_state: Any
    alignment: tuple[tuple[int, ...], tuple[float, ...]]


class TransducerSearch:
    """Searches any number of streams of one model.

    scorer: hotwords, or in a beam also a language model (see lm.py). Greedy search lets it choose
    among labels, after the joiner alone said that there is one: so it costs no call more. And as
    a greedy path cannot turn back, it goes by what a label gains, not by what is taken back from
    labels that leave a half-written hotword.
    """

    def __init__(
        self,
        predictor: Predictor,
        joiner: Joiner,
        blank_id: int,
        options: TransducerOptions = TransducerOptions(),
        scorer: Scorer | None = None,
    ) -> None:
        self._predictor, self._joiner, self._blank_id = predictor, joiner, blank_id
        self.options, self._scorer = options, scorer

    # -- streams -----------------------------------------------------------------------------

    @torch.inference_mode()
    def start(self, device: torch.device | None = None) -> SearchState:
        """A new stream: the predictor reads the blank."""
        blank = torch.tensor([self._blank_id], device=device)
        output, after = self._predictor.step(blank, self._predictor.initial_state(1))
        state = None if self._scorer is None else self._scorer.start()
        empty = OpenHypothesis((), (), (), 0.0, 0.0, state, output[0], after)
        return SearchState((empty,), SearchCounts(predictor_calls=1), 0, empty)

    def restart(self, state: SearchState) -> SearchState:
        """The next utterance of the stream: no tokens; frames and counts go on, nothing runs."""
        return replace(state, hypotheses=(state.empty,), first_frame=state.counts.frames)

    @torch.inference_mode()
    def step(
        self,
        states: Sequence[SearchState],
        encoded: Tensor,
        lengths: Tensor,
        ctc_blank: Tensor | None = None,
    ) -> list[SearchState]:
        """Read the next frames of each stream; `states` themselves do not change.

        encoded: [B, T, J], a chunk of B streams, of which `lengths`, int64 [B], frames are real (0
        is fine). ctc_blank: [B, T], the CTC head's log P(blank), needed with `ctc_blank_skip` only.
        """
        frames_left = lengths.tolist()
        self._check(states, encoded, frames_left, ctc_blank)
        beams = [state.hypotheses for state in states]
        counts = [replace(state.counts) for state in states]
        skipped = None
        if ctc_blank is not None and self.options.ctc_blank_skip is not None:
            skipped = (ctc_blank >= math.log(self.options.ctc_blank_skip)).tolist()
        for t in range(max(frames_left, default=0)):
            rows = []
            for row, length in enumerate(frames_left):
                if t < length:
                    counts[row].frames += 1
                    if skipped is not None and skipped[row][t]:
                        counts[row].skipped_frames += 1
                    else:
                        rows.append(row)
            for _ in range(self.options.max_symbols):
                rows = self._advance(rows, encoded[:, t], beams, counts)
        return [
            replace(state, hypotheses=beam, counts=count)
            for state, beam, count in zip(states, beams, counts, strict=True)
        ]

    def best(self, state: SearchState) -> list[Hypothesis]:
        """The utterance as if it ended here: at most `n_best` texts, best first, none twice.

        A score is that of the audio plus all that the scorer adds. Empty where the scorer allows
        none of the texts.
        """
        found = []
        for h in state.hypotheses:
            end = 0.0 if self._scorer is None else self._scorer.finish(h.scorer_state)
            score = h.score + h.extra + end
            if score > -math.inf:
                found.append(Hypothesis(h.tokens, h.frames, score, h.confidences))
        found.sort(key=lambda h: -h.score)
        return found[: self.options.n_best]

    # -- one frame ---------------------------------------------------------------------------

    def _advance(
        self,
        rows: list[int],
        frame: Tensor,
        beams: list[tuple[OpenHypothesis, ...]],
        counts: list[SearchCounts],
    ) -> list[int]:
        """Score `frame` [B, J] once for the streams `rows`; returns those that wrote a token."""
        if not rows:
            return []
        outputs = torch.stack([h.output for row in rows for h in beams[row]])
        scored = self._score(frame[[row for row in rows for _ in beams[row]]], outputs)
        ways: dict[int, list[_Way]] = {}
        for row in rows:
            own = list(islice(scored, len(beams[row])))
            _count(counts[row], own)
            now = counts[row].frames - 1
            if self.options.beam_size is None:
                ways[row] = [self._choose(beams[row][0], own[0], now)]
            else:
                ways[row] = self._expand(beams[row], own, now, self.options.beam_size)
        grown = [way for row in rows for way in ways[row] if way.token is not None]
        predicted = self._predict(grown)
        for row in rows:
            written = sum(way.token is not None for way in ways[row])
            counts[row].symbols += written
            counts[row].predictor_calls += written > 0
            beams[row] = tuple(_follow(way, predicted) for way in ways[row])
        return [row for row in rows if any(way.token is not None for way in ways[row])]

    def _score(self, frames: Tensor, outputs: Tensor) -> Iterator[_Scored]:
        """What the joiner says on each pair of rows, frames and outputs [N, J]."""
        unsure, blank_only, known = list(range(len(frames))), {}, None
        if self.options.blank_skip is not None:
            known = self._joiner.blank_logit(frames, outputs)
            threshold = math.log(self.options.blank_skip)
            blank = F.logsigmoid(known).tolist()
            blank_only = {n: p for n, p in enumerate(blank) if p >= threshold}
            unsure = [n for n in unsure if n not in blank_only]
        full: Iterator[_Scored] = iter(())
        if unsure:
            if blank_only:
                frames, outputs = frames[unsure], outputs[unsure]
                known = None if known is None else known[unsure]
            log_probs = self._joiner.log_probs(frames, outputs, known)
            best, tokens = log_probs.max(dim=-1)
            blanks = log_probs[:, self._blank_id]
            full = map(_Scored, blanks.tolist(), tokens.tolist(), best.tolist(), log_probs)
        for n in range(len(unsure) + len(blank_only)):
            p = blank_only.get(n)
            yield next(full) if p is None else _Scored(p, self._blank_id, p, None)

    def _choose(self, h: OpenHypothesis, scored: _Scored, frame: int) -> _Way:
        """Greedy: the likeliest token; if it is a label, the scorer may prefer another label."""
        ways = []
        if scored.token != self._blank_id:
            if self._scorer is None:
                return self._label(h, scored.token, scored.best, frame)
            tried = [self._label(h, token, p, frame) for token, p in self._candidates(scored)]
            ways = [way for way in tried if way.extra > -math.inf]
        if not ways:
            return _blank(h, scored)
        return max(ways, key=lambda way: way.score + max(0.0, way.extra - h.extra))

    def _expand(
        self, beam: Sequence[OpenHypothesis], scored: Sequence[_Scored], frame: int, beam_size: int
    ) -> list[_Way]:
        """The best ways on for a beam; hypotheses that come to the same tokens are added up."""
        reached = {h.tokens: _blank(h, s) for h, s in zip(beam, scored, strict=True)}
        for h, s in zip(beam, scored, strict=True):
            for token, p in self._candidates(s):
                way, tokens = self._label(h, token, p, frame), (*h.tokens, token)
                if tokens in reached:  # by a blank after the token came earlier
                    held = reached[tokens]
                    nearer = way if way.score > held.score else held
                    score = float(np.logaddexp(way.score, held.score))
                    reached[tokens] = held._replace(score=score, alignment=nearer.alignment)
                elif way.extra > -math.inf:
                    reached[tokens] = way
        return heapq.nlargest(beam_size, reached.values(), key=lambda way: way.score + way.extra)

    def _candidates(self, scored: _Scored) -> list[tuple[int, float]]:
        """Labels worth trying, with their log probabilities."""
        if scored.row is None:
            return []
        likely = scored.row > self.options.min_log_prob
        likely[scored.token] = True
        likely[self._blank_id] = False
        tokens = likely.nonzero()[:, 0]
        return list(zip(tokens.tolist(), scored.row[tokens].tolist(), strict=True))

    def _label(self, h: OpenHypothesis, token: int, log_p: float, frame: int) -> _Way:
        state, gain = None, 0.0
        if self._scorer is not None:
            state, gain = self._scorer.extend(h.scorer_state, token)
        alignment = ((*h.frames, frame), (*h.confidences, min(1.0, math.exp(log_p))))
        return _Way(h, token, h.score + log_p, h.extra + gain, state, alignment)

    def _predict(self, grown: Sequence[_Way]) -> Iterator[tuple[Tensor, PredictorState]]:
        """The predictor's output and state after each of `grown`, in one call."""
        if not grown:
            return
        parts = zip(*(way.parent.predictor.parts for way in grown), strict=True)
        states = PredictorState(tuple(map(torch.cat, parts)))
        tokens = torch.tensor([way.token for way in grown], device=grown[0].parent.output.device)
        outputs, after = self._predictor.step(tokens, states)
        for n, output in enumerate(outputs):
            yield output, after.select([n])

    def _check(
        self,
        states: Sequence[SearchState],
        encoded: Tensor,
        lengths: Sequence[int],
        ctc_blank: Tensor | None,
    ) -> None:
        B, T = len(states), encoded.shape[1] if encoded.ndim == 3 else 0
        fits = encoded.ndim == 3 and encoded.shape[0] == len(lengths) == B
        if not fits or not all(0 <= length <= T for length in lengths):
            raise InputError(
                f"encoded has shape {list(encoded.shape)}, lengths are {list(lengths)}; {B} "
                "streams need [streams, frames, channels] and as many lengths of at most all frames"
            )
        if (ctc_blank is None) != (self.options.ctc_blank_skip is None):
            raise InputError(
                f"ctc_blank_skip is {self.options.ctc_blank_skip}, and the CTC head's blank is "
                f"{'not ' if ctc_blank is None else ''}given; give both or neither"
            )
        if ctc_blank is not None and ctc_blank.shape != encoded.shape[:2]:
            raise InputError(
                f"ctc_blank has shape {list(ctc_blank.shape)}; it must be {[B, T]}, as encoded"
            )


def _blank(h: OpenHypothesis, scored: _Scored) -> _Way:
    alignment = (h.frames, h.confidences)
    return _Way(h, None, h.score + scored.blank, h.extra, h.scorer_state, alignment)


def _follow(way: _Way, predicted: Iterator[tuple[Tensor, PredictorState]]) -> OpenHypothesis:
    """The hypothesis at the end of `way`; one that wrote a token takes the next of `predicted`."""
    h = way.parent
    tokens, output, predictor = h.tokens, h.output, h.predictor
    if way.token is not None:
        tokens = (*tokens, way.token)
        output, predictor = next(predicted)
    now = (way.score, way.extra, way.scorer_state)
    return OpenHypothesis(tokens, *way.alignment, *now, output, predictor)


def _count(counts: SearchCounts, scored: Sequence[_Scored]) -> None:
    """One call of the joiner, or of the blank's own scorer where that was enough for all."""
    full = sum(s.row is not None for s in scored)
    counts.joiner_calls += full > 0
    counts.joiner_positions += full
    counts.joiner_blank_only += full == 0
    counts.blank_only_positions += len(scored) - full
