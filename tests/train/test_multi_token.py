"""The head-by-head loss has the gradients of the obvious one, in the memory of one head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy
from memory import peak_bytes
from offramp.config_speech_lm import HeadsConfig
from offramp.data.batching import IGNORE
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.heads import Heads, build_heads
from offramp.train.multi_token import (
    head_targets,
    multi_token_backward,
    multi_token_loss,
)

L, V, EOS = 5, 61, 60
WEIGHTS = (1.0, 0.3, 0.2, 0.7)
SCALE = 0.37
HEADS: dict[str, dict[str, Any]] = {
    "latent": {},
    "independent": {"kind": "independent"},
    "latent, few tokens": {"draft_vocab": 40},
    "independent, few tokens": {"kind": "independent", "draft_vocab": 40},
}
# Two rows of text behind a prompt, the second shorter; what stands behind EOS is padding.
X = IGNORE
TARGETS = torch.tensor([[X, X, 7, 8, 9, 10, 11, EOS], [X, 20, 50, EOS, X, X, X, X]])


def decoder(**changes: Any) -> DecoderLM:
    return toy.decoder(**changes).double().requires_grad_(True)


def heads_for(model: DecoderLM, **changes: Any) -> Heads:
    heads = build_heads(HeadsConfig(**changes), model.config)
    toy.randomize(heads, 3)
    return heads.to(model.dtype)


def trunk(model: DecoderLM) -> Tensor:
    """Hidden states [2, 8, D], with gradients to the layers and the embedding."""
    h = model.embed(toy.tokens(2, 8))
    for i in range(L):
        h = model.layer(i, h, model.view(8))
    return h


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """All gradients by name, and none left behind."""
    named = [(f"{i} {n}", p) for i, m in enumerate(modules) for n, p in m.named_parameters()]
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    for module in modules:
        module.zero_grad()
    return found


# -- targets -----------------------------------------------------------------------------------


def test_targets_shift_and_end_with_the_text() -> None:
    assert torch.equal(head_targets(TARGETS, 0), TARGETS)
    assert head_targets(TARGETS, 1).tolist() == [
        [X, X, 8, 9, 10, 11, EOS, X],
        [X, 50, EOS, X, X, X, X, X],
    ]
    assert head_targets(TARGETS, 3).tolist() == [
        [X, X, 10, 11, EOS, X, X, X],
        [X, X, X, X, X, X, X, X],
    ]
    assert (head_targets(TARGETS, 8) == X).all() and (head_targets(TARGETS, 9) == X).all()


def test_all_heads_learn_where_the_text_begins_and_none_before_it() -> None:
    for future in range(4):
        mine = head_targets(TARGETS, future)
        assert mine[0, 2] != X and (mine[0, :2] == X).all()


# -- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 0.0, 1.0, 0.0)], ids=["all", "some"])
def test_gradients_of_everything_equal_the_joint_loss(
    changes: dict[str, Any], tied: bool, weights: tuple[float, ...]
) -> None:
    model = decoder(tied_embeddings=tied)
    heads = heads_for(model, **changes)
    (SCALE * multi_token_loss(model, heads, trunk(model), TARGETS, weights)).backward()
    expected = gradients(model, heads)
    assert len(expected) == sum(len(list(m.parameters())) for m in (model, heads))
    hidden = trunk(model)
    _, gradient = multi_token_backward(model, heads, hidden, TARGETS, weights, SCALE)
    hidden.backward(gradient)
    torch.testing.assert_close(gradients(model, heads), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_the_joint_loss_is_the_sum_of_each_heads_cross_entropy_at_each_place(
    changes: dict[str, Any],
) -> None:
    """Position by position, from the words of the definition."""
    model = decoder()
    heads = heads_for(model, **changes)
    with torch.no_grad():
        hidden = trunk(model)
        found = multi_token_loss(model, heads, hidden, TARGETS, WEIGHTS)
        expected = 0.0
        for row, (first, last) in enumerate([(2, 7), (1, 3)]):
            for t in range(first, last + 1):
                h = hidden[row, t]
                every = [model.logits(h[None, None], L)[0, 0], *heads.logits(h, model)]
                for k, logits in enumerate(every):
                    target = int(TARGETS[row, t + k]) if t + k <= last else X
                    if target != X and target < len(logits):
                        expected -= WEIGHTS[k] * float(logits.log_softmax(-1)[target])
    assert float(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_sums_are_each_heads_own_without_weight_or_scale(changes: dict[str, Any]) -> None:
    model = decoder()
    heads, hidden = heads_for(model, **changes), trunk(model).detach()
    sums, _ = multi_token_backward(model, heads, hidden, TARGETS, WEIGHTS, SCALE)
    assert [s.targets for s in sums] == [9, 7, 5, 3]
    for k, some in enumerate(sums):
        alone = [float(j == k) for j in range(4)]
        nats = multi_token_loss(model, heads, hidden, TARGETS, alone).detach()
        assert some.nats == pytest.approx(float(nats), rel=1e-10)
        logits = model.logits(hidden, L) if k == 0 else heads.logits(hidden, model)[:, :, k - 1]
        assert some.hits == int((logits.argmax(-1) == head_targets(TARGETS, k)).sum())


def test_hits_are_counted() -> None:
    model = decoder()
    heads, hidden = heads_for(model), trunk(model).detach()
    said = model.logits(hidden, L).argmax(-1).masked_fill(TARGETS == X, X)
    sums, _ = multi_token_backward(model, heads, hidden, said, WEIGHTS, SCALE)
    assert (sums[0].hits, sums[0].targets) == (9, 9)


def test_gradients_are_added_to_those_already_there() -> None:
    model = decoder()
    heads, hidden = heads_for(model), trunk(model).detach().requires_grad_()
    _, once = multi_token_backward(model, heads, hidden, TARGETS, WEIGHTS, 2 * SCALE)
    expected = gradients(model, heads)
    halves = [multi_token_backward(model, heads, hidden, TARGETS, WEIGHTS, SCALE) for _ in "12"]
    torch.testing.assert_close(gradients(model, heads), expected)
    torch.testing.assert_close(halves[0][1] + halves[1][1], once)
    assert hidden.grad is None, "what becomes of it is the caller's choice"


def test_without_heads_it_is_cross_entropy() -> None:
    model = decoder()
    logits = model.logits(trunk(model), L).flatten(0, 1)
    loss = F.cross_entropy(logits, TARGETS.flatten(), ignore_index=X, reduction="sum")
    loss.backward()
    expected, hidden = gradients(model), trunk(model)
    (sums,), gradient = multi_token_backward(model, None, hidden, TARGETS, (1.0,), 1.0)
    hidden.backward(gradient)
    assert sums.nats == pytest.approx(float(loss.detach()), rel=1e-10)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_heads_learn_over_a_frozen_trunk_as_they_do_over_one_that_learns(
    changes: dict[str, Any],
) -> None:
    model = decoder()
    heads = heads_for(model, **changes)
    hidden = trunk(model)
    multi_token_backward(model, heads, hidden, TARGETS, WEIGHTS, SCALE)
    expected = gradients(heads)
    model.requires_grad_(False)
    model.zero_grad()
    _, none = multi_token_backward(model, heads, hidden.detach(), TARGETS, WEIGHTS, SCALE)
    assert none is None and not gradients(model)
    torch.testing.assert_close(gradients(heads), expected)


def test_a_batch_without_targets_has_no_gradient_and_no_nan() -> None:
    model = decoder()
    heads, hidden = heads_for(model), trunk(model)
    nothing = torch.full_like(TARGETS, X)
    sums, gradient = multi_token_backward(model, heads, hidden, nothing, WEIGHTS, SCALE)
    assert [(s.nats, s.hits, s.targets) for s in sums] == [(0.0, 0, 0)] * 4
    assert gradient is not None and not gradient.any()
    assert not any(g.any() for g in gradients(model, heads).values())


# -- memory ------------------------------------------------------------------------------------

WIDE, N = 4000, 96
BLOCK = N * WIDE * 4  # bytes of one head's logits


def peak(run: Callable[[], object]) -> float:
    """In blocks of logits."""
    return peak_bytes(run) / BLOCK


def step(count: int, joint: bool) -> Callable[[], object]:
    model = toy.decoder(vocab_size=WIDE).requires_grad_(True)
    heads = build_heads(HeadsConfig(count), model.config)
    hidden = torch.randn(2, N // 2, 32, requires_grad=True)
    targets, weights = torch.randint(WIDE, (2, N // 2)), (1.0,) * count
    if joint:
        return lambda: multi_token_loss(model, heads, hidden, targets, weights).backward()
    return lambda: multi_token_backward(model, heads, hidden, targets, weights, 1.0)


def test_peak_memory_does_not_grow_with_the_number_of_heads() -> None:
    two, eight = (peak(step(count, joint=False)) for count in (2, 8))
    head = 2 * WIDE * 32 * 4 / BLOCK  # the un-embedding's gradient, once more while it is added
    assert two <= 4 + head, "one head's logits, their softmax, and gradients of both"
    assert eight - two < 0.3, "weights of six heads more, and no logits"


def test_the_measure_sees_the_logits_of_the_joint_loss() -> None:
    two, eight = (peak(step(count, joint=True)) for count in (2, 8))
    assert eight - two >= 6 * 2, "of each head the logits and their softmax"
