"""Training a streaming transducer with a CTC head on its encoder, for `train/loop.py`.

Each step hears its batch in chunks of one size, another in every step, so that one model serves
several latencies. The transducer loss is pruned (train/transducer_pruning.py) or exact. Alone it
learns slowly at first, for neither side of the joiner knows anything; so in the first steps most
of the gradient is CTC's. Everything random is a function of (seed, step, shard).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from offramp.audio.features import FeatureConfig, log_mel_batch, normalize
from offramp.config import (
    Chunking,
    EncoderConfig,
    TransducerConfig,
    check_choice,
    check_counts,
    check_range,
    check_share,
)
from offramp.decoding.ctc import greedy
from offramp.decoding.transducer import TransducerSearch
from offramp.errors import ConfigError, DataError
from offramp.models.ctc import CTCEncoder
from offramp.models.transducer import Transducer
from offramp.tokenizer import TextTokenizer
from offramp.train.augment import SpecAugment
from offramp.train.ctc import (
    LeftOutWarning,
    SpeechBatch,
    SpeechBatches,
    autocast,
    ctc_nll,
    divergence,
    feasible,
    forward_exits,
    seeded,
    token_edits,
)
from offramp.train.transducer_loss import (
    Lattice,
    label_after,
    loss_and_occupancy,
    softmax_arcs,
    transducer_loss,
)
from offramp.train.transducer_pruning import additive_arcs, choose_windows

_MEASURED_BATCHES = 40  # of which features are measured: an hour of audio, about
_FIRST_WEIGHT = 0.1  # of the transducer's loss in the first step of a ramp


@dataclass(frozen=True)
class LossWeights:
    """Of a step's three losses; `simple` is that of the joiner that finds the windows."""

    transducer: float
    simple: float
    ctc: float


@dataclass(frozen=True)
class TransducerTraining:
    """The settings of the method.

    chunks: sizes in frames of the tower, 0 for the whole utterance; each step draws one. Empty: the
    model's own chunking; its left and right context are kept in any case. window: nodes per frame
    that the joiner scores in the pruned loss; 0: all of them, exactly. simple, ctc: weights of
    the additive joiner's loss (pruned only) and of CTC beside the transducer's 1. simple 0: no such
    joiner; the model scores all nodes, without a gradient, to find the windows, which takes longer
    and is right from the first step in a model that has been trained. ramp_steps: so
    long the weights move there in a line from 1, 1, and a tenth for the transducer (after
    arXiv 2206.13236). distill: share of a teacher's posteriors in what the CTC head learns.
    fastemit: lambda of arXiv 2010.11148; its paper takes about 0.005. augment: SpecAugment, or
    None. autocast: "bf16" for mixed precision, or "none".
    """

    chunks: tuple[int, ...] = ()
    window: int = 5
    simple: float = 0.5
    ctc: float = 0.3
    ramp_steps: int = 0
    distill: float = 0.0
    fastemit: float = 0.0
    augment: SpecAugment | None = None
    autocast: str = "none"

    def __post_init__(self) -> None:
        for chunk in self.chunks:
            check_counts(0, chunks=chunk)
        check_counts(0, window=self.window, ramp_steps=self.ramp_steps)
        check_range(0, simple=self.simple, ctc=self.ctc, fastemit=self.fastemit)
        check_choice(autocast=(self.autocast, ("bf16", "none")))
        check_share(distill=self.distill)
        if self.distill and not self.ctc:
            raise ConfigError(
                f"distill is {self.distill}, of what the CTC head learns, and ctc is 0; give ctc a "
                "weight, or distill 0"
            )
        if self.window == 1:
            raise ConfigError("window is 1, from which no path gets on; use at least 2, or 0")

    def weights(self, step: int) -> LossWeights:
        done = 1.0 if self.ramp_steps == 0 else min(1.0, step / self.ramp_steps)
        return LossWeights(
            _FIRST_WEIGHT + (1.0 - _FIRST_WEIGHT) * done,
            0.0 if self.window == 0 or self.simple == 0.0 else 1.0 + (self.simple - 1.0) * done,
            0.0 if self.ctc == 0.0 else 1.0 + (self.ctc - 1.0) * done,
        )


