"""The early-exit loss: cross-entropy at several exits through one head, one exit's logits at a time.

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

IGNORE = -100  # a target without loss: prompt, padding


@dataclass(frozen=True)
class ExitHead:
    """What every exit shares: the final norm and the un-embedding matrix [V, D]."""

    norm: nn.Module
    weight: nn.Parameter


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
                logits = F.linear(normed[i][part], head.weight).float()
                labels = goal[part, None]
                log_norm = logits.logsumexp(-1, keepdim=True)
                sums[i] += float((log_norm - logits.gather(1, labels)).sum())
                d = logits.sub_(log_norm).exp_()  # softmax, in the place of the logits
                mix = 0.0 if i == last or teacher is None else distill
                if teacher is not None and mix:
                    d.sub_(teacher, alpha=mix)
                d.scatter_add_(1, labels, torch.full_like(labels, mix - 1.0, dtype=d.dtype))
                d.mul_(weight * scale)
                gradients[i][part] = d.to(normed[i].dtype) @ head.weight.to(normed[i].dtype)
                weight_gradient += (d.to(normed[i].dtype).t() @ normed[i][part]).to(weight_gradient)
    head.weight.grad = (
        weight_gradient if head.weight.grad is None else head.weight.grad + weight_gradient
    )
    for i, grad in gradients.items():
        normed[i].backward(grad)
    torch.autograd.backward(list(states.values()), [leaves[i].grad for i in states])
    return sums
