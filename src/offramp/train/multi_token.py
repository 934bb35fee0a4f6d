"""The multi-token loss: head k learns the token k - 1 after the next one (arXiv 2409.08148).

J = sum over heads of weight * CE(head k at position t, target of head 1 at t + k - 1). The logits
of all K heads together would take K x positions x vocabulary numbers; `multi_token_backward` goes
head by head over a detached copy of the hidden states (after Gloeckle et al., arXiv 2404.19737,
section 2), so that one head's stand in memory, and hands back one gradient for the trunk.
`multi_token_loss` is the obvious version, held equal by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.data.batching import IGNORE
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower


@dataclass(frozen=True)
class HeadSums:
    """One head over a batch: of `targets` tokens it is to predict, it gives `hits` most
    probability. nats: summed over those that its vocabulary has."""

    nats: float
    hits: int
    targets: int


def head_targets(targets: Tensor, future: int) -> Tensor:
    """What the head that looks `future` tokens past head 1 is to predict, [B, T].

    targets: int64 [B, T], head 1's, IGNORE where it learns nothing: there no other head does
    either, or it would learn to speak before the text begins. Past the end of a row's text, EOS,
    there is nothing to predict.
    """
    ahead = torch.full_like(targets, IGNORE)
    ahead[:, : max(0, targets.shape[1] - future)] = targets[:, future:]
    return ahead.masked_fill(targets == IGNORE, IGNORE)


def multi_token_loss(
    tower: Tower, heads: Heads | None, hidden: Tensor, targets: Tensor, weights: Sequence[float]
) -> Tensor:
    """The sum over all positions with a target, []; all logits in memory at once.

    hidden: [B, T, D], the tower's top layer. weights: of heads 1 to K; without heads, of head 1.
    """
    logits = tower.logits(hidden, tower.config.num_layers).unsqueeze(2)
    total = weights[0] * _nats(logits[:, :, 0], targets)
    if heads is not None:
        ahead = heads.logits(hidden, tower)
        for future in range(1, heads.config.count):
            mine = head_targets(targets, future)
            total = total + weights[future] * _nats(ahead[:, :, future - 1], mine)
    return total


def multi_token_backward(
    tower: Tower,
    heads: Heads | None,
    hidden: Tensor,
    targets: Tensor,
    weights: Sequence[float],
    scale: float,
) -> tuple[list[HeadSums], Tensor | None]:
    """Add scale * gradient of `multi_token_loss` to the heads, the norm and the un-embedding.

    Returns (sums of each head, the gradient of `hidden`). The caller hands the latter down the
    trunk, with whatever else the trunk learns from; it is None where `hidden` needs none, and then
    only what is trained above it, such as the heads of a frozen trunk, learns.
    """
    kept = targets != IGNORE
    leaf = hidden[kept].detach().requires_grad_(hidden.requires_grad)
    sums = []
    for future, weight in enumerate(weights):
        goal = head_targets(targets, future)[kept]
        with torch.enable_grad():
            nats, found = _one_head(tower, heads, leaf, goal, future)
        if nats.requires_grad and weight:
            (weight * scale * nats).backward()  # type: ignore[no-untyped-call]
        sums.append(found)
        del nats  # else its logits would stand beside the next head's
    if not hidden.requires_grad:
        return sums, None
    gradient = torch.zeros_like(hidden)
    if leaf.grad is not None:
        gradient[kept] = leaf.grad
    return sums, gradient


@torch.no_grad()
def multi_token_sums(
    tower: Tower, heads: Heads | None, hidden: Tensor, targets: Tensor
) -> list[HeadSums]:
    """What `multi_token_backward` counts, without gradients: of every head there is."""
    kept, count = targets != IGNORE, 1 if heads is None else heads.config.count
    goals = [head_targets(targets, future)[kept] for future in range(count)]
    return [_one_head(tower, heads, hidden[kept], goal, k)[1] for k, goal in enumerate(goals)]


def _one_head(
    tower: Tower, heads: Heads | None, h: Tensor, goal: Tensor, future: int
) -> tuple[Tensor, HeadSums]:
    """(nats of head 1 + `future` at its targets, []; its sums), of h [N, D] and goal [N]."""
    if future == 0:
        logits = tower.logits(h[None], tower.config.num_layers)[0]
    else:
        assert heads is not None, "a weight for every head, and no more"
        logits = heads.head_logits(future - 1, h, tower)
    nats = _nats(logits, goal)
    hits = int((logits.detach().argmax(-1) == goal).sum())
    return nats, HeadSums(float(nats.detach()), hits, int((goal != IGNORE).sum()))


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of logits [..., V] at targets [...] that V has, []."""
    V = logits.shape[-1]
    goal = targets.masked_fill(targets >= V, IGNORE).flatten()
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.to(precise).flatten(0, -2), goal, ignore_index=IGNORE, reduction="sum"
    )
