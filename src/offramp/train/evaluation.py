"""Loss and agreement at every exit on held-out tokens: one pass, all exits read out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.data.batching import IGNORE, TokenBatch
from offramp.models.decoder_lm import DecoderLM


@dataclass(frozen=True)
class ExitScores:
    """Per exit, summed over `count` targets: nats, and first choices that the last layer shares."""

    nll: Mapping[int, float]
    agreed: Mapping[int, int]
    count: int


def exit_nll(model: DecoderLM, batches: Iterable[TokenBatch]) -> tuple[list[float], int]:
    """(nats summed over all targets, for each exit 1..L; number of targets)."""
    scores = exit_scores(model, batches, range(1, model.config.num_layers + 1))
    return list(scores.nll.values()), scores.count


@torch.no_grad()
def exit_scores(
    model: DecoderLM, batches: Iterable[TokenBatch], exits: Sequence[int]
) -> ExitScores:
    """Scores of `exits` (ascending) over all targets of `batches`."""
    L = model.config.num_layers
    nll, agreed, count = dict.fromkeys(exits, 0.0), dict.fromkeys(exits, 0), 0
    for batch in batches:
        targets = batch.targets.to(model.device).flatten()
        kept = (targets != IGNORE).nonzero().flatten()
        count += len(kept)
        h, view = model.embed(batch.tokens.to(model.device)), model.view(batch.tokens.shape[1])
        choices = {}
        for i in range(1, L + 1):
            h = model.layer(i - 1, h, view)
            if i in nll or i == L:
                nats, choices[i] = _read_out(model, h.flatten(0, 1)[kept], targets[kept], i)
                if i in nll:
                    nll[i] += nats
        for i in exits:
            agreed[i] += int((choices[i] == choices[L]).sum())
    return ExitScores(nll, agreed, count)


def _read_out(
    model: DecoderLM, h: Tensor, targets: Tensor, exit_layer: int, chunk: int = 2048
) -> tuple[float, Tensor]:
    """(nats summed over h [N, D], first choices [N]) of one exit."""
    nats, choices = 0.0, []
    for at in range(0, len(h), chunk):
        part, goal = h[at : at + chunk], targets[at : at + chunk]
        logits = model.logits(part, exit_layer).float()
        nats += float(F.cross_entropy(logits, goal, reduction="sum"))
        choices.append(logits.argmax(-1))
    return nats, torch.cat(choices)
