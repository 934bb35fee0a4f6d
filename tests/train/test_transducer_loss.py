"""The transducer loss against the sum over all alignments, and its gradient against differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import ConfigError, InputError
from offramp.train.transducer_loss import (
    Lattice,
    label_after,
    loss_and_occupancy,
    softmax_arcs,
    transducer_loss,
)


def random_lattice(B: int, T: int, U: int, seed: int = 0) -> Lattice:
    """Log-probabilities in float64, as of two tokens among several."""
    g = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(B, T, U + 1, 3, generator=g, dtype=torch.float64)
    blank, label, _ = logits.log_softmax(-1).unbind(-1)
    return Lattice(blank.clone().requires_grad_(), label.clone().requires_grad_())


def counts(*rows: int) -> Tensor:
    return torch.tensor(rows)


def alignments(T: int, U: int) -> list[list[str]]:
    """Every order of U labels and T blanks that ends in a blank."""
    moves = T - 1 + U
    return [
        ["label" if i in labels else "blank" for i in range(moves)] + ["blank"]
        for labels in itertools.combinations(range(moves), U)
    ]


def by_enumeration(lattice: Lattice, row: int, T: int, U: int) -> float:
    arcs, total = {"blank": lattice.blank.detach(), "label": lattice.label.detach()}, 0.0
    for moves in alignments(T, U):
        t = u = 0
        log_p = 0.0
        for move in moves:
            log_p += float(arcs[move][row, t, u])
            t, u = (t + 1, u) if move == "blank" else (t, u + 1)
        total += math.exp(log_p)
    return -math.log(total)


def by_cells(lattice: Lattice, row: int, T: int, U: int) -> Tensor:
    """The recursion as it is written in papers, one node at a time, for autograd."""
    alpha: dict[tuple[int, int], Tensor] = {}
    for t, u in itertools.product(range(T), range(U + 1)):
        ways = []
        if t:
            ways.append(alpha[t - 1, u] + lattice.blank[row, t - 1, u])
        if u:
            ways.append(alpha[t, u - 1] + lattice.label[row, t, u - 1])
        zero = torch.zeros((), dtype=torch.float64)
        alpha[t, u] = torch.stack(ways).logsumexp(0) if ways else zero
    return -(alpha[T - 1, U] + lattice.blank[row, T - 1, U])


def gradients(loss: Tensor, lattice: Lattice) -> list[Tensor]:
    return list(torch.autograd.grad(loss, (lattice.blank, lattice.label), allow_unused=True))


# -- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "U"), [(1, 0), (1, 3), (4, 0), (2, 1), (3, 3), (5, 2), (2, 6)])
def test_the_loss_is_the_sum_over_all_alignments(T: int, U: int) -> None:
    lattice = random_lattice(2, T, U, seed=10 * T + U)
    loss = transducer_loss(lattice, counts(T, T), counts(U, U))
    want = [by_enumeration(lattice, row, T, U) for row in range(2)]
    assert loss.tolist() == pytest.approx(want, abs=1e-12)


def test_rows_of_any_length_cost_what_they_cost_alone() -> None:
    lattice = random_lattice(6, 7, 5)
    frames, num_labels = counts(7, 3, 1, 7, 1, 4), counts(5, 5, 2, 0, 0, 3)
    loss = transducer_loss(lattice, frames, num_labels)
    sizes = list(zip(frames.tolist(), num_labels.tolist(), strict=True))
    want = torch.stack([by_cells(lattice, row, T, U) for row, (T, U) in enumerate(sizes)])
    assert torch.allclose(loss, want, rtol=0, atol=1e-12)
    weights = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    for ours, theirs in zip(
        gradients(weights @ loss, lattice), gradients(weights @ want, lattice), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_lies_beyond_a_row_has_no_effect(garbage: float) -> None:
    clean = random_lattice(2, 5, 4)
    frames, num_labels = counts(5, 3), counts(4, 2)
    blank, label = clean.blank.detach().clone(), clean.label.detach().clone()
    for x in (blank, label):
        x[1, 3:], x[1, :, 3:] = garbage, garbage
    label[0, :, 4], label[1, :, 2] = garbage, garbage  # the last node writes no label
    dirty = Lattice(blank.requires_grad_(), label.requires_grad_())
    losses = [transducer_loss(x, frames, num_labels) for x in (clean, dirty)]
    assert torch.equal(*losses)
    for a, b in zip(
        *(gradients(loss.sum(), x) for loss, x in zip(losses, (clean, dirty), strict=True)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_gradient_passes_gradcheck() -> None:
    lattice = random_lattice(2, 3, 1)
    frames, num_labels = counts(2, 3), counts(1, 0)

    def loss(blank: Tensor, label: Tensor) -> Tensor:
        return transducer_loss(Lattice(blank, label), frames, num_labels)

    assert torch.autograd.gradcheck(loss, (lattice.blank, lattice.label))


def test_text_that_cannot_be_written_costs_infinity_and_has_no_gradient() -> None:
    lattice = random_lattice(2, 4, 3)
    label = lattice.label.detach().clone()
    label[0, :, 1] = -math.inf
    label[1, :3, 1] = -math.inf  # only in the last frame
    lattice = Lattice(lattice.blank, label.requires_grad_())
    loss = transducer_loss(lattice, counts(4, 4), counts(3, 3))
    assert loss.tolist() == [math.inf, pytest.approx(by_enumeration(lattice, 1, 4, 3))]
    by_blank, by_label = gradients(loss.sum(), lattice)
    assert by_blank[0].count_nonzero() == by_label[0].count_nonzero() == 0
    assert by_blank.isfinite().all() and by_label.isfinite().all()
    assert by_blank[1].count_nonzero() > 0


def test_float32_keeps_its_digits_on_a_long_lattice() -> None:
    """Thousands of nats: summed in float32 they would cost the gradient its fourth digit."""
    exact = random_lattice(1, 300, 80)
    rough = Lattice(*(8.0 * x.detach().float() for x in (exact.blank, exact.label)))
    exact = Lattice(rough.blank.double(), rough.label.double())
    for x in (rough, exact):
        x.blank.requires_grad_(), x.label.requires_grad_()
    losses = [transducer_loss(x, counts(300), counts(80)) for x in (rough, exact)]
    assert losses[0].dtype == torch.float32
    assert float(losses[1].detach()) > 1000
    assert torch.allclose(losses[0].double(), losses[1], rtol=1e-7)
    for a, b in zip(*map(gradients, losses, (rough, exact)), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-7)


def test_fastemit_counts_the_gradient_of_labels_more_and_nothing_else() -> None:
    lattice, size = random_lattice(2, 5, 3), (counts(5, 4), counts(3, 2))
    plain = transducer_loss(lattice, *size)
    early = transducer_loss(lattice, *size, fastemit=0.25)
    assert torch.equal(plain, early)
    (blank, label), (fast_blank, fast_label) = (
        gradients(loss.sum(), lattice) for loss in (plain, early)
    )
    assert torch.equal(fast_blank, blank)
    assert torch.allclose(fast_label, 1.25 * label, rtol=1e-14)


def test_occupancy_is_the_share_of_paths_through_each_node() -> None:
    lattice, T, U = random_lattice(1, 4, 3), 4, 3
    loss, occupancy = loss_and_occupancy(lattice, counts(T), counts(U))
    arcs = {"blank": lattice.blank.detach(), "label": lattice.label.detach()}
    want = torch.zeros(T, U + 1, dtype=torch.float64)
    for moves in alignments(T, U):
        t = u = 0
        passed, log_p = [], 0.0
        for move in moves:
            passed.append((t, u))
            log_p += float(arcs[move][0, t, u])
            t, u = (t + 1, u) if move == "blank" else (t, u + 1)
        for node in passed:
            want[node] += math.exp(log_p + float(loss.detach()))
    assert torch.allclose(occupancy[0], want, rtol=0, atol=1e-12)
    assert not occupancy.requires_grad


@pytest.mark.parametrize(
    ("frames", "num_labels", "match"),
    [
        ((4, 0), (3, 3), r"frames is \[4, 0\] .* each of the 2 rows needs 1 to 4"),
        ((4, 5), (3, 3), r"frames is \[4, 5\]"),
        ((4, 4), (4, 3), r"num_labels is \[4, 3\] .* needs 0 to 3"),
        ((4, 4), (3, -1), r"num_labels is \[3, -1\]"),
        ((4,), (3, 3), r"frames is \[4\] for a lattice of shape \[2, 4, 4\]"),
    ],
)
def test_impossible_lengths_are_refused(
    frames: tuple[int, ...], num_labels: tuple[int, ...], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        transducer_loss(random_lattice(2, 4, 3), counts(*frames), counts(*num_labels))


def test_arcs_of_two_shapes_and_negative_fastemit_are_refused() -> None:
    lattice = random_lattice(2, 4, 3)
    with pytest.raises(InputError, match=r"label \[2, 4, 3\]; both must be"):
        transducer_loss(Lattice(lattice.blank, lattice.label[..., :3]), counts(4, 4), counts(3, 3))
    with pytest.raises(ConfigError, match=r"fastemit is -0\.1"):
        transducer_loss(lattice, counts(4, 4), counts(3, 3), fastemit=-0.1)


# -- arcs --------------------------------------------------------------------------------------

B, T, U, V, BLANK = 2, 3, 2, 5, 1
TARGETS = torch.tensor([[3, 0], [4, 4]])


def random_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return (2.0 * torch.randn(B, T, U + 1, V, generator=g)).to(dtype).requires_grad_()


def labels() -> Tensor:
    return label_after(TARGETS)[:, None]


def test_softmax_arcs_are_two_tokens_of_the_softmax() -> None:
    logits = random_logits()
    arcs = softmax_arcs(logits, labels(), BLANK)
    log_probs = logits.log_softmax(-1)
    assert torch.equal(arcs.blank, log_probs[..., BLANK])
    for b, u in itertools.product(range(B), range(U)):
        assert torch.equal(arcs.label[b, :, u], log_probs[b, :, u, TARGETS[b, u]])


def test_softmax_arcs_pass_gradcheck() -> None:
    def arcs(logits: Tensor) -> tuple[Tensor, Tensor]:
        found = softmax_arcs(logits, labels(), BLANK)
        return found.blank, found.label

    assert torch.autograd.gradcheck(arcs, (random_logits(),))


def test_arcs_of_half_precision_are_computed_in_float32() -> None:
    logits = random_logits(torch.bfloat16)
    arcs = softmax_arcs(logits, labels(), BLANK)
    assert arcs.blank.dtype == arcs.label.dtype == torch.float32
    assert torch.equal(arcs.blank, logits.float().log_softmax(-1)[..., BLANK])
    transducer_loss(arcs, counts(T, T), counts(U, U)).sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def factorised(own: Tensor, others: Tensor) -> Tensor:
    """Log-probabilities [..., V] of HAT: own [...] scores the blank, others [..., V - 1] labels."""
    labels = F.logsigmoid(-own)[..., None] + others.log_softmax(-1)
    blank = F.logsigmoid(own)[..., None]
    return torch.cat((labels[..., :BLANK], blank, labels[..., BLANK:]), dim=-1)


def test_a_factorised_blank_comes_through_the_softmax_unchanged() -> None:
    own, others = random_logits()[..., 0], random_logits()[..., 1:]
    log_probs = factorised(own, others)
    arcs = softmax_arcs(log_probs, labels(), BLANK)
    assert torch.allclose(arcs.blank, F.logsigmoid(own), rtol=0, atol=1e-12)
    want = log_probs.gather(-1, labels().expand(B, T, U + 1)[..., None])[..., 0]
    assert torch.allclose(arcs.label, want, rtol=0, atol=1e-12)
    grads = [
        torch.autograd.grad(
            transducer_loss(a, counts(T, 2), counts(U, 1)).sum(), (own, others), retain_graph=True
        )
        for a in (arcs, Lattice(log_probs[..., BLANK], want))
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_sure_blank_leaves_no_nan() -> None:
    own = torch.tensor([-300.0, 300.0]).view(2, 1, 1).expand(B, T, U + 1).clone().requires_grad_()
    others = torch.zeros(B, T, U + 1, V - 1, requires_grad=True)
    arcs = softmax_arcs(factorised(own, others), labels(), BLANK)
    loss = transducer_loss(arcs, counts(T, T), counts(U, U))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert own.grad is not None and own.grad.isfinite().all()
    assert others.grad is not None and others.grad.isfinite().all()


def test_learning_writes_the_text() -> None:
    """Plain gradient descent on one utterance: the loss goes to nearly nothing."""
    logits = torch.zeros(1, 6, 4, V, requires_grad=True)
    targets = torch.tensor([[2, 3, 2]])
    for _ in range(60):
        arcs = softmax_arcs(logits, label_after(targets)[:, None], 0)
        loss = transducer_loss(arcs, counts(6), counts(3))
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 3.0 * gradient).detach().requires_grad_()
    assert float(loss.detach()) < 0.1
