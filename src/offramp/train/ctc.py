"""Training a CTC encoder at all of its exits at once (arXiv 2309.09546), for `train/loop.py`.

J = sum over exits of weight * loss, the weights as in `train/schedules.py`. An exit's loss is
CTC; early exits may also learn the deepest exit's posteriors frame by frame (after Inter-KD,
arXiv 2211.15075). Everything random is a function of (seed, step, shard).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import check_choice, check_range, check_share
from offramp.decoding.ctc import greedy
from offramp.decoding.exit_policies import edit_distance
from offramp.errors import ConfigError, DataError
from offramp.models.ctc import CTCEncoder
from offramp.models.hf_ctc import PretrainedCTCEncoder
from offramp.nn.layer_dropout import TIME_SCHEDULES, draw_survivors, time_factor
from offramp.train.augment import SpecAugment
from offramp.train.schedules import ExitCurriculum, exit_weights

log = logging.getLogger(__name__)

_MORE_MASKS = 2.5  # as many time masks on each of CR-CTC's two views as without it


@dataclass(frozen=True)
class SpeechBatch:
    """features [B, T, F] with `lengths` int64 [B] real frames, and what was said.

    targets: token ids per utterance, without blanks. audio_seconds: of all utterances together,
    without padding. total_targets: tokens in all the step's shards; None: there is one shard.
    """

    features: Tensor
    lengths: Tensor
    targets: Sequence[Sequence[int]]
    audio_seconds: float
    total_targets: int | None = None


class SpeechBatches(Protocol):
    """Batches by step, the same in every process."""

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch: ...


class ExitShape(Protocol):
    """What training asks of a model's configuration."""

    @property
    def exits(self) -> tuple[int, ...]: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def blank_id(self) -> int: ...


class ExitEncoder(Protocol):
    """What is trained: `CTCEncoder`, or a pretrained encoder with exits; an `nn.Module` too."""

    @property
    def config(self) -> ExitShape: ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, features: Tensor, lengths: Tensor, /) -> Any: ...

    def run(self, state: Any, start: int, stop: int) -> Any: ...

    def logits(self, state: Any, exit_layer: int) -> Tensor: ...