@dataclass(frozen=True)
class TransducerReader:
    """Log-mel features, which the model normalises itself, and the pieces of a tokenizer."""

    features: FeatureConfig
    tokenizer: TextTokenizer

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each, at 16 kHz -> features [B, T, F] and lengths int64 [B]."""
        return log_mel_batch(samples, self.features)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)


def measure_features(model: Transducer, batches: SpeechBatches, steps: int) -> None:
    """Fill the model's statistics of the features from the first batches of a run of `steps`."""

    def utterances() -> Iterator[Tensor]:
        for step in range(min(steps, _MEASURED_BATCHES)):
            batch = batches.batch(step, 0, 1)
            for features, length in zip(batch.features, batch.lengths.tolist(), strict=True):
                yield features[:length].to(model.device)

    model.encoder.feature_norm.measure(utterances())


class SimpleJoiner(nn.Module):
    """Adds what both sides say of each token: cheap enough for every node of the lattice.

    Only training has it, to find the windows of the pruned loss. It begins at 0: all tokens alike,
    and no gradient that would toss the encoder about before it knows anything.
    """

    def __init__(self, d_joint: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_joint, vocab_size)
        self.predictor = nn.Linear(d_joint, vocab_size)
        for p in self.parameters():
            nn.init.zeros_(p)

    def arcs(self, encoded: Tensor, predicted: Tensor, labels: Tensor, blank_id: int) -> Lattice:
        """encoded [B, T, J], predicted [B, U + 1, J], labels [B, U + 1] -> all arcs."""
        return additive_arcs(self.encoder(encoded), self.predictor(predicted), labels, blank_id)


