"""The batched run equals utterance by utterance, runs no layer twice and none in vain."""

from __future__ import annotations

import math

import pytest
import torch

from offramp.decoding.beam import BeamOptions, beam_search
from offramp.decoding.ctc import Hypothesis, greedy
from offramp.decoding.early_exit_ctc import (
    EarlyExit,
    EarlyExitOptions,
    early_exit,
    stopwatch,
)
from offramp.decoding.exit_policies import (
    Agreement,
    Budget,
    Confidence,
    Decision,
    ExitPolicy,
    ExitTest,
    FixedExit,
    FrameEntropy,
)
from toy_ctc import ToyState, ToyTower, batch

LENGTHS = [31, 8, 22, 40, 17, 3, 26, 35]


def cost(start: int, stop: int, frames: int) -> float:
    return float((stop - start) * frames)


POLICIES: dict[str, ExitPolicy] = {
    "fixed": FixedExit(4),
    "entropy": FrameEntropy(0.9),
    "confidence": Confidence(0.6),
    "agreement": Agreement(0.7),
    "budget": Budget(50.0, cost),
}
OPTIONS = EarlyExitOptions(cost=cost)


def run(policy: ExitPolicy, lengths: list[int] = LENGTHS) -> tuple[list[EarlyExit], ToyTower]:
    tower = ToyTower()
    return early_exit(tower, tower.exits, *batch(lengths), policy, OPTIONS), tower


def assert_same(got: Hypothesis, want: Hypothesis) -> None:
    assert (got.tokens, got.frames) == (want.tokens, want.frames)
    assert got.score == pytest.approx(want.score, abs=1e-4)
    assert got.confidences == pytest.approx(want.confidences, abs=1e-5)


# -- batch == single ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_is_its_utterances_one_by_one(name: str) -> None:
    policy = POLICIES[name]
    together, _ = run(policy)
    features, lengths = batch(LENGTHS)
    for i, got in enumerate(together):
        tower = ToyTower()
        alone = features[i : i + 1, : LENGTHS[i]]
        (want,) = early_exit(tower, tower.exits, alone, lengths[i : i + 1], policy, OPTIONS)
        assert (got.exit_layer, got.frames, got.spent) == (want.exit_layer, want.frames, want.spent)
        assert_same(got.hypothesis, want.hypothesis)
        assert len(got.trail) == len(want.trail)
        for a, b in zip(got.trail, want.trail, strict=True):
            assert a.exit_layer == b.exit_layer
            assert a.score == (None if b.score is None else pytest.approx(b.score, abs=1e-5))
            assert_same(a.hypothesis, b.hypothesis)


@pytest.mark.parametrize("name", ["entropy", "confidence", "agreement", "budget"])
def test_these_batches_leave_at_different_exits(name: str) -> None:
    """Or the test above would show little."""
    results, _ = run(POLICIES[name])
    assert len({r.exit_layer for r in results}) > 1


@pytest.mark.parametrize("name", POLICIES)
def test_leaving_early_writes_what_that_exit_writes_in_a_full_run(name: str) -> None:
    results, _ = run(POLICIES[name])
    tower = ToyTower()
    state, written = tower.embed(*batch(LENGTHS)), {}
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        state = tower.run(state, start, stop)
        written[stop] = greedy(tower.log_probs(state, stop), state.lengths)
    for i, r in enumerate(results):
        assert_same(r.hypothesis, written[r.exit_layer][i])
        for t in r.trail:
            assert_same(t.hypothesis, written[t.exit_layer][i])


# -- what runs ---------------------------------------------------------------------------------


