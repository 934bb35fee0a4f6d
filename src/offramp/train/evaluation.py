"""The loss at every exit on held-out tokens: one pass through the tower, all exits read out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.data.batching import IGNORE, TokenBatch
from offramp.models.decoder_lm import DecoderLM


@torch.no_grad()
def exit_nll(model: DecoderLM, batches: Iterable[TokenBatch]) -> tuple[list[float], int]:
    """(nats summed over all targets, for each exit 1..L; number of targets)."""
    sums = [0.0] * model.config.num_layers
    count = 0
    for batch in batches:
        targets = batch.targets.to(model.device).flatten()
        kept = (targets != IGNORE).nonzero().flatten()
        count += len(kept)
        h, view = model.embed(batch.tokens.to(model.device)), model.view(batch.tokens.shape[1])
        for i in range(model.config.num_layers):
            h = model.layer(i, h, view)
            sums[i] += float(_nll(model, h.flatten(0, 1)[kept], targets[kept], i + 1))
    return sums, count


def _nll(model: DecoderLM, h: Tensor, targets: Tensor, exit_layer: int, chunk: int = 2048) -> float:
    return sum(
        float(F.cross_entropy(model.logits(part, exit_layer).float(), goal, reduction="sum"))
        for part, goal in zip(torch.split(h, chunk), torch.split(targets, chunk), strict=True)
    )