@dataclass(frozen=True)
class CTCTraining:
    """The method's settings; the defaults are the published sum over all exits alike.

    curriculum: which exits have a loss at a step, and their weighting; its own list of exits is
    replaced by the encoder's. early_exit_scale: weight of an early exit beside the last one's 1.
    distill: share of the deepest exit's posteriors in what earlier exits learn. consistency: how
    much each exit is to write the same for two maskings of an utterance (CR-CTC, arXiv 2410.05101,
    which takes 0.2); other than 0 it doubles a step's work, so halve the batches. p_max,
    dropout_schedule: layer dropout, as in LayerSkip. augment: SpecAugment, or None. autocast:
    "bf16" for mixed precision, or "none".
    """

    curriculum: ExitCurriculum = field(
        default_factory=lambda: ExitCurriculum("all", weighting="uniform")
    )
    early_exit_scale: float = 1.0
    distill: float = 0.0
    consistency: float = 0.0
    p_max: float = 0.0
    dropout_schedule: str = "constant"
    augment: SpecAugment | None = None
    autocast: str = "none"

    def __post_init__(self) -> None:
        check_range(0, early_exit_scale=self.early_exit_scale, consistency=self.consistency)
        check_range(0, 1, p_max=self.p_max)
        check_choice(
            dropout_schedule=(self.dropout_schedule, TIME_SCHEDULES),
            autocast=(self.autocast, ("bf16", "none")),
        )
        check_share(distill=self.distill)
        if self.consistency and self.augment is None:
            raise ConfigError(
                f"consistency is {self.consistency}, which compares two maskings, and augment is "
                "None; give a SpecAugment, or consistency 0"
            )

    @property
    def num_views(self) -> int:
        """Maskings of an utterance in a step."""
        return 2 if self.consistency else 1

    def views(self, batch: SpeechBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(features of the views, one view after the other; their lengths), masked."""
        features = torch.cat([batch.features] * self.num_views)
        lengths, augment = batch.lengths.repeat(self.num_views), self.augment
        if augment is None:
            return features, lengths
        if self.consistency:  # the paper's factor: the views are to differ much in time
            augment = replace(augment, time_masks=round(_MORE_MASKS * augment.time_masks))
        return augment(features, lengths, generator), lengths


# -- the loss ------------------------------------------------------------------------------------


def frames_needed(tokens: Sequence[int]) -> int:
    """The least number of frames that can write `tokens`: equal neighbours need a blank between."""
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))


def ctc_nll(
    log_probs: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]], blank_id: int
) -> Tensor:
    """-log p(targets | log_probs) by CTC (Graves et al., 2006), in nats, [E, B].

    log_probs: float32 [E, B, T, V], of E exits. An utterance with fewer frames than
    `frames_needed` costs infinity.
    """
    E, B, T, V = log_probs.shape
    device = log_probs.device
    ids = torch.tensor([t for row in targets for t in row], dtype=torch.long, device=device)
    counts = torch.tensor([len(row) for row in targets], dtype=torch.long, device=device)
    nll: Tensor = F.ctc_loss(
        log_probs.view(E * B, T, V).transpose(0, 1),
        ids.repeat(E),
        lengths.repeat(E),
        counts.repeat(E),
        blank=blank_id,
        reduction="none",
    )
    return nll.view(E, B)


def distillation(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """KL(deepest exit || each exit), summed over real frames, [E, B], of log_probs [E, B, T, V].

    The deepest exit, the last of E, gets no gradient from it.
    """
    return divergence(log_probs[-1].detach(), log_probs, lengths)


def disagreement(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """KL(other view || this one), summed over real frames, [E, 2B], of log_probs [E, 2B, T, V].

    Rows b and B + b are two views of an utterance, of the same length. Each is drawn to the other,
    which gets no gradient from it (CR-CTC, arXiv 2410.05101).
    """
    other = log_probs.detach().roll(log_probs.shape[1] // 2, dims=1)
    return divergence(other, log_probs, lengths)


def divergence(of: Tensor, log_probs: Tensor, lengths: Tensor) -> Tensor:
    """KL(of || log_probs), both [..., B, T, V], summed over the `lengths` [B] real frames."""
    real = torch.arange(log_probs.shape[-2], device=lengths.device) < lengths[:, None]
    return ((of.exp() * (of - log_probs)).sum(-1) * real).sum(-1)


def forward_exits(
    model: ExitEncoder,
    features: Tensor,
    lengths: Tensor,
    exits: Sequence[int],
    survivors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [E, B, T, V] at `exits`, rising; true frames [B]), in one pass.

    survivors: bool [L, B], layer dropout; only `CTCEncoder` knows it.
    """
    state, logits, start = model.embed(features, lengths), [], 0
    for exit_layer in exits:
        if survivors is None:
            state = model.run(state, start, exit_layer)
        else:
            assert isinstance(model, CTCEncoder)
            state = model.run(state, start, exit_layer, survivors)
        logits.append(model.logits(state, exit_layer))
        start = exit_layer
    return torch.stack(logits).float().log_softmax(-1), state.lengths


# -- the task ------------------------------------------------------------------------------------


class CTCTask:
    """Implements `train.loop.Task` for an encoder with exits over batches of speech."""

    def __init__(
        self,
        encoder: ExitEncoder,
        batches: SpeechBatches,
        training: CTCTraining,
        total_steps: int,
        seed: int,
        dev: Sequence[SpeechBatch] = (),
    ) -> None:
        assert isinstance(encoder, nn.Module)
        if training.p_max > 0 and not isinstance(encoder, CTCEncoder):
            raise ConfigError(
                f"p_max is {training.p_max}; {type(encoder).__name__} has no layer dropout, use 0"
            )
        raw = isinstance(encoder, PretrainedCTCEncoder) and encoder.config.input_size is None
        if raw and training.augment is not None:
            raise ConfigError(
                "augment masks features, and this model reads samples; set augment to None"
            )
        self.model: nn.Module = encoder
        self.batches, self.training, self.dev = batches, training, dev
        self.total_steps, self.seed = total_steps, seed
        self._encoder: ExitEncoder = encoder
        self._warn = LeftOutWarning()
        self._curriculum = replace(training.curriculum, exits=encoder.config.exits)

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        """Add shard `shard`'s share of step `step`'s gradient; returns sums over its utterances.

        loss: nats of CTC at the last exit, loss_exit_k: at exit k, over `targets` tokens; with
        two views of an utterance, their mean.
        infeasible: utterances with more tokens than frames; they have no loss. tokens: feature
        frames. DataError: no utterance has a loss.
        """
        batch = self.batches.batch(step, shard, num_shards)
        weights, views = self._weights(step), self.training.num_views
        log_probs, lengths = self._forward(batch, list(weights), step, shard)
        said = [*batch.targets] * views
        kept = feasible(lengths, said)
        infeasible = (len(said) - len(kept)) // views  # all views of an utterance are as long
        if infeasible:
            self._warn(step, infeasible)
            log_probs, lengths = log_probs[:, kept], lengths[kept]
        if not kept:
            raise DataError(
                f"step {step}, shard {shard}: every text has more tokens than its audio has "
                "frames; use a finer subsampling, longer tokens, or leave these utterances out"
            )
        targets = [said[row] for row in kept]
        nll = ctc_nll(log_probs, lengths, targets, self._encoder.config.blank_id)
        num_targets = sum(map(len, targets)) // views
        total = num_targets if batch.total_targets is None else batch.total_targets
        loss = self._mix(nll, log_probs, lengths, list(weights.values())) / (views * max(1, total))
        loss.backward()  # type: ignore[no-untyped-call]
        sums = dict(zip(weights, (nll.detach().sum(1) / views).tolist(), strict=True))
        return {
            "loss": sums[self._encoder.config.num_layers],
            "targets": num_targets,
            "tokens": int(batch.lengths.sum()),
            "audio_s": batch.audio_seconds,
            "infeasible": infeasible,
            **{f"loss_exit_{exit_layer}": nats for exit_layer, nats in sums.items()},
        }

    def _weights(self, step: int) -> dict[int, float]:
        """Exit -> weight of its loss, rising; schedules count layers from 0."""
        L, scale = self._encoder.config.num_layers, self.training.early_exit_scale
        found = exit_weights(step, self.total_steps, L, self._curriculum, scale)
        return {layer + 1: found[layer] for layer in sorted(found)}

    def _forward(
        self, batch: SpeechBatch, exits: list[int], step: int, shard: int
    ) -> tuple[Tensor, Tensor]:
        """`forward_exits` with all that is random in training."""
        cfg, L = self.training, self._encoder.config.num_layers
        device, survivors = self._encoder.device, None
        if cfg.p_max > 0:
            # Not a function of the shard: all ranks drop as many samples in each layer.
            time = time_factor(step, self.total_steps, cfg.dropout_schedule)
            rows = cfg.num_views * len(batch.targets)
            survivors = draw_survivors(L, rows, cfg.p_max, time, self.seed, step)
        precision = autocast(device, cfg.autocast)
        with seeded(device, self.seed, step, shard) as generator, precision:
            features, lengths = cfg.views(batch, generator)
            features, lengths = features.to(device), lengths.to(device)
            return forward_exits(self._encoder, features, lengths, exits, survivors)

    def _mix(
        self, nll: Tensor, log_probs: Tensor, lengths: Tensor, weights: Sequence[float]
    ) -> Tensor:
        """The loss [] of nll [E, B], with what exits learn of the deepest and of another view."""
        weight = torch.tensor(weights, device=nll.device)
        share, alpha = self.training.distill, self.training.consistency
        if share:
            early = (1 - share) * nll[:-1] + share * distillation(log_probs, lengths)[:-1]
            nll = torch.cat((early, nll[-1:]))
        if alpha:
            nll = nll + alpha * disagreement(log_probs, lengths)
        return weight @ nll.sum(1)

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Per exit over the dev batches: nats per token, and greedy token error rate.

        Texts with more tokens than frames count as errors, not in the loss; `infeasible` says
        how many there are. Empty without dev batches.
        """
        exits = self._encoder.config.exits
        nats, errors = torch.zeros(len(exits)), torch.zeros(len(exits))
        scored = targets = infeasible = 0
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self.dev:
                log_probs, lengths = self._read(batch)
                kept = feasible(lengths, batch.targets)
                texts = [batch.targets[row] for row in kept]
                infeasible += len(batch.targets) - len(kept)
                scored += sum(map(len, texts))
                targets += sum(map(len, batch.targets))
                errors += torch.tensor([self._errors(e, lengths, batch) for e in log_probs])
                if kept:
                    blank_id = self._encoder.config.blank_id
                    nll = ctc_nll(log_probs[:, kept], lengths[kept], texts, blank_id)
                    nats += nll.sum(1).cpu()
        finally:
            self.model.train(was_training)
        if not self.dev:
            return {}
        return {
            **{
                f"loss_exit_{e}": n / max(1, scored)
                for e, n in zip(exits, nats.tolist(), strict=True)
            },
            **{
                f"token_error_rate_exit_{e}": n / max(1, targets)
                for e, n in zip(exits, errors.tolist(), strict=True)
            },
            "infeasible": infeasible,
        }

    def _read(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        device, exits = self._encoder.device, self._encoder.config.exits
        return forward_exits(
            self._encoder, batch.features.to(device), batch.lengths.to(device), exits
        )

    def _errors(self, log_probs: Tensor, lengths: Tensor, batch: SpeechBatch) -> int:
        """Tokens to insert, drop or replace in what one exit writes greedily."""
        found = greedy(log_probs, lengths, self._encoder.config.blank_id)
        return token_edits([hypothesis.tokens for hypothesis in found], batch.targets)


class LeftOutWarning:
    """Says once that utterances have no loss; the sums of every step have their count."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, step: int, infeasible: int) -> None:
        if not self._said:
            log.warning(
                "step %d: %d utterances have more tokens than frames and are left out of the "
                "loss (later ones are counted, not named)",
                step,
                infeasible,
            )
        self._said = True


def feasible(lengths: Tensor, targets: Sequence[Sequence[int]]) -> list[int]:
    """The rows whose text fits into their frames."""
    rows = zip(lengths.tolist(), targets, strict=True)
    return [row for row, (frames, text) in enumerate(rows) if frames >= frames_needed(text)]


@contextmanager
def seeded(device: torch.device, seed: int, step: int, shard: int) -> Iterator[torch.Generator]:
    """Dropout inside is a function of (seed, step, shard); also a CPU generator for the rest."""
    own, dropout = np.random.SeedSequence((seed, step, shard)).generate_state(2).tolist()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(dropout)
        yield torch.Generator().manual_seed(own)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision as a training's settings name it: "bf16" or "none"."""
    bf16 = precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16 if bf16 else None, enabled=bf16)


def token_edits(written: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> int:
    """Tokens to insert, drop or replace."""
    return sum(edit_distance(ours, text) for ours, text in zip(written, said, strict=True))
