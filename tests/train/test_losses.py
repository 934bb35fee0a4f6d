"""The chunked early-exit loss has the gradients of the obvious one, in a fraction of its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy
from memory import peak_bytes
from offramp.data.batching import IGNORE
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.layers import RMSNorm
from offramp.train.layerskip import forward_exits
from offramp.train.losses import ExitHead, early_exit_backward, early_exit_loss
from thinned import thinned

L, B, T, SCALE = 5, 3, 7, 0.37
WEIGHTS: dict[str, dict[int, float]] = {
    "all": {0: 0.05, 1: 0.1, 2: 0.15, 3: 0.2, 4: 0.5},
    "some": {1: 0.25, 4: 0.75},
    "last": {4: 1.0},
}


def head_of(model: DecoderLM) -> ExitHead:
    head = model.embedding if model.unembedding is None else model.unembedding
    return ExitHead(model.norm, head.weight)


def example(**changes: object) -> tuple[DecoderLM, Tensor, Tensor]:
    """(model, ids [B, T], targets [B * T], a third of them ignored)."""
    model = toy.decoder(**changes).requires_grad_(True)
    targets = toy.tokens(B, T, seed=1).flatten()
    targets[::3] = IGNORE
    return model, toy.tokens(B, T), targets


def hidden_of(model: DecoderLM, ids: Tensor, exits: set[int]) -> dict[int, Tensor]:
    survivors = torch.ones(L, B, dtype=torch.bool)
    survivors[3, 1] = False
    hidden = forward_exits(model, ids, exits, survivors, None)
    return {i: h.flatten(0, 1) for i, h in hidden.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", thinned([1, 4, 14, 2048], keep=(4, 2048)))
@pytest.mark.parametrize("distill", thinned([0.0, 0.3, 1.0], keep=(0.0, 0.3)))
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_gradients_of_everything_equal_the_joint_loss(
    tied: bool, weights: dict[int, float], distill: float, chunk: int
) -> None:
    model, ids, targets = example(tied_embeddings=tied)
    (
        SCALE
        * early_exit_loss(
            head_of(model), hidden_of(model, ids, set(weights)), targets, weights, distill
        )
    ).backward()
    expected = gradients(model)
    assert len(expected) == len(list(model.parameters()))
    model.zero_grad()
    hidden = hidden_of(model, ids, set(weights))
    early_exit_backward(head_of(model), hidden, targets, weights, SCALE, distill, chunk)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_added_to_those_already_there() -> None:
    model, ids, targets = example(tied_embeddings=True)
    for _ in range(2):
        hidden = hidden_of(model, ids, {1, 4})
        early_exit_backward(head_of(model), hidden, targets, WEIGHTS["some"], SCALE, 0.2, chunk=5)
    twice = gradients(model)
    model.zero_grad()
    hidden = hidden_of(model, ids, {1, 4})
    early_exit_backward(head_of(model), hidden, targets, WEIGHTS["some"], 2 * SCALE, 0.2, chunk=5)
    torch.testing.assert_close(twice, gradients(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distill", [0.0, 0.5])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_sums_are_each_exits_cross_entropy_without_weight_scale_or_teacher(
    chunk: int, distill: float
) -> None:
    model, ids, targets = example()
    hidden, weights = hidden_of(model, ids, set(range(L))), WEIGHTS["all"]
    sums = early_exit_backward(head_of(model), hidden, targets, weights, SCALE, distill, chunk)
    with torch.no_grad():
        expected = {
            i: float(F.cross_entropy(model.logits(h, i + 1), targets, reduction="sum"))
            for i, h in hidden.items()
        }
    assert sums == pytest.approx(expected, rel=1e-5)


def test_the_joint_loss_is_weighted_cross_entropy() -> None:
    model, ids, targets = example()
    hidden, weights = hidden_of(model, ids, {1, 4}), WEIGHTS["some"]
    expected = sum(
        w * F.cross_entropy(model.logits(hidden[i], i + 1), targets, reduction="sum")
        for i, w in weights.items()
    )
    torch.testing.assert_close(early_exit_loss(head_of(model), hidden, targets, weights), expected)


def test_the_teacher_is_the_last_exit_and_learns_nothing_from_its_pupils() -> None:
    """With distill 1 an exit equal to the last has no gradient, and the last only its own."""
    head = ExitHead(RMSNorm(8, 1e-5), nn.Parameter(torch.randn(11, 8)))
    last = torch.randn(6, 8)
    hidden = {0: last.clone().requires_grad_(), 1: last.clone().requires_grad_()}
    targets = torch.arange(6)
    early_exit_backward(head, hidden, targets, {0: 0.5, 1: 0.5}, 1.0, distill=1.0)
    assert hidden[0].grad is not None
    assert float(hidden[0].grad.abs().max()) < 1e-6
    alone = last.clone().requires_grad_()
    early_exit_backward(head, {1: alone}, targets, {1: 0.5}, 1.0)
    torch.testing.assert_close(hidden[1].grad, alone.grad)


def test_a_batch_without_targets_has_no_gradient_and_no_nan() -> None:
    model, ids, targets = example()
    hidden = hidden_of(model, ids, {1, 4})
    sums = early_exit_backward(
        head_of(model), hidden, torch.full_like(targets, IGNORE), WEIGHTS["some"], SCALE
    )
    assert sums == {1: 0.0, 4: 0.0}
    assert not any(grad.any() for grad in gradients(model).values())


def test_large_logits_do_not_overflow() -> None:
    head = ExitHead(nn.Identity(), nn.Parameter(torch.eye(3) * 1e4))
    h = torch.eye(3, requires_grad=True)
    sums = early_exit_backward(head, {0: h}, torch.tensor([0, 1, 0]), {0: 1.0}, 1.0)
    assert sums[0] == pytest.approx(1e4)
    assert torch.equal(head.weight.grad, torch.tensor([[0.0, 0, -1], [0, 0, 0], [0, 0, 1]]))


# -- memory ------------------------------------------------------------------------------------

V, D, N, CHUNK = 4000, 8, 96, 32
BLOCK = CHUNK * V * 4  # bytes of one chunk of logits


def peak(run: Callable[[], object]) -> float:
    """In blocks of logits."""
    return peak_bytes(run) / BLOCK


def loss_of(num_exits: int, distill: float, chunked: bool) -> Callable[[], object]:
    head = ExitHead(RMSNorm(D, 1e-5), nn.Parameter(torch.randn(V, D)))
    hidden = {i: torch.randn(N, D, requires_grad=True) for i in range(num_exits)}
    targets, weights = torch.randint(V, (N,)), dict.fromkeys(hidden, 1 / num_exits)
    if chunked:
        return lambda: early_exit_backward(head, hidden, targets, weights, 1.0, distill, CHUNK)
    return lambda: early_exit_loss(head, hidden, targets, weights, distill).backward()


@pytest.mark.parametrize(("distill", "blocks"), [(0.0, 1), (0.3, 2)])
def test_peak_memory_does_not_grow_with_the_number_of_exits(distill: float, blocks: int) -> None:
    """One block of logits, two with a teacher; beside it two of the head's size [V, D]."""
    two, nine = (peak(loss_of(n, distill, chunked=True)) for n in (2, 9))
    head = 2 * V * D * 4 / BLOCK
    assert blocks <= two <= nine <= blocks + head + 0.3
    assert nine - two < 0.3, "hidden states [N, D] of seven exits more, and no logits"


def test_the_measure_sees_the_logits_of_the_joint_loss() -> None:
    two, five = (peak(loss_of(n, 0.0, chunked=False)) for n in (2, 5))
    assert five - two >= 3 * N / CHUNK