def test_rows_that_left_are_taken_out_and_the_rest_is_trimmed() -> None:
    leaving = {2: [0, 3, 7], 4: [2, 4, 6], 6: [1, 5]}
    left_at = {row: e for e, rows in leaving.items() for row in rows}

    class AsTold:
        """Recognises its rows by their lengths."""

        def tested(self, exits: tuple[int, ...]) -> tuple[int, ...]:
            return exits

        def decide(self, test: ExitTest) -> list[Decision]:
            frames = [(n + 1) // 2 for n in LENGTHS]
            rows = [frames.index(n) for n in test.lengths.tolist()]
            return [Decision(left_at[row] == test.exit_layer) for row in rows]

    results, tower = run(AsTold())  # type: ignore[arg-type]
    assert [r.exit_layer for r in results] == [left_at[i] for i in range(8)]
    assert [r.frames for r in results] == [(n + 1) // 2 for n in LENGTHS]
    assert tower.runs == [(0, 2, 8, 20), (2, 4, 5, 13), (4, 6, 2, 4)]
    assert tower.heads == [2, 4, 6]


def test_all_leaving_at_once_ends_the_run() -> None:
    results, tower = run(Confidence(0.0))
    assert tower.runs == [(0, 2, 8, 20)]
    assert [len(r.trail) for r in results] == [1] * 8


def test_none_leaving_early_runs_each_layer_once() -> None:
    results, tower = run(Confidence(1.1))
    assert tower.runs == [(0, 2, 8, 20), (2, 4, 8, 20), (4, 6, 8, 20)]
    assert [[t.exit_layer for t in r.trail] for r in results] == [[2, 4, 6]] * 8
    assert all(r.spent == 6 * r.frames for r in results)


def test_a_batch_of_one() -> None:
    for policy, want in ((Confidence(0.0), 2), (FixedExit(4), 4), (Confidence(1.1), 6)):
        (result,), tower = run(policy, [9])
        assert (result.exit_layer, result.trail[-1].exit_layer) == (want, want)
        assert tower.runs[-1][1] == want
        assert result.spent == want * 5


def test_no_gradients_are_kept() -> None:
    tower = ToyTower()
    tower.head.requires_grad_(True)
    seen = []

    class Looks(FixedExit):
        def decide(self, test: ExitTest) -> list[Decision]:
            seen.append(test.log_probs.requires_grad)
            return super().decide(test)

    early_exit(tower, tower.exits, *batch([9]), Looks(2))
    assert seen == [False]


# -- options -----------------------------------------------------------------------------------


def test_a_dearer_search_runs_once_per_utterance_at_the_exit_taken() -> None:
    shapes = []

    def decode(log_probs: torch.Tensor) -> Hypothesis:
        shapes.append(tuple(log_probs.shape))
        return beam_search(log_probs, BeamOptions(min_log_prob=-math.inf))[0]

    tower = ToyTower()
    options = EarlyExitOptions(decode=decode)
    results = early_exit(tower, tower.exits, *batch(LENGTHS), Confidence(0.6), options)
    plain, _ = run(Confidence(0.6))
    assert sorted(shapes) == sorted((r.frames, 6) for r in results)
    assert [r.exit_layer for r in results] == [r.exit_layer for r in plain]
    for r, p in zip(results, plain, strict=True):
        assert r.hypothesis.score >= p.hypothesis.score - 1e-4, "a sum, not a single path"
        assert_same(r.trail[-1].hypothesis, p.hypothesis)
    assert any(
        r.hypothesis.tokens != p.hypothesis.tokens for r, p in zip(results, plain, strict=True)
    )


def test_without_a_measure_nothing_is_spent() -> None:
    tower = ToyTower()
    (result,) = early_exit(tower, tower.exits, *batch([9]), FixedExit())
    assert result.spent == 0.0


@pytest.mark.parametrize("blank_id", [0, 5])
def test_an_exit_that_is_all_blank_is_no_answer_whichever_id_that_is(blank_id: int) -> None:
    class LostAtTwo(ToyTower):
        def log_probs(self, state: ToyState, exit_layer: int) -> torch.Tensor:
            found = super().log_probs(state, exit_layer)
            blank = torch.arange(found.shape[-1]) == blank_id
            return (found + 50.0 * blank).log_softmax(-1) if exit_layer == 2 else found

    tower, options = LostAtTwo(), EarlyExitOptions(blank_id)
    results = early_exit(tower, tower.exits, *batch(LENGTHS), Confidence(0.1), options)
    assert all(r.trail[0].score == 0.0 and r.exit_layer > 2 for r in results)
    assert any(r.hypothesis.tokens for r in results)


def test_a_stopwatch_starts_at_zero_and_runs() -> None:
    read = stopwatch()
    first, second = read(), read()
    assert 0.0 <= first <= second < 1000.0
    tower = ToyTower()
    options = EarlyExitOptions(cost=cost, stopwatch=read)
    (result,) = early_exit(tower, tower.exits, *batch([9]), FixedExit(), options)
    assert second < result.spent <= read(), "milliseconds, not what the layers were said to cost"
