"""The transducer loss (RNN-T, Graves, arXiv 1211.3711) of padded batches: exact, in plain PyTorch.

A path through the lattice of T frames by U + 1 nodes takes two kinds of arcs: blank reads the
next frame, a label writes the next token. The sum over paths into a node and the one out of it
follow the same recursion, one of them on the lattice turned by 180 degrees, so a single scan over
the anti-diagonals finds both, and the gradient is each arc's occupancy, in closed form: autograd
never sees the T + U steps. How arcs get their log-probabilities is apart from this: from logits
of the whole lattice here, from those of a part of it in transducer_pruning.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.config import check_range
from offramp.errors import InputError


@dataclass(frozen=True)
class Lattice:
    """Natural log-probabilities of the arcs that leave node (t, u): frame t, u labels written.

    blank: [B, T, U + 1], of reading frame t + 1. label: [B, T, U + 1], of writing label u + 1;
    that of the last node has no effect. -inf forbids an arc.
    """

    blank: Tensor
    label: Tensor


def label_after(targets: Tensor) -> Tensor:
    """The label that each node of a lattice may write next, [B, U + 1], of targets [B, U].

    The last node writes none; it gets token 0, which has no effect.
    """
    return F.pad(targets, (0, 1))


def softmax_arcs(logits: Tensor, labels: Tensor, blank_id: int) -> Lattice:
    """Arcs from what a joiner says at each node.

    logits: [B, T, S, V], by far the largest tensor here; one of that size is kept for its
    gradient. Log-probabilities, as a joiner with a factorised blank gives them, are logits too:
    a softmax leaves them as they are. labels: int64, what each node may write, [B, T, S] or what
    expands to it.
    """
    labels = labels.expand(logits.shape[:-1])
    return Lattice(*_Softmax.apply(logits, labels, blank_id))  # type: ignore[no-untyped-call]


class _Softmax(torch.autograd.Function):
    """log_softmax at two tokens per node; autograd's own way fills three tensors of V per node."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits.log_softmax(-1, dtype=wide)
        ctx.save_for_backward(log_probs, labels)
        ctx.blank_id, ctx.dtype = blank_id, logits.dtype
        return log_probs[..., blank_id].clone(), log_probs.gather(-1, labels[..., None])[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_blank: Tensor, d_label: Tensor) -> tuple[Tensor, None, None]:
        log_probs, labels = ctx.saved_tensors
        gradient = log_probs.exp().mul_(-(d_blank + d_label)[..., None])
        gradient[..., ctx.blank_id] += d_blank
        gradient.scatter_add_(-1, labels[..., None], d_label[..., None])
        return gradient.to(ctx.dtype), None, None


def transducer_loss(
    lattice: Lattice, frames: Tensor, num_labels: Tensor, fastemit: float = 0.0
) -> Tensor:
    """-log p(labels), in nats, [B]; infinite, with no gradient, where no path is possible.

    frames, num_labels: int64 [B], each row's own T (at least 1) and U (0 included); what lies
    beyond them has no effect. fastemit: lambda of arXiv 2010.11148; the gradient of label arcs
    counts 1 + lambda times, which draws emissions forward; the value of the loss is untouched.
    """
    check_range(0, fastemit=fastemit)
    return _paths(lattice, frames, num_labels, fastemit)[0]


