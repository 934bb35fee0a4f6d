"""CTC prefix beam search: the most probable texts, not the text of the most probable path.

Hannun et al. (arXiv 1408.2873): each prefix carries the probability of all alignments that write
it, kept apart by whether they end in a blank, so paths that meet in one prefix are added up, not
compared. With a beam that holds every prefix the result is exact. A `Scorer` (a language model,
hotwords: see lm.py) may add to the score of a prefix whenever a token extends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.config import check_counts
from offramp.decoding.ctc import Hypothesis, aligned
from offramp.errors import InputError

_NEVER = -math.inf


class Scorer(Protocol):
    """Log scores of token sequences, added to CTC's. A state is whatever the scorer needs."""

    def start(self) -> Any:
        """The state before any token."""
        ...

    def extend(self, state: Any, token: int) -> tuple[Any, float]:
        """(state after `token`, what the token adds to the score; -inf forbids it)."""
        ...

    def finish(self, state: Any) -> float:
        """What ending here adds to the score."""
        ...


@dataclass(frozen=True)
class BeamOptions:
    """beam_size: prefixes kept per frame. n_best: texts returned at most.

    min_log_prob: tokens below it extend no prefix in that frame; -inf tries all. blank_skip: a
    frame whose blank has at least this probability is taken to be blank, whatever else it might
    be, and costs next to nothing; other readings of such a frame are lost from the score. None
    never does so, which is exact.
    """

    beam_size: int = 16
    n_best: int = 1
    min_log_prob: float = -5.0
    blank_skip: float | None = None

    def __post_init__(self) -> None:
        check_counts(1, beam_size=self.beam_size, n_best=self.n_best)
        if not self.min_log_prob < 0.0:  # not so for NaN
            raise InputError(f"min_log_prob is {self.min_log_prob}; it must be less than 0")
        if self.blank_skip is not None and not 0.0 < self.blank_skip <= 1.0:
            raise InputError(
                f"blank_skip is {self.blank_skip}; it must be greater than 0 and at most 1"
            )


class _Prefix:
    """A token sequence as a node of the tree of all sequences tried, so equal ones are one.

    blank, label: log probability so far of its alignments that end in a blank, in its last token.
    """

    __slots__ = ("blank", "children", "extra", "label", "parent", "state", "token")

    def __init__(self, parent: _Prefix | None, token: int, state: Any, extra: float) -> None:
        self.parent, self.token, self.state, self.extra = parent, token, state, extra
        self.children: dict[int, _Prefix | None] = {}  # None: the scorer forbids it
        self.blank = self.label = _NEVER

    def score(self) -> float:
        return _log_add(self.blank, self.label) + self.extra

    def tokens(self) -> list[int]:
        found, node = [], self
        while node.parent is not None:
            found.append(node.token)
            node = node.parent
        return found[::-1]


def beam_search(
    log_probs: Tensor,
    options: BeamOptions = BeamOptions(),
    scorer: Scorer | None = None,
    blank_id: int = 0,
) -> list[Hypothesis]:
    """The best texts of one utterance, best first, at most `n_best` and never one twice.

    log_probs: [T, V], log-softmax, without padding. A score is log P(text | audio) over all
    alignments plus what the scorer adds; frames are those of the best alignment. Where a closed
    lexicon forbids every text, the list is empty.
    """
    search = _Search(scorer, options, blank_id)
    for row, candidates in _frames(log_probs, options, blank_id):
        search.step(row, candidates)
    found = []
    for prefix, score in search.best():
        tokens = prefix.tokens()
        found.append(aligned(log_probs, tokens, score, blank_id))
    return found


def _frames(
    log_probs: Tensor, options: BeamOptions, blank_id: int
) -> Iterable[tuple[list[float], list[int] | None]]:
    """Per frame: its log probabilities, and the tokens worth trying; None: it is blank."""
    grid = log_probs.detach().cpu()
    tried = grid > options.min_log_prob
    tried[:, blank_id] = False
    skip = torch.zeros(len(grid), dtype=torch.bool)
    if options.blank_skip is not None:
        skip = grid[:, blank_id] >= math.log(options.blank_skip)
    for row, mask, skipped in zip(grid.tolist(), tried, skip.tolist(), strict=True):
        yield row, None if skipped else mask.nonzero()[:, 0].tolist()


class _Search:
    """The beam between two frames."""

    def __init__(self, scorer: Scorer | None, options: BeamOptions, blank_id: int) -> None:
        self._scorer, self._options, self._blank_id = scorer, options, blank_id
        root = _Prefix(None, -1, None if scorer is None else scorer.start(), 0.0)
        root.blank = 0.0
        self._beam = [root]

    def step(self, row: Sequence[float], candidates: Sequence[int] | None) -> None:
        """Read one frame."""
        blank = row[self._blank_id]
        if candidates is None:
            for prefix in self._beam:
                prefix.blank = _log_add(prefix.blank, prefix.label) + blank
                prefix.label = _NEVER
            return
        # What each prefix had before this frame, while the frame's own values are written.
        before = [(p, p.blank, p.label) for p in self._beam]
        for prefix in self._beam:
            prefix.blank = prefix.label = _NEVER
        reached = dict.fromkeys(self._beam)
        for prefix, ended_blank, ended_label in before:
            total = _log_add(ended_blank, ended_label)
            prefix.blank = total + blank
            if prefix.parent is not None:  # held for one more frame
                prefix.label = _log_add(prefix.label, ended_label + row[prefix.token])
            for token in candidates:
                # The same token again is a new one only after a blank.
                path = ended_blank if token == prefix.token else total
                child = self._child(prefix, token) if path > _NEVER else None
                if child is None:
                    continue
                if child not in reached:
                    child.blank = child.label = _NEVER  # it may have left the beam long ago
                    reached[child] = None
                child.label = _log_add(child.label, path + row[token])
        self._prune(reached)

    def _child(self, prefix: _Prefix, token: int) -> _Prefix | None:
        if token not in prefix.children:
            state, gain = None, 0.0
            if self._scorer is not None:
                state, gain = self._scorer.extend(prefix.state, token)
            child = _Prefix(prefix, token, state, prefix.extra + gain)
            prefix.children[token] = child if gain > _NEVER else None
        return prefix.children[token]

    def _prune(self, reached: Iterable[_Prefix]) -> None:
        self._beam = sorted(reached, key=_Prefix.score, reverse=True)[: self._options.beam_size]

    def best(self) -> list[tuple[_Prefix, float]]:
        """The `n_best` prefixes as whole texts, with their final scores."""
        scorer = self._scorer
        scored = [
            (p, p.score() + (0.0 if scorer is None else scorer.finish(p.state))) for p in self._beam
        ]
        possible = [(p, score) for p, score in scored if score > _NEVER]
        return sorted(possible, key=lambda item: -item[1])[: self._options.n_best]


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); numpy's takes longer to call than to compute."""
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))
