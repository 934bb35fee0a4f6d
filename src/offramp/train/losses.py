"""The early-exit loss: cross-entropy at several exits through one head, one exit at a time.

J = sum over enabled exits of weight * CE(head(norm(h_exit)), target) (LayerSkip, arXiv
2404.16710, section 4.2), optionally with each early exit also learning the last exit's
distribution. The logits of all exits together would take exits x tokens x vocabulary numbers;
`early_exit_backward` holds one chunk of one exit and writes the gradient of softmax
cross-entropy by its closed form. `early_exit_loss` is the obvious version, held equal by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.data.batching import IGNORE


@dataclass(frozen=True)
class ExitHead:
    """What every exit shares: the final norm and the un-embedding matrix [V, D]."""

    norm: nn.Module
    weight: Tensor


def early_exit_loss(
    head: ExitHead,
    hidden: Mapping[int, Tensor],
    targets: Tensor,
    weights: Mapping[int, float],
    distill: float = 0.0,
) -> Tensor:
    """The summed loss over all positions with a target; all logits in memory at once.

    hidden: layer -> [N, D]; targets: [N]. With `distill` > 0 an early exit's target is the mix
    (1 - distill) * one-hot + distill * softmax of the last exit, which gets no gradient from it.
    """
    kept = targets != IGNORE
    last = max(hidden)
    logits = {i: F.linear(head.norm(h[kept]), head.weight).float() for i, h in hidden.items()}
    teacher = logits[last].detach().softmax(-1)
    labels = F.one_hot(targets[kept], teacher.shape[-1]).to(teacher)
    total = teacher.new_zeros(())
    for i, weight in weights.items():
        mix = 0.0 if i == last else distill
        goal = (1 - mix) * labels + mix * teacher
        total = total - weight * (goal * logits[i].log_softmax(-1)).sum()
    return total


def early_exit_backward(
    head: ExitHead,
    hidden: Mapping[int, Tensor],
    targets: Tensor,
    weights: Mapping[int, float],
    scale: float,
    distill: float = 0.0,
    chunk: int = 2048,
) -> dict[int, float]:
    """Add scale * gradient of `early_exit_loss` everywhere; returns each exit's summed CE.

    One backward pass runs through the tower at the end; before it, at most two [chunk, V]
    blocks of logits exist at a time (two only with distillation).
    """
    kept = (targets != IGNORE).nonzero().flatten()
    goal = targets.index_select(0, kept)
    states = {i: hidden[i].index_select(0, kept) for i in weights}
    last = max(states)
    leaves = {i: h.detach().requires_grad_() for i, h in states.items()}
    with torch.enable_grad():
        normed = {i: head.norm(h) for i, h in leaves.items()}
    gradients = {i: torch.empty_like(h) for i, h in normed.items()}
    sums = dict.fromkeys(weights, 0.0)
    weight_gradient = torch.zeros_like(head.weight)
    with torch.no_grad():
        for at in range(0, len(goal), chunk):
            part = slice(at, at + chunk)
            teacher = None
            if distill > 0.0 and len(weights) > 1:
                teacher = F.linear(normed[last][part], head.weight).float().softmax(-1)
            for i, weight in weights.items():
                x = normed[i][part]
                d = F.linear(x, head.weight).float()
                sums[i] += _to_gradient_(d, goal[part], None if i == last else teacher, distill)
                d = d.mul_(weight * scale).to(x.dtype)
                gradients[i][part] = d @ head.weight.to(x.dtype)
                weight_gradient += (d.t() @ x).to(weight_gradient)
                del d  # else it would stand beside the next exit's logits
    head.weight.grad = (
        weight_gradient if head.weight.grad is None else head.weight.grad + weight_gradient
    )
    for i, grad in gradients.items():
        normed[i].backward(grad)
    torch.autograd.backward(list(states.values()), [leaves[i].grad for i in states])
    return sums


def _to_gradient_(logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float) -> float:
    """Turn logits [N, V] in place into the gradient of their loss; returns their summed CE.

    The steps are softmax's own, spelt out because `logsumexp` would allocate a second [N, V].
    """
    labels, mix = targets[:, None], 0.0 if teacher is None else distill
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, labels) - top
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    logits.div_(total)
    if teacher is not None:
        logits.sub_(teacher, alpha=mix)
    logits.scatter_add_(1, labels, torch.full_like(labels, mix - 1.0, dtype=logits.dtype))
    return float((total.log() - chosen).sum())