def loss_and_occupancy(
    lattice: Lattice, frames: Tensor, num_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """(`transducer_loss`; the probability that the path passes each node, [B, T, U + 1], which
    has no gradient)."""
    nll, by_blank, by_label = _paths(lattice, frames, num_labels, 0.0)
    return nll, by_blank + by_label


def _paths(
    lattice: Lattice, frames: Tensor, num_labels: Tensor, fastemit: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(lattice, frames, num_labels)
    arguments = (lattice.blank, lattice.label, frames, num_labels, fastemit)
    found: tuple[Tensor, Tensor, Tensor] = _Paths.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _Paths(torch.autograd.Function):
    """(-log p, occupancy of blank arcs, of label arcs); only the first has a gradient.

    In float64: the lattice is small beside the logits, and sums of hundreds of terms of many
    nats would cost float32 the digits that the occupancies need.
    """

    @staticmethod
    def forward(
        ctx: Any, blank: Tensor, label: Tensor, frames: Tensor, num_labels: Tensor, fastemit: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_p, *occupancies = _forward_backward(
            blank.double(), label.double(), frames[:, None, None], num_labels[:, None, None]
        )
        by_blank, by_label = (x.to(blank.dtype) for x in occupancies)
        ctx.save_for_backward(by_blank, by_label)
        ctx.mark_non_differentiable(by_blank, by_label)
        ctx.fastemit = fastemit
        return -log_p.to(blank.dtype), by_blank, by_label

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_nll: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        by_blank, by_label = ctx.saved_tensors
        scale = -d_nll[:, None, None]
        return scale * by_blank, scale * (1.0 + ctx.fastemit) * by_label, None, None, None


def _forward_backward(blank: Tensor, label: Tensor, T: Tensor, U: Tensor) -> list[Tensor]:
    """[log p [B], occupancy of blank arcs and of label arcs, [B, T, U + 1]]; T, U: [B, 1, 1]."""
    B, max_frames, nodes = blank.shape
    u = torch.arange(nodes, device=blank.device)
    t = torch.arange(max_frames + nodes - 1, device=blank.device)[:, None] - u  # by diagonal
    inside = (t >= 0) & (t < T) & (u <= U)
    # Arcs into node (t, u) on the way there, and into its image on the way back.
    to_blank = _at(blank, t - 1, u, inside & (t > 0))
    to_label = _at(label, t, u - 1, inside & (u > 0))
    back_t, back_u = T - 1 - t, U - u
    from_blank = _at(blank, back_t, back_u, inside & (t > 0))
    from_label = _at(label, back_t, back_u, inside & (u > 0))
    last = blank.flatten(1).gather(1, ((T - 1) * nodes + U)[:, 0])  # [B, 1]
    sums = _scan(
        torch.cat((torch.zeros_like(last), last)),
        torch.cat((to_blank, from_blank)),
        torch.cat((to_label, from_label)),
    )
    # Back from diagonals to frames.
    t = torch.arange(max_frames, device=blank.device)[:, None]
    inside = (t < T) & (u <= U)
    before = _at(sums[:B], t + u, u, inside)
    after = _at(sums[B:], T - 1 - t + U - u, U - u, inside)
    log_p = after[:, 0, 0]
    total = torch.where(log_p > -torch.inf, log_p, 0.0)[:, None, None]
    then = F.pad(after, (0, 1, 0, 1), value=-torch.inf)
    read = then[:, 1:, :-1].masked_fill((t == T - 1) & (u == U), 0.0)
    by_blank = before + blank.masked_fill(~inside, -torch.inf) + read - total
    by_label = (
        before + label.masked_fill(~(inside & (u < U)), -torch.inf) + then[:, :-1, 1:] - total
    )
    return [log_p, by_blank.exp(), by_label.exp()]


def _at(x: Tensor, i: Tensor, j: Tensor, valid: Tensor) -> Tensor:
    """x[b, i, j] where valid, else -inf. x: [B, I, J]; i, j, valid: broadcast to [B, N, U + 1]."""
    flat = torch.where(valid, i * x.shape[2] + j, 0)
    found = x.flatten(1).gather(1, flat.flatten(1)).view(flat.shape)
    return found.masked_fill(~valid, -torch.inf)


def _scan(start: Tensor, by_blank: Tensor, by_label: Tensor) -> Tensor:
    """Log sums over all paths from node (0, 0), which has `start` [R, 1], to every node.

    by_blank, by_label: [R, N, U + 1], log-probability of the arc into the node in column u of
    anti-diagonal n, from column u and from column u - 1 of the one before. Result as they.
    """
    R, N, nodes = by_blank.shape
    sums = start.new_full((N, R, nodes + 1), -torch.inf)  # a column to the left of the first
    sums[0, :, 1:2] = start
    blank_rows, label_rows = (x.transpose(0, 1).contiguous() for x in (by_blank, by_label))
    stay, step = start.new_empty(R, nodes), start.new_empty(R, nodes)
    before = sums[0]
    for n in range(1, N):
        torch.add(before[:, 1:], blank_rows[n], out=stay)
        torch.add(before[:, :-1], label_rows[n], out=step)
        before = sums[n]
        torch.logaddexp(stay, step, out=before[:, 1:])
    return sums[:, :, 1:].transpose(0, 1)


def _check(lattice: Lattice, frames: Tensor, num_labels: Tensor) -> None:
    shape = lattice.blank.shape
    if len(shape) != 3 or shape != lattice.label.shape:
        raise InputError(
            f"blank has shape {list(shape)}, label {list(lattice.label.shape)}; both must be "
            "[batch, frames, labels + 1]"
        )
    B, T, nodes = shape
    for name, counts, least, most in (
        ("frames", frames, 1, T),
        ("num_labels", num_labels, 0, nodes - 1),
    ):
        if counts.shape != (B,) or bool(((counts < least) | (counts > most)).any()):
            raise InputError(
                f"{name} is {counts.tolist()} for a lattice of shape {list(shape)}; each of the "
                f"{B} rows needs {least} to {most}: leave other utterances out of the batch"
            )
