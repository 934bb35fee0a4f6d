"""When an utterance may leave a CTC encoder: one protocol, and every rule a small class.

At each tested exit a policy sees what the exit wrote and says, for every row, whether that is
the answer. Rules with a threshold score an exit, higher meaning more certain, and leave at the
first exit whose score reaches it; calibration.py finds thresholds, and the defaults cost
asr-tiny half a point of WER on its development sets taken together. No policy keeps a state, so
rows may leave a batch at any time. Sources: early exit by frame entropy, arXiv 2309.09546; the
other rules are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from offramp.config import check_counts
from offramp.decoding.ctc import Hypothesis
from offramp.errors import InputError

# (start, stop, frames) -> what layers `start` to `stop` - 1 and the head at `stop` cost for one
# utterance of `frames` true output frames, in multiply-accumulates, milliseconds or any one unit.
# What comes before the layers counts to start 0.
SegmentCost = Callable[[int, int, int], float]


@dataclass(frozen=True)
class ExitTest:
    """What is known when a batch reaches an exit.

    next_exit: the exit tested after this one, None at the last. log_probs: [B, T, V] of this
    exit. lengths: int64 [B], true frames. trails: per row what the exits tested so far wrote,
    this one last. spent: per row, in the unit of the run. blank_id: of the tower.
    """

    exit_layer: int
    next_exit: int | None
    log_probs: Tensor
    lengths: Tensor
    trails: Sequence[Sequence[Hypothesis]]
    spent: Sequence[float]
    blank_id: int


@dataclass(frozen=True)
class Decision:
    """leave: whether this exit's text is the answer. score: how certain the rule found the exit;
    None where it does not score."""

    leave: bool
    score: float | None = None


class ExitPolicy(Protocol):
    """A rule for leaving the tower. At the last tested exit everything leaves, whatever it says."""

    def tested(self, exits: Sequence[int]) -> tuple[int, ...]:
        """Which of the tower's exits to test, in order; only their heads are computed."""
        ...

    def decide(self, test: ExitTest) -> list[Decision]:
        """One decision per row. What lies beyond `lengths` has no effect."""
        ...


@dataclass(frozen=True)
class FixedExit:
    """Always leave at `exit_layer`, counted from 1; None: at the last exit. No other is tested."""

    exit_layer: int | None = None

    def tested(self, exits: Sequence[int]) -> tuple[int, ...]:
        chosen = exits[-1] if self.exit_layer is None else self.exit_layer
        if chosen not in exits:
            raise InputError(
                f"exit layer is {chosen}; this model has exits at {', '.join(map(str, exits))}"
            )
        return (chosen,)

    def decide(self, test: ExitTest) -> list[Decision]:
        """Others may have asked for exits before it (see `AnyOf`)."""
        last = test.next_exit is None
        reached = last if self.exit_layer is None else test.exit_layer >= self.exit_layer
        return [Decision(reached) for _ in test.trails]


@dataclass(frozen=True)
class _Scored:
    """A rule that looks at every exit, scores it, and leaves by a threshold."""

    threshold: float

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise InputError(f"threshold is {self.threshold}; it must be a number")

    @classmethod
    def at_score(cls, score: float) -> Self:
        """The rule that leaves where its score is at least this."""
        return cls(score)

    def tested(self, exits: Sequence[int]) -> tuple[int, ...]:
        return tuple(exits)


@dataclass(frozen=True)
class FrameEntropy(_Scored):
    """Leave when the mean entropy of the frames, in nats, is at most `threshold`.

    Below 0 nothing leaves early; log(vocab_size) is the largest entropy. Score: minus the mean
    entropy. Blank frames count, and are nearly all certain. No frames at all: entropy 0.
    """

    threshold: float = 0.67

    @classmethod
    def at_score(cls, score: float) -> Self:
        return cls(-score)

    def decide(self, test: ExitTest) -> list[Decision]:
        entropy = torch.special.entr(test.log_probs.exp()).sum(dim=-1)
        means = _mean(entropy, _valid(test))
        return [Decision(mean <= self.threshold, -mean) for mean in means]


