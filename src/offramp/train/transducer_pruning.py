"""The transducer loss where the joiner is too dear to run on every node: pruned RNN-T.

After Kuang et al. (arXiv 2206.13236): a joiner that merely adds what encoder and predictor say
needs no tensor of [B, T, U + 1, V], since its softmax's denominator is a matrix product. Its loss
is trained too, and its occupancies show which S nodes of each frame matter; the full joiner runs
on those windows alone. Unlike there, the windows are the best that exist: the sequence that
holds the most occupancy, found by dynamic programming, instead of one window per frame that is
then made to fit its neighbours. With S = U + 1 nothing is pruned and the loss is the full one.

    simple = additive_arcs(encoder_logits, predictor_logits, labels, blank_id)
    simple_loss, occupancy = loss_and_occupancy(simple, frames, num_labels)
    windows = choose_windows(occupancy, frames, num_labels, size)
    logits = joiner(encoded[:, :, None], windows.of(predicted))     # [B, T, S, V]
    arcs = softmax_arcs(logits, windows.of(labels), blank_id)
    loss = simple_scale * simple_loss + transducer_loss(windows.widen(arcs), frames, num_labels)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.config import check_counts
from offramp.errors import InputError
from offramp.train.transducer_loss import Lattice


def additive_arcs(
    encoder_logits: Tensor, predictor_logits: Tensor, labels: Tensor, blank_id: int
) -> Lattice:
    """Arcs of the joiner softmax(encoder_logits + predictor_logits), never on T x U x V at once.

    encoder_logits: [B, T, V]; predictor_logits: [B, U + 1, V]; labels: int64 [B, U + 1], see
    `label_after`. Half precision is read as float32.
    """
    T, wide = encoder_logits.shape[1], torch.promote_types(encoder_logits.dtype, torch.float32)
    encoder_logits, predictor_logits = encoder_logits.to(wide), predictor_logits.to(wide)
    enc_top = encoder_logits.detach().amax(-1, keepdim=True)
    pred_top = predictor_logits.detach().amax(-1, keepdim=True)
    # In float64: products may be as small as both together, and must not vanish.
    enc, pred = ((encoder_logits - enc_top).double(), (predictor_logits - pred_top).double())
    sums = (enc.exp() @ pred.exp().transpose(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    total = sums.log().to(wide) + enc_top + pred_top.transpose(1, 2)
    blank = encoder_logits[..., blank_id, None] + predictor_logits[:, None, :, blank_id]
    by_frame = encoder_logits.gather(2, labels[:, None].expand(-1, T, -1))
    by_node = predictor_logits.gather(2, labels[..., None]).transpose(1, 2)
    return Lattice(blank - total, by_frame + by_node - total)


@dataclass(frozen=True)
class Windows:
    """starts: int64 [B, T]; in frame t the nodes from starts[t] on are kept, S = `size` of the
    `num_nodes` U + 1. Starts never fall, and neighbouring windows share a node.
    """

    starts: Tensor
    size: int
    num_nodes: int

    @property
    def nodes(self) -> Tensor:
        """int64 [B, T, S]: how many labels are written at each place of each window."""
        return self.starts[..., None] + torch.arange(self.size, device=self.starts.device)

    def of(self, x: Tensor) -> Tensor:
        """x [B, U + 1] or [B, U + 1, D] in each frame's window, [B, T, S] or [B, T, S, D]."""
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        return x[rows, self.nodes]

    def widen(self, arcs: Lattice) -> Lattice:
        """Arcs [B, T, S] of the windows as a lattice [B, T, U + 1] without any other."""
        return Lattice(self._widen(arcs.blank), self._widen(arcs.label))

    def _widen(self, x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:2], self.num_nodes), -torch.inf)
        return wide.scatter(2, self.nodes, x)


@torch.no_grad()
def choose_windows(occupancy: Tensor, frames: Tensor, num_labels: Tensor, size: int) -> Windows:
    """The windows of `size` nodes that hold most of `occupancy` [B, T, U + 1], row by row.

    Of all sequences in which some path runs from the first node to the last of the row's
    `frames` and `num_labels` (int64 [B]). InputError: there is none, for windows so small.
    """
    check_counts(1, size=size)
    _, T, num_nodes = occupancy.shape
    S = min(size, num_nodes)
    last = (num_labels + 1 - S).clamp(min=0)
    _check_reach(last, frames, num_labels, S)
    held = occupancy.unfold(2, S, 1).sum(-1)  # [B, T, starts]
    starts = torch.arange(held.shape[2], device=held.device)
    held = held.masked_fill((starts > last[:, None])[:, None], -torch.inf)
    # best: of all sequences up to frame t that end in each start; came_from: the start before.
    best = held[:, 0].masked_fill(starts > 0, -torch.inf)
    came_from = []
    for now in held.unbind(1)[1:]:
        best, place = F.pad(best, (S - 1, 0), value=-torch.inf).unfold(1, S, 1).max(-1)
        came_from.append(starts - (S - 1) + place)
        best = best + now
    at, found = last, [last]
    for t in range(T - 1, 0, -1):
        earlier = came_from[t - 1].gather(1, at[:, None])[:, 0]
        at = torch.where(t < frames, earlier, last)  # padding follows the last window
        found.append(at)
    return Windows(torch.stack(found[::-1], dim=1), S, num_nodes)


def _check_reach(last: Tensor, frames: Tensor, num_labels: Tensor, size: int) -> None:
    short = (last > (frames - 1) * (size - 1)).nonzero().flatten().tolist()
    if short:
        T, U = int(frames[short[0]]), int(num_labels[short[0]])
        raise InputError(
            f"windows of {size} nodes cannot pass {U} labels in the {T} frames of row {short[0]}; "
            f"this row needs a size of at least {-(-U // T) + 1}"
        )
