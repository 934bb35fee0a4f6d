"""The exit selector takes the best round by its own formula, and changes its mind."""

from __future__ import annotations

import itertools
import random

import pytest

import toy
import toy_decoding as run
from offramp.decoding.exits import ExitSelector, RoundCosts

FREE = RoundCosts(layer=1.0, head=0.0, extra=0.0)


# -- costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "exit_layer", "drafts", "acceptance", "speedup"),
    [(32, 8, 12, 0.689, 2.32), (24, 6, 8, 0.76, 2.36), (12, 4, 6, 1.0, 2.33)],
)
def test_ideal_speedups_of_the_paper(
    num_layers: int, exit_layer: int, drafts: int, acceptance: float, speedup: float
) -> None:
    """LayerSkip (arXiv 2404.16710): 7B CNN/DM, TOPv2, and a third of the tower, all accepted."""
    tokens = 1 + acceptance * drafts
    plain, round_ = FREE.round(num_layers, 0, 0), FREE.round(num_layers, exit_layer, drafts)
    assert tokens * plain / round_ == pytest.approx(speedup, abs=0.01)
    assert round_ == drafts * exit_layer + num_layers


@pytest.mark.parametrize("exit_layer", range(12))
def test_a_round_of_no_drafts_costs_a_plain_step(exit_layer: int) -> None:
    costs = RoundCosts(2.0, 3.0, 0.1)
    assert costs.round(12, exit_layer, 0) == costs.round(12, 0, 0) == 12 * 2.0 + 3.0


def test_what_a_round_costs() -> None:
    """Layer 5, un-embedding 7, a tenth more for each further token of a call: 2 drafts at exit 3
    of 4 are two passes of 3 layers and the head, one of 3 layers, and one layer and the head for
    three tokens at once."""
    costs = RoundCosts(5.0, 7.0, 0.1)
    assert costs.round(4, 3, 2) == pytest.approx(2 * (3 * 5 + 7) + 3 * 5 + (5 + 7) * 1.2)


def test_more_drafts_and_later_exits_cost_more() -> None:
    costs = RoundCosts(1.0, 0.5, 0.02)
    by_drafts = [costs.round(12, 4, n) for n in range(9)]
    by_exit = [costs.round(12, e, 4) for e in range(1, 12)]
    assert by_drafts == sorted(set(by_drafts))
    assert by_exit == sorted(set(by_exit))


def test_estimated_costs_are_of_the_weights_read() -> None:
    config = toy.config()  # d_model 32, 4 + 2 heads of 8, d_ff 48, 61 tokens
    costs = RoundCosts.estimate(config)
    layer = sum(p.numel() for p in toy.decoder().layers[0].parameters() if p.ndim == 2)
    assert costs.layer == 1.0
    assert costs.head == pytest.approx(61 * 32 / layer)


def test_measured_costs_are_of_this_machine() -> None:
    small, large = (
        RoundCosts.measure(run.model(num_layers=n, vocab_size=v), repeats=3)
        for n, v in ((2, 20), (4, 20_000))
    )
    for costs in (small, large):
        assert costs.layer > 0.0
        assert costs.head > 0.0
        assert costs.extra >= 0.0
    assert large.head > small.head


# -- the choice --------------------------------------------------------------------------------


def teach(selector: ExitSelector, exit_layer: int, acceptance: float, rounds: int = 60) -> None:
    for _ in range(rounds):
        selector.record(exit_layer, acceptance * 10, 10)


def brute_force(
    acceptance: dict[int, float], costs: RoundCosts, num_layers: int, limit: int, margin: float
) -> tuple[int, int]:
    """G(0) = 1, G(n) = 1 + a G(n - 1) (DEL, arXiv 2504.05598), over the cost of the round."""

    def rate(exit_layer: int, n: int) -> float:
        expected = 1.0
        for _ in range(n):
            expected = 1.0 + acceptance[exit_layer] * expected
        return expected / costs.round(num_layers, exit_layer, n)

    best = max(itertools.product(acceptance, range(1, limit + 1)), key=lambda plan: rate(*plan))
    return best if rate(*best) > margin / costs.round(num_layers, 0, 0) else (0, 0)