@dataclass(frozen=True)
class Confidence(_Scored):
    """Leave when the confidence of the greedy path is at least `threshold`.

    Score: the geometric mean of the frame maxima, blank frames excluded, in [0, 1]. An output
    that is all blank scores 0: an exit that lost the utterance looks just like silence, so only
    the threshold 0, which leaves at the first exit, lets it go. Above 1 nothing leaves early.
    """

    threshold: float = 0.76

    def decide(self, test: ExitTest) -> list[Decision]:
        best, ids = test.log_probs.max(dim=-1)
        speaks = _valid(test) & (ids != test.blank_id)
        means, any_frame = _mean(best, speaks), speaks.any(dim=1).tolist()
        scores = [
            min(1.0, math.exp(mean)) if spoke else 0.0
            for mean, spoke in zip(means, any_frame, strict=True)
        ]
        return [Decision(score >= self.threshold, score) for score in scores]


@dataclass(frozen=True)
class Agreement(_Scored):
    """Leave when `patience` times in a row an exit wrote what the one before it did (patience).

    threshold: how alike two texts must be: 1 - edit distance / tokens of the longer, 1 if equal;
    at most 0 leaves at the first exit, above 1 nothing leaves early. Score: the least likeness of
    the last `patience` pairs; 0 where there are fewer, and where nothing was written, since
    exits that all lost the utterance agree as well.
    """

    threshold: float = 0.91
    patience: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(1, patience=self.patience)

    def decide(self, test: ExitTest) -> list[Decision]:
        scores = [self._score(trail) for trail in test.trails]
        return [Decision(score >= self.threshold, score) for score in scores]

    def _score(self, trail: Sequence[Hypothesis]) -> float:
        if len(trail) <= self.patience:
            return 0.0
        newest = [h.tokens for h in trail[-self.patience - 1 :]]
        return min(likeness(a, b) for a, b in itertools.pairwise(newest))


# The rules that have a threshold, by the name that options and files give them.
RULES: dict[str, type[FrameEntropy] | type[Confidence] | type[Agreement]] = {
    "confidence": Confidence,
    "entropy": FrameEntropy,
    "agreement": Agreement,
}


@dataclass(frozen=True)
class Budget:
    """Leave when the next segment would cost more than is left of `limit`.

    So no segment is started whose known cost exceeds the budget; the first exit is always
    reached, even where it costs more. The unit is that of `cost` and of the run's `spent`. With
    milliseconds a batch waits for all its rows: give costs that were measured on such batches.
    """

    limit: float
    cost: SegmentCost

    def __post_init__(self) -> None:
        if not self.limit >= 0.0:  # not so for NaN
            raise InputError(f"limit is {self.limit}; it must be at least 0")

    def tested(self, exits: Sequence[int]) -> tuple[int, ...]:
        return tuple(exits)

    def decide(self, test: ExitTest) -> list[Decision]:
        if test.next_exit is None:
            return [Decision(True) for _ in test.trails]
        found = []
        for frames, spent in zip(test.lengths.tolist(), test.spent, strict=True):
            then = spent + self.cost(test.exit_layer, test.next_exit, frames)
            found.append(Decision(then > self.limit))
        return found


@dataclass(frozen=True)
class AnyOf:
    """Leave as soon as one of `policies` says so, such as a confidence within a budget.

    Score: that of the first policy that has one. Exits that any of them tests are tested.
    """

    policies: tuple[ExitPolicy, ...]

    def __post_init__(self) -> None:
        if not self.policies:
            raise InputError("AnyOf was given no policies; give one or more")

    def tested(self, exits: Sequence[int]) -> tuple[int, ...]:
        wanted = {e for policy in self.policies for e in policy.tested(exits)}
        return tuple(e for e in exits if e in wanted)

    def decide(self, test: ExitTest) -> list[Decision]:
        found = []
        for decisions in zip(*(p.decide(test) for p in self.policies), strict=True):
            scores = [d.score for d in decisions if d.score is not None]
            found.append(Decision(any(d.leave for d in decisions), scores[0] if scores else None))
        return found


def likeness(a: Sequence[int], b: Sequence[int]) -> float:
    """1 - edit distance / length of the longer; 0 where both are empty (see `Agreement`)."""
    longer = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longer if longer else 0.0


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b`."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _valid(test: ExitTest) -> Tensor:
    """bool [B, T]: the frames that are not padding."""
    time = torch.arange(test.log_probs.shape[1], device=test.log_probs.device)
    return time < test.lengths.to(test.log_probs.device)[:, None]


def _mean(values: Tensor, chosen: Tensor) -> list[float]:
    """Mean over the chosen frames of each row of [B, T]; 0 where there are none."""
    sums = values.masked_fill(~chosen, 0.0).double().sum(dim=1)
    means: list[float] = (sums / chosen.sum(dim=1).clamp(min=1)).tolist()
    return means