@dataclass(frozen=True)
class _Heard:
    """Utterances that have a loss, of a batch in which `infeasible` have none.

    rows: int64 [B], which of the batch they are. encoded: [B, T', J], of which `frames` [B] are
    true. tokens: int64 [B, U], `count` [B] each.
    """

    rows: Tensor
    encoded: Tensor
    frames: Tensor
    targets: Sequence[Sequence[int]]
    tokens: Tensor
    count: Tensor
    infeasible: int

    @classmethod
    def of(cls, encoded: Tensor, frames: Tensor, targets: Sequence[Sequence[int]]) -> _Heard:
        kept = feasible(frames, targets)
        rows = torch.tensor(kept, device=frames.device, dtype=torch.long)
        infeasible = len(targets) - len(kept)
        if infeasible:
            encoded, frames = encoded[rows], frames[rows]
        targets = [targets[row] for row in kept]
        sizes = [len(row) for row in targets]
        tokens = torch.zeros(len(targets), max(sizes, default=0), dtype=torch.long)
        for row, ids in zip(tokens, targets, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        count = torch.tensor(sizes, dtype=torch.long, device=encoded.device)
        return cls(rows, encoded, frames, targets, tokens.to(encoded.device), count, infeasible)


def _all_arcs(model: Transducer, heard: _Heard, predicted: Tensor, labels: Tensor) -> Lattice:
    """The joiner's of every node."""
    logits = model.joiner(heard.encoded[:, :, None], predicted[:, None])
    return softmax_arcs(logits, labels[:, None], model.config.blank_id)


def _exact_nll(model: Transducer, heard: _Heard, fastemit: float = 0.0) -> Tensor:
    """Nats of the transducer over all paths, [B]: the joiner scores every node."""
    predicted, labels = model.predictor(heard.tokens), label_after(heard.tokens)
    arcs = _all_arcs(model, heard, predicted, labels)
    return transducer_loss(arcs, heard.frames, heard.count, fastemit)


def _pruned_nll(
    model: Transducer,
    simple: SimpleJoiner | None,
    heard: _Heard,
    window: int,
    fastemit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(nats of the transducer over the likely paths, nats of the additive joiner), both [B].

    Without an additive joiner the model's own scores find the windows, and its nats are 0.
    """
    frames, count, blank_id = heard.frames, heard.count, model.config.blank_id
    predicted, labels = model.predictor(heard.tokens), label_after(heard.tokens)
    if simple is None:
        with torch.no_grad():
            arcs = _all_arcs(model, heard, predicted, labels)
            simple_nll, occupancy = loss_and_occupancy(arcs, frames, count)
        simple_nll = torch.zeros_like(simple_nll)
    else:
        arcs = simple.arcs(heard.encoded, predicted, labels, blank_id)
        simple_nll, occupancy = loss_and_occupancy(arcs, frames, count)
    windows = choose_windows(occupancy, frames, count, window)
    logits = model.joiner(heard.encoded[:, :, None], windows.of(predicted))
    arcs = windows.widen(softmax_arcs(logits, windows.of(labels), blank_id))
    return transducer_loss(arcs, frames, count, fastemit), simple_nll


def _last_exit(teacher: CTCEncoder, batch: SpeechBatch) -> Tensor:
    """What `teacher` writes of a batch that nothing hides, [B, T, V], log-probabilities."""
    features, lengths = (x.to(teacher.device) for x in (batch.features, batch.lengths))
    with torch.no_grad():
        exits = [teacher.config.exits[-1]]
        return forward_exits(teacher, normalize(features, lengths), lengths, exits)[0][0]


class TransducerTask:
    """Implements `train.loop.Task` for a transducer over batches of speech.

    teacher: a CTC encoder with the model's tokens and frames; needed where the training distills.
    """

    def __init__(
        self,
        transducer: Transducer,
        batches: SpeechBatches,
        training: TransducerTraining,
        seed: int,
        dev: Sequence[SpeechBatch] = (),
        teacher: CTCEncoder | None = None,
    ) -> None:
        cfg = transducer.config
        if (teacher is None) != (training.distill == 0.0):
            raise ConfigError(
                f"distill is {training.distill} and there is {'no' if teacher is None else 'a'} "
                "teacher; give both or neither"
            )
        if teacher is not None:
            _check_teacher(teacher.config, cfg)
        if training.ctc and transducer.ctc_head is None:
            raise ConfigError(
                f"ctc is {training.ctc}, and the model has no CTC head; set ctc_head in its "
                "configuration, or ctc 0"
            )
        parts: dict[str, nn.Module] = {"transducer": transducer}
        self._simple: SimpleJoiner | None = None
        if training.window and training.simple:
            self._simple = SimpleJoiner(cfg.d_joint, cfg.vocab_size).to(transducer.device)
            parts["simple"] = self._simple
        self.model: nn.Module = nn.ModuleDict(parts)
        self.batches, self.training, self.dev, self.seed = batches, training, dev, seed
        self._transducer, self._warn, self._teacher = transducer, LeftOutWarning(), teacher

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        """Add shard `shard`'s share of step `step`'s gradient; returns sums over its utterances.

        loss: nats of the transducer, pruned where the training is; loss_simple, loss_ctc: of the
        others that take part; all over `targets` tokens. infeasible: utterances with more tokens
        than frames, left out. tokens: feature frames. DataError: no utterance has a loss.
        """
        batch = self.batches.batch(step, shard, num_shards)
        weights, device = self.training.weights(step), self._transducer.device
        with seeded(device, self.seed, step, shard) as generator, self._autocast():
            heard = _Heard.of(*self._encode(batch, step, generator), batch.targets)
            if not heard.targets:
                raise DataError(
                    f"step {step}, shard {shard}: every text has more tokens than its audio has "
                    "frames; use a lower time_reduction, longer tokens, or leave these out"
                )
            nll, simple = self._transducer_nll(heard)
            ctc = self._ctc_loss(heard, batch) if weights.ctc else torch.zeros_like(nll)
        if heard.infeasible:
            self._warn(step, heard.infeasible)
        num_targets = sum(map(len, heard.targets))
        total = num_targets if batch.total_targets is None else batch.total_targets
        loss = weights.transducer * nll + weights.simple * simple + weights.ctc * ctc
        (loss.sum() / max(1, total)).backward()  # type: ignore[no-untyped-call]
        return {
            "loss": float(nll.detach().sum()),
            "loss_simple": float(simple.detach().sum()),
            "loss_ctc": float(ctc.detach().sum()),
            "targets": num_targets,
            "tokens": int(batch.lengths.sum()),
            "audio_s": batch.audio_seconds,
            "infeasible": heard.infeasible,
        }

    def _autocast(self) -> torch.autocast:
        return autocast(self._transducer.device, self.training.autocast)

    def _chunking(self, step: int, batch: SpeechBatch) -> Chunking:
        """The step's; not a function of the shard, or some processes would wait for others."""
        cfg, chunks = self._transducer.config, self.training.chunks
        if not chunks:
            return cfg.chunking
        chunk = chunks[int(np.random.default_rng((self.seed, step)).integers(len(chunks)))]
        if chunk == 0:  # as one chunk that has nothing around it
            return Chunking(max(1, cfg.output_frames(int(batch.lengths.max()))), 0)
        return replace(cfg.chunking, chunk=chunk)

    def _encode(
        self, batch: SpeechBatch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(encoder output, true frames) with all that is random in training."""
        encoder, augment = self._transducer.encoder, self.training.augment
        features, lengths = (x.to(self._transducer.device) for x in (batch.features, batch.lengths))
        if augment is not None:
            # What is hidden becomes 0, which is to be the mean.
            mean = encoder.feature_norm.mean
            features = augment(features - mean, lengths, generator) + mean
        encoded, frames = encoder(features, lengths, self._chunking(step, batch))
        return encoded, frames

    def _transducer_nll(self, heard: _Heard) -> tuple[Tensor, Tensor]:
        """(nats of the transducer, of the additive joiner, 0 where there is none), both [B]."""
        cfg, model = self.training, self._transducer
        if cfg.window:
            return _pruned_nll(model, self._simple, heard, cfg.window, cfg.fastemit)
        nll = _exact_nll(model, heard, cfg.fastemit)
        return nll, torch.zeros_like(nll)

    def _ctc_loss(self, heard: _Heard, batch: SpeechBatch) -> Tensor:
        """What the CTC head learns, [B]: the text and, where there is one, the teacher."""
        nll, share = self._ctc_nll(heard), self.training.distill
        if self._teacher is None:
            return nll
        theirs = _last_exit(self._teacher, batch).to(nll.device)[heard.rows]
        ours = self._transducer.ctc_log_probs(heard.encoded)
        frames = min(theirs.shape[1], ours.shape[1])
        lengths = heard.frames.clamp(max=frames)
        taught = divergence(theirs[:, :frames], ours[:, :frames], lengths)
        return (1 - share) * nll + share * taught

    def _ctc_nll(self, heard: _Heard) -> Tensor:
        """Nats of the CTC head, [B]."""
        model = self._transducer
        log_probs = model.ctc_log_probs(heard.encoded)[None]
        return ctc_nll(log_probs, heard.frames, heard.targets, model.config.blank_id)[0]

    # -- evaluation --------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Over the dev batches, in the model's own chunks: nats per token over all paths, token
        error rate of greedy search; the same of the CTC head, if there is one.

        Texts with more tokens than frames count as errors, not in the loss; `infeasible` says
        how many there are. Empty without dev batches.
        """
        sums: dict[str, float] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self.dev:
                for name, value in self._scores(batch).items():
                    sums[name] = sums.get(name, 0.0) + value
        finally:
            self.model.train(was_training)
        if not self.dev:
            return {}
        scored, targets = max(1.0, sums.pop("scored")), max(1.0, sums.pop("targets"))
        per = {"infeasible": 1.0, "loss": scored, "loss_ctc": scored}
        return {name: value / per.get(name, targets) for name, value in sums.items()}

    def _scores(self, batch: SpeechBatch) -> dict[str, float]:
        """Sums over a dev batch: nats over `scored` tokens, errors in `targets`."""
        model, said = self._transducer, batch.targets
        encoded, frames = model.encoder(batch.features.to(model.device), batch.lengths)
        heard = _Heard.of(encoded, frames, said)
        found: dict[str, float] = {
            "scored": sum(map(len, heard.targets)),
            "targets": sum(map(len, said)),
            "infeasible": heard.infeasible,
            "loss": float(_exact_nll(model, heard).sum()) if heard.targets else 0.0,
            "token_error_rate": token_edits(self._search(encoded, frames), said),
        }
        if model.ctc_head is not None:
            written = greedy(model.ctc_log_probs(encoded), frames, model.config.blank_id)
            found["loss_ctc"] = float(self._ctc_nll(heard).sum()) if heard.targets else 0.0
            found["token_error_rate_ctc"] = token_edits([h.tokens for h in written], said)
        return found

    def _search(self, encoded: Tensor, frames: Tensor) -> list[tuple[int, ...]]:
        """What greedy search writes of each utterance."""
        model = self._transducer
        search = TransducerSearch(model.predictor, model.joiner, model.config.blank_id)
        states = [search.start(model.device)] * len(encoded)
        return [search.best(state)[0].tokens for state in search.step(states, encoded, frames)]


def _check_teacher(teacher: EncoderConfig, student: TransducerConfig) -> None:
    """ConfigError: its posteriors are not of the student's frames or tokens."""
    theirs = (teacher.subsampling, teacher.vocab_size, teacher.blank_id, teacher.num_mels)
    ours = (student.time_reduction, student.vocab_size, student.blank_id, student.num_mels)
    names = ("feature frames per frame", "vocab_size", "blank_id", "num_mels")
    for name, their, our in zip(names, theirs, ours, strict=True):
        if their != our:
            raise ConfigError(f"{name}: the teacher has {their}, the model {our}; they must agree")