def test_the_plan_is_the_best_of_all() -> None:
    draw, plans = random.Random(0), set()
    for _ in range(300):
        num_layers = draw.randrange(3, 33)
        exits = draw.sample(range(1, num_layers), min(4, num_layers - 1))
        costs = RoundCosts(draw.uniform(0.5, 2.0), draw.uniform(0.0, 5.0), draw.uniform(0.0, 0.3))
        limit, margin = draw.randrange(1, 13), draw.choice([1.0, 1.05, 1.3])
        selector = ExitSelector(num_layers, exits, costs, margin=margin)
        for exit_layer in exits:
            teach(selector, exit_layer, draw.random() ** 0.3)
        learnt = {e: selector.acceptance(e) for e in exits}
        plan = selector.plan(limit)
        assert plan == brute_force(learnt, costs, num_layers, limit, margin)
        plans.add(plan)
    assert (0, 0) in plans
    assert len(plans) > 50


def test_plain_decoding_is_the_choice_where_nothing_is_accepted() -> None:
    selector = ExitSelector(12, [2, 4, 6], FREE)
    for exit_layer in (2, 4, 6):
        teach(selector, exit_layer, 0.02)
    assert selector.plan(8) == (0, 0)


def test_a_perfect_exit_drafts_as_far_as_it_may() -> None:
    selector = ExitSelector(12, [2, 4, 6], FREE)
    teach(selector, 2, 0.3)
    teach(selector, 4, 1.0)
    teach(selector, 6, 1.0)
    assert [selector.plan(limit) for limit in (4, 8, 30)] == [(4, 4), (4, 8), (4, 30)]


def test_without_room_there_is_no_draft() -> None:
    selector = ExitSelector(12, [4], FREE)
    teach(selector, 4, 1.0)
    assert selector.plan(0) == (0, 0)


def test_drafting_must_pay_for_its_margin() -> None:
    """One draft at exit 6 of 12, always accepted: 2 tokens for 18 layers, 4/3 of plain decoding."""
    for margin, plan in ((1.3, (6, 1)), (1.36, (0, 0))):
        selector = ExitSelector(12, [6], FREE, margin=margin)
        teach(selector, 6, 1.0, rounds=200)
        assert selector.plan(1) == plan


def test_old_evidence_fades() -> None:
    """A rate is the mean of what was seen, weighted by `decay` per round since."""
    selector = ExitSelector(12, [4], FREE, decay=0.5)
    selector.record(4, 3, 4)
    selector.record(4, 0, 2)
    matches, trials = 0.25 * 0.2 + 0.5 * 3, 0.25 * 1.0 + 0.5 * 4 + 2
    assert selector.acceptance(4) == pytest.approx(matches / trials)


def test_a_change_of_text_changes_the_plan() -> None:
    selector = ExitSelector(12, [2, 4], FREE)
    teach(selector, 2, 0.1)
    plans = []
    for acceptance in (1.0, 0.0, 1.0):
        teach(selector, 4, acceptance, rounds=30)
        plans.append(selector.plan(6))
    assert plans == [(4, 6), (0, 0), (4, 6)]


def test_before_all_evidence_an_exit_is_seldom_right() -> None:
    """Nothing is drafted on it, and one match is enough to try."""
    costs = RoundCosts(1.0, 0.3, 0.02)
    selector = ExitSelector(12, [2, 4], costs)
    assert [selector.acceptance(e) for e in (2, 4)] == [0.2, 0.2]
    assert selector.plan(8) == (0, 0)
    selector.record(4, 1, 1)
    assert selector.plan(8)[0] == 4
    assert selector.acceptance(2) == 0.2


def test_the_most_promising_exit_is_cheap_or_often_right() -> None:
    selector = ExitSelector(12, [2, 4, 6], FREE)
    assert selector.most_promising() == 2, "nothing is known, so the cheapest"
    teach(selector, 4, 0.9)
    assert selector.most_promising() == 4
    teach(selector, 4, 0.0)
    assert selector.most_promising() == 2
