"""Predictors: steps give what the whole gives, and their state may be picked apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.nn.predictors import NormLSTM, PredictorState
from toy_transducer import PREDICTORS, transducer

every_predictor = pytest.mark.parametrize("changes", PREDICTORS.values(), ids=PREDICTORS)


def tokens(batch_size: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randint(11, (batch_size, length), generator=generator)


@every_predictor
@pytest.mark.parametrize("length", [0, 1, 7])
def test_steps_give_what_the_whole_gives(changes: Any, length: int) -> None:
    """The first step takes the blank; step u gives output u of the whole."""
    model = transducer(**changes)
    predictor, ids = model.predictor, tokens(3, length)
    whole = predictor(ids)
    assert whole.shape == (3, length + 1, 20)
    state = predictor.initial_state(3)
    started = torch.cat((torch.full((3, 1), model.config.blank_id), ids), dim=1)
    for u in range(length + 1):
        output, state = predictor.step(started[:, u], state)
        torch.testing.assert_close(output, whole[:, u], rtol=0, atol=1e-5)
    if length > 1:
        assert not torch.allclose(whole[:, 1], whole[:, 2], atol=1e-2)


@every_predictor
def test_later_tokens_never_change_earlier_outputs(changes: Any) -> None:
    """So padding with any token does no harm."""
    predictor, ids = transducer(**changes).predictor, tokens(2, 8)
    padded = ids.clone()
    padded[0, 5:] = 3
    torch.testing.assert_close(predictor(padded)[0, :6], predictor(ids)[0, :6], rtol=0, atol=1e-6)


@every_predictor
def test_a_state_is_picked_apart_by_rows(changes: Any) -> None:
    """In any order, and a row twice: what a beam does. The states picked from stay as they were."""
    predictor, ids = transducer(**changes).predictor, tokens(3, 4)
    state = predictor.initial_state(3)
    for u in range(3):
        _, state = predictor.step(ids[:, u], state)
    before = [part.clone() for part in state.parts]
    expected, after = predictor.step(ids[:, 3], state)
    rows = [2, 0, 2]
    for picked in (state.select(rows), state.select(torch.tensor(rows))):
        output, then = predictor.step(ids[rows, 3], picked)
        torch.testing.assert_close(output, expected[rows], rtol=0, atol=1e-6)
        for a, b in zip(then.parts, after.select(rows).parts, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert all(map(torch.equal, state.parts, before))
    assert state.nbytes == sum(part.numel() * part.element_size() for part in before)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_stateless_predictor_reads_its_last_tokens_alone(context: int) -> None:
    predictor = transducer(predictor="stateless", predictor_context=context).predictor
    ids = tokens(1, 9)
    for changed in range(9):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 11
        moved = (predictor(ids) - predictor(other)).abs().amax(-1)[0] > 1e-6
        assert moved.nonzero().flatten().tolist() == [
            u for u in range(10) if changed < u <= changed + context
        ]


def test_an_lstm_remembers_all_tokens() -> None:
    predictor, ids = transducer().predictor, tokens(1, 9)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 11
    moved = (predictor(ids) - predictor(other)).abs().amax(-1)[0]
    assert moved[0] == 0 and bool((moved[1:] > 0).all())


def test_without_its_norms_the_lstm_is_the_usual_one() -> None:
    """The gates come in another order than in nn.LSTM only by their names: i, f, g, o."""
    ours, theirs = NormLSTM(6), nn.LSTM(6, 6, bias=False, batch_first=True)
    ours.gate_norm, ours.cell_norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        ours.inputs.weight.copy_(theirs.weight_ih_l0)
        ours.recurrent.weight.copy_(theirs.weight_hh_l0)
    x = torch.randn(2, 5, 6)
    zeros = torch.zeros(2, 6)
    output, hidden, cell = ours(x, zeros, zeros)
    expected, (h, c) = theirs(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(hidden, h[0])
    torch.testing.assert_close(cell, c[0])


def test_a_state_may_have_no_width() -> None:
    """One token of context leaves nothing to remember, and rows all the same."""
    predictor = transducer(**PREDICTORS["stateless, one token"]).predictor
    state = predictor.initial_state(4)
    assert isinstance(state, PredictorState)
    assert state.parts[0].shape == (4, 0)
    assert state.select([1]).parts[0].shape == (1, 0)
