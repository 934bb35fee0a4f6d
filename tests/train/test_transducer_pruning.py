"""Pruned transducer loss: exact with full windows, else the sum over the paths inside them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from offramp.errors import ConfigError, InputError
from offramp.train.transducer_loss import (
    Lattice,
    label_after,
    loss_and_occupancy,
    softmax_arcs,
    transducer_loss,
)
from offramp.train.transducer_pruning import Windows, additive_arcs, choose_windows

B, T, U, V, D, BLANK = 3, 6, 4, 7, 5, 2
FRAMES, NUM_LABELS = torch.tensor([6, 4, 5]), torch.tensor([4, 2, 0])


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()


def targets() -> Tensor:
    return torch.randint(3, V, (B, U), generator=torch.Generator().manual_seed(7))


# -- the additive joiner -----------------------------------------------------------------------


def test_additive_arcs_are_those_of_the_sum_of_logits() -> None:
    enc, pred, labels = random(B, T, V), random(B, U + 1, V, seed=1), label_after(targets())
    cheap = additive_arcs(enc, pred, labels, BLANK)
    full = softmax_arcs(enc[:, :, None] + pred[:, None], labels[:, None], BLANK)
    assert torch.allclose(cheap.blank, full.blank, rtol=0, atol=1e-12)
    assert torch.allclose(cheap.label, full.label, rtol=0, atol=1e-12)
    grads = [
        torch.autograd.grad(transducer_loss(arcs, FRAMES, NUM_LABELS).sum(), (enc, pred))
        for arcs in (cheap, full)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_logits_that_disagree_by_hundreds_of_nats_leave_no_nan() -> None:
    enc, pred = (torch.zeros(1, n, V).requires_grad_() for n in (2, 2))
    with torch.no_grad():
        enc[..., 3], pred[..., 4] = 300.0, 500.0
    labels = label_after(torch.tensor([[3]]))
    cheap = additive_arcs(enc, pred, labels, BLANK)
    full = softmax_arcs(enc[:, :, None] + pred[:, None], labels[:, None], BLANK)
    assert torch.allclose(cheap.blank, full.blank)
    assert torch.allclose(cheap.label, full.label)
    loss = transducer_loss(cheap, torch.tensor([2]), torch.tensor([1]))
    for gradient in torch.autograd.grad(loss, (enc, pred)):
        assert gradient.isfinite().all()


def test_half_precision_is_read_as_float32() -> None:
    enc, pred = (random(B, n, V, seed=n).detach().bfloat16() for n in (T, U + 1))
    labels = label_after(targets())
    rough, exact = (
        additive_arcs(*logits, labels, BLANK)
        for logits in ((enc, pred), (enc.float(), pred.float()))
    )
    assert torch.equal(rough.blank, exact.blank)
    assert torch.equal(rough.label, exact.label)


# -- windows -----------------------------------------------------------------------------------


def possible(starts: tuple[int, ...], S: int, last: int) -> bool:
    steps = [b - a for a, b in itertools.pairwise(starts)]
    return starts[0] == 0 and starts[-1] == last and all(0 <= step < S for step in steps)


@pytest.mark.parametrize("S", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_windows_hold_the_most_occupancy_that_any_can(seed: int, S: int) -> None:
    occupancy = random(B, T, U + 1, seed=seed).detach().exp()
    windows = choose_windows(occupancy, FRAMES, NUM_LABELS, S)
    for row, (frames, num_labels) in enumerate(
        zip(FRAMES.tolist(), NUM_LABELS.tolist(), strict=True)
    ):
        last = max(0, num_labels + 1 - S)
        held = occupancy[row].unfold(1, S, 1).sum(-1)
        tried = {
            starts: float(sum(held[t, s] for t, s in enumerate(starts)))
            for starts in itertools.product(range(last + 1), repeat=frames)
            if possible(starts, S, last)
        }
        found = tuple(windows.starts[row].tolist())
        assert tried[found[:frames]] == pytest.approx(max(tried.values()))
        assert set(found[frames:]) <= {last}


def test_the_smallest_windows_that_reach_the_end_are_taken() -> None:
    """10 labels in 5 frames: 3 nodes a frame, each window starting where the last one ended."""
    occupancy = torch.rand(1, 5, 11, generator=torch.Generator().manual_seed(0))
    windows = choose_windows(occupancy, torch.tensor([5]), torch.tensor([10]), 3)
    assert windows.starts.tolist() == [[0, 2, 4, 6, 8]]
    message = r"windows of 2 nodes cannot pass 10 labels in the 5 frames of row 0; .* at least 3"
    with pytest.raises(InputError, match=message):
        choose_windows(occupancy, torch.tensor([5]), torch.tensor([10]), 2)
    with pytest.raises(ConfigError, match="size is 0"):
        choose_windows(occupancy, torch.tensor([5]), torch.tensor([10]), 0)


def test_windows_read_and_write_the_nodes_they_name() -> None:
    windows = Windows(torch.tensor([[0, 1, 3]]), 2, 5)
    assert windows.of(torch.arange(10, 15)[None]).tolist() == [[[10, 11], [11, 12], [13, 14]]]
    x = random(1, 5, D)
    assert torch.equal(windows.of(x)[0, 2], x[0, 3:])
    wide = windows.widen(Lattice(torch.ones(1, 3, 2), 2 * torch.ones(1, 3, 2)))
    assert (wide.blank > 0).int().tolist() == [[[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]]
    assert wide.label[0, 1].tolist() == [-torch.inf, 2.0, 2.0, -torch.inf, -torch.inf]


# -- the pruned loss ---------------------------------------------------------------------------


class Joiner:
    """tanh(enc + pred) @ weight."""

    def __init__(self) -> None:
        self.weight = random(D, V, seed=5)

    def logits(self, enc: Tensor, pred: Tensor) -> Tensor:
        return (enc + pred).tanh() @ self.weight


def example() -> tuple[Tensor, Tensor, Joiner, Tensor]:
    return random(B, T, D), random(B, U + 1, D, seed=1, scale=2.0), Joiner(), label_after(targets())


def full_arcs(enc: Tensor, pred: Tensor, joiner: Joiner, labels: Tensor) -> Lattice:
    return softmax_arcs(joiner.logits(enc[:, :, None], pred[:, None]), labels[:, None], BLANK)


def pruned_loss(
    enc: Tensor, pred: Tensor, joiner: Joiner, labels: Tensor, size: int
) -> tuple[Tensor, Windows]:
    """As the head of transducer_pruning.py shows; the simple joiner here is of fixed matrices."""
    simple = additive_arcs(enc @ random(D, V, seed=8), pred @ random(D, V, seed=9), labels, BLANK)
    _, occupancy = loss_and_occupancy(simple, FRAMES, NUM_LABELS)
    windows = choose_windows(occupancy, FRAMES, NUM_LABELS, size)
    logits = joiner.logits(enc[:, :, None], windows.of(pred))
    assert logits.shape == (B, T, min(size, U + 1), V)
    arcs = windows.widen(softmax_arcs(logits, windows.of(labels), BLANK))
    return transducer_loss(arcs, FRAMES, NUM_LABELS), windows


@pytest.mark.parametrize("size", [U + 1, U + 9])
def test_windows_over_all_nodes_prune_nothing(size: int) -> None:
    enc, pred, joiner, labels = example()
    pruned, _ = pruned_loss(enc, pred, joiner, labels, size)
    full = transducer_loss(full_arcs(enc, pred, joiner, labels), FRAMES, NUM_LABELS)
    assert torch.allclose(pruned, full, rtol=0, atol=1e-12)
    weights = (enc, pred, joiner.weight)
    for a, b in zip(*(torch.autograd.grad(x.sum(), weights) for x in (pruned, full)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_the_pruned_loss_is_the_sum_over_the_paths_in_the_windows(size: int) -> None:
    enc, pred, joiner, labels = example()
    pruned, windows = pruned_loss(enc, pred, joiner, labels, size)
    full = full_arcs(enc, pred, joiner, labels)
    u = torch.arange(U + 1)
    starts = windows.starts[..., None]
    kept = (u >= starts) & (u < starts + size)
    only = Lattice(*(x.masked_fill(~kept, -torch.inf) for x in (full.blank, full.label)))
    want = transducer_loss(only, FRAMES, NUM_LABELS)
    assert torch.allclose(pruned, want, rtol=0, atol=1e-12)
    assert pruned.isfinite().all(), "some path is left"
    above = (pruned - transducer_loss(full, FRAMES, NUM_LABELS)).tolist()
    assert above[0] > 1e-3, "and some are lost"
    assert min(above) > -1e-12


def test_the_pruned_loss_passes_gradcheck() -> None:
    _, _, joiner, labels = example()
    windows = Windows(torch.tensor([[0, 1, 2, 3]]), 2, U + 1)

    def loss(enc: Tensor, pred: Tensor) -> Tensor:
        logits = joiner.logits(enc[:, :, None], windows.of(pred))
        arcs = windows.widen(softmax_arcs(logits, windows.of(labels[:1]), BLANK))
        return transducer_loss(arcs, torch.tensor([4]), torch.tensor([U]))

    assert torch.autograd.gradcheck(loss, (random(1, 4, D), random(1, U + 1, D, seed=1)))
