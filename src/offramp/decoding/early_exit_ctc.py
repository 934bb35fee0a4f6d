"""The batched early-exit run: utterances leave at the exit their policy picks, the rest go on.

The tower resumes from the exit it tested, so no layer runs twice; rows that left are taken out,
and what is left is trimmed to its longest row. Greedy decoding at the exits is all a policy
needs; a dearer search runs once, at the exit that was taken.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from offramp.decoding.ctc import Hypothesis, greedy
from offramp.decoding.exit_policies import Decision, ExitPolicy, ExitTest, SegmentCost


class State(Protocol):
    """A batch on its way up the tower."""

    @property
    def lengths(self) -> Tensor:
        """int64 [B], true frames of each row."""
        ...

    def select(self, rows: Tensor) -> Self:
        """Only `rows` (int64 [K]), padded no further than the longest of them."""
        ...


StateT = TypeVar("StateT", bound=State)


class CTCTower(Protocol[StateT]):
    """A stack of layers with a CTC head at some of them (see `models.ctc.CTCEncoder`)."""

    def embed(self, features: Tensor, lengths: Tensor) -> StateT:
        """Features [B, T, F] with true lengths [B] -> the state before the first layer."""
        ...

    def run(self, state: StateT, start: int, stop: int) -> StateT:
        """Layers `start` to `stop` - 1."""
        ...

    def log_probs(self, state: StateT, exit_layer: int) -> Tensor:
        """[B, T', V], log-softmax of the head after `exit_layer` layers."""
        ...


@dataclass(frozen=True)
class EarlyExitOptions:
    """cost: what segments cost, counted in `spent` and in the results. stopwatch: milliseconds
    since the work began; then `spent` is what it says, and not what `cost` counts. decode:
    [T, V] without padding -> the text at the exit taken; None: the greedy one.
    """

    blank_id: int = 0
    cost: SegmentCost | None = None
    stopwatch: Callable[[], float] | None = None
    decode: Callable[[Tensor], Hypothesis] | None = None


@dataclass(frozen=True)
class TestedExit:
    """What one exit wrote for one utterance, greedily, and the policy's score of it."""

    __test__ = False  # no test class, whatever pytest thinks

    exit_layer: int
    hypothesis: Hypothesis
    score: float | None


@dataclass(frozen=True)
class EarlyExit:
    """One utterance's answer. exit_layer: the layer it left after, so as many layers ran for it.
    trail: the exits tested on the way, the one taken last. spent: see `EarlyExitOptions`."""

    hypothesis: Hypothesis
    exit_layer: int
    trail: tuple[TestedExit, ...]
    frames: int
    spent: float


def stopwatch() -> Callable[[], float]:
    """A clock that says how many milliseconds ago it was made."""
    began = time.perf_counter()
    return lambda: 1000.0 * (time.perf_counter() - began)


@torch.inference_mode()
def early_exit(
    tower: CTCTower[StateT],
    exits: Sequence[int],
    features: Tensor,
    lengths: Tensor,
    policy: ExitPolicy,
    options: EarlyExitOptions = EarlyExitOptions(),
) -> list[EarlyExit]:
    """Run a batch up the tower until every row has left; results in the order of the input.

    exits: the tower's exits in ascending order, the last of them its top. features: [B, T, F]
    (or [B, N] for a tower that reads samples), padded, at least one row. lengths: int64 [B]. A
    row's result does not depend on the other rows, unless a stopwatch is the measure.
    """
    tested = policy.tested(exits)
    assert tested and list(tested) == sorted(set(tested) & set(exits)), "exits, in order"
    rows = list(range(len(features)))
    trails: list[list[Hypothesis]] = [[] for _ in rows]
    scores: list[list[float | None]] = [[] for _ in rows]
    spent, found = [0.0] * len(rows), dict[int, EarlyExit]()
    state, start = tower.embed(features, lengths), 0
    for exit_layer, next_exit in itertools.zip_longest(tested, tested[1:]):
        state = tower.run(state, start, exit_layer)
        log_probs, frames = tower.log_probs(state, exit_layer), state.lengths.tolist()
        written = greedy(log_probs, state.lengths, options.blank_id)
        for row, hypothesis in zip(rows, written, strict=True):
            trails[row].append(hypothesis)
        for row, more in zip(rows, _costs(options, start, exit_layer, frames), strict=True):
            spent[row] = more if options.stopwatch is not None else spent[row] + more
        now = ([trails[row] for row in rows], [spent[row] for row in rows])
        test = ExitTest(exit_layer, next_exit, log_probs, state.lengths, *now, options.blank_id)
        stay = []
        for at, decision in enumerate(_decide(policy, test)):
            row = rows[at]
            scores[row].append(decision.score)
            if decision.leave:
                own = log_probs[at, : frames[at]]
                answer = written[at] if options.decode is None else options.decode(own)
                trail = map(TestedExit, tested, trails[row], scores[row])
                found[row] = EarlyExit(answer, exit_layer, tuple(trail), frames[at], spent[row])
            else:
                stay.append(at)
        if not stay:
            break
        if len(stay) < len(rows):
            state = state.select(torch.tensor(stay, device=log_probs.device))
        rows, start = [rows[at] for at in stay], exit_layer
    return [found[row] for row in range(len(features))]


def _decide(policy: ExitPolicy, test: ExitTest) -> list[Decision]:
    """The policy's decisions, except that nothing goes beyond the last exit."""
    decisions = policy.decide(test)
    assert len(decisions) == len(test.trails), "one decision per row"
    if test.next_exit is None:
        return [Decision(True, d.score) for d in decisions]
    return decisions


def _costs(
    options: EarlyExitOptions, start: int, stop: int, frames: Sequence[int]
) -> Sequence[float]:
    """Per row: the milliseconds since the work began, or else what the segment costs."""
    if options.stopwatch is not None:
        return [options.stopwatch()] * len(frames)
    if options.cost is None:
        return [0.0] * len(frames)
    return [options.cost(start, stop, n) for n in frames]
