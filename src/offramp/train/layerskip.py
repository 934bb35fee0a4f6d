"""LayerSkip training of a decoder tower: layer dropout and early-exit loss (arXiv 2404.16710).

This is the task that `train/loop.py` drives: it knows what one shard of one step's batch adds
to the gradients. Everything random is a function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from offramp.config import check_choice, check_range, check_share
from offramp.data.batching import IGNORE, TokenBatches
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.layer_dropout import TIME_SCHEDULES, draw_survivors, run_survivors, time_factor
from offramp.train.losses import ExitHead, early_exit_backward
from offramp.train.schedules import ExitCurriculum, exit_weights


@dataclass(frozen=True)
class LayerSkipConfig:
    """The method's settings; the defaults of `p_max` and `early_exit_scale` train plainly.

    p_max: largest layer dropout rate (of the last layer). dropout_schedule: S(t), `constant`
    or `exp`. early_exit_scale: e_scale. distill: share of the last exit's distribution in the
    target of earlier exits (ours, not the paper's).
    """

    p_max: float = 0.0
    dropout_schedule: str = "constant"
    early_exit_scale: float = 0.0
    curriculum: ExitCurriculum = field(default_factory=ExitCurriculum)
    distill: float = 0.0

    def __post_init__(self) -> None:
        check_range(0, 1, p_max=self.p_max)
        check_range(0, early_exit_scale=self.early_exit_scale)
        check_choice(dropout_schedule=(self.dropout_schedule, TIME_SCHEDULES))
        check_share(distill=self.distill)


def forward_exits(
    model: DecoderLM, tokens: Tensor, exits: set[int], survivors: Tensor, segments: Tensor | None
) -> dict[int, Tensor]:
    """Hidden states [B, T, D] after each layer of `exits`, with layer dropout by `survivors`."""
    view = model.view(tokens.shape[1], segments)
    h = model.embed(tokens)
    hidden = {}
    for i in range(model.config.num_layers):

        def run(kept: Tensor, rows: Tensor | None, i: int = i) -> Tensor:
            return model.layer(i, kept, view if rows is None else view.select(rows))

        h = run_survivors(run, h, survivors[i])
        if i in exits:
            hidden[i] = h
    return hidden


class LayerSkipTask:
    """Implements `train.loop.Task` for a decoder tower over token batches."""

    def __init__(
        self,
        model: DecoderLM,
        batches: TokenBatches,
        layerskip: LayerSkipConfig,
        total_steps: int,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.batches, self.layerskip = model, batches, layerskip
        self.total_steps, self.seed, self.autocast = total_steps, seed, autocast

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        """Add shard `shard`'s share of step `step`'s gradient; returns sums over its tokens."""
        cfg, L = self.layerskip, self.model.config.num_layers
        batch = self.batches.batch(step, shard, num_shards)
        device = self.model.device
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        weights = exit_weights(step, self.total_steps, L, cfg.curriculum, cfg.early_exit_scale)
        # Not a function of the shard: all ranks drop as many samples in each layer.
        time = time_factor(step, self.total_steps, cfg.dropout_schedule)
        survivors = draw_survivors(L, len(tokens), cfg.p_max, time, self.seed, step)
        autocast = torch.autocast(
            device.type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with autocast, _attention_kernel(tokens):
            hidden = forward_exits(self.model, tokens, set(weights), survivors, None)
            sums = early_exit_backward(
                ExitHead(self.model.norm, self._head_weight()),
                {i: h.flatten(0, 1) for i, h in hidden.items()},
                targets.flatten(),
                weights,
                scale=1.0 / batch.total_targets,
                distill=cfg.distill,
            )
        num = int((batch.targets != IGNORE).sum())
        return {"loss": sums[L - 1], "targets": num, "tokens": batch.tokens.numel()}

    def _head_weight(self) -> Tensor:
        head = self.model.unembedding
        return self.model.embedding.weight if head is None else head.weight


def _attention_kernel(tokens: Tensor) -> AbstractContextManager[None]:
    """The plain attention for short sequences on a CPU, where the fused one is slow backwards.

    In bf16, forward and backward of [64, 29] tokens take 27 ms fused and 7 ms plain; from 256
    tokens on the fused one is as fast and does not hold the scores.
    """
    if tokens.device.type == "cpu" and tokens.shape[1] < 256:
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return kernel
    return nullcontext()
