"""Training a Speech-LM, whole or in parts, for `train/loop.py`.

The decoder learns to write the text after the audio, its heads the tokens after the next one
(train/multi_token.py), and the encoder's CTC, which is to draft, the same tokens at every exit;
exits of the decoder that are to draft learn what its last layer does (LayerSkip, arXiv 2404.16710).
What is frozen neither learns nor drops out: with all but the heads frozen, what the model writes
cannot change. Everything random is a function of (seed, step, shard).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from offramp.config import check_choice, check_range, check_share
from offramp.data.batching import IGNORE
from offramp.decoding.ctc import greedy
from offramp.decoding.drafts import Draft, NoDraft
from offramp.decoding.heads_draft import HeadsDraft
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import RowEnd, Stop
from offramp.errors import ConfigError
from offramp.models.hf_ctc import PretrainedCTCEncoder
from offramp.models.speech_lm import Heard, SpeechLM
from offramp.nn.tower import TruncatedTower
from offramp.train.augment import SpecAugment
from offramp.train.ctc import (
    LeftOutWarning,
    SpeechBatch,
    SpeechBatches,
    autocast,
    ctc_nll,
    feasible,
    seeded,
    token_edits,
)
from offramp.train.multi_token import multi_token_backward, multi_token_sums

PARTS = ("encoder", "projector", "decoder", "heads")


@dataclass(frozen=True)
class SpeechLMTraining:
    """The settings of the method.

    head_weights: of heads 1 to K; empty: 1 for each. ctc: weight of CTC, the mean over the
    encoder's exits, beside the decoder's 1. decoder_exits: early exits of the decoder that learn
    too, each with weight early_exit_scale. token_noise: share of the text read that is replaced by
    random tokens, so that the decoder listens, and goes on after mistakes of its own; what it is to
    write stays. freeze: parts, of `PARTS`, that stay as they are.
    augment: SpecAugment, or None. autocast: "bf16" for mixed precision, or "none".
    """

    head_weights: tuple[float, ...] = ()
    ctc: float = 0.3
    decoder_exits: tuple[int, ...] = ()
    early_exit_scale: float = 0.1
    token_noise: float = 0.0
    freeze: tuple[str, ...] = ()
    augment: SpecAugment | None = None
    autocast: str = "none"

    def __post_init__(self) -> None:
        for weight in self.head_weights:
            check_range(0, head_weights=weight)
        check_range(0, ctc=self.ctc, early_exit_scale=self.early_exit_scale)
        check_choice(autocast=(self.autocast, ("bf16", "none")))
        check_share(token_noise=self.token_noise)
        for part in self.freeze:
            check_choice(freeze=(part, PARTS))
        if self.ctc and "encoder" in self.freeze:
            raise ConfigError(
                f"ctc is {self.ctc}, and the encoder, which would learn from it, is frozen; set "
                "ctc to 0"
            )

    def fitted(self, model: SpeechLM) -> tuple[float, ...]:
        """The weights of the heads that `model` has; ConfigError: the settings are not for it."""
        count = 1 if model.heads is None else model.heads.config.count
        weights = self.head_weights or (1.0,) * count
        if len(weights) != count:
            raise ConfigError(
                f"head_weights are {len(weights)} for {count} heads; give each one, the decoder's "
                "own first"
            )
        layers = model.config.decoder.num_layers
        for exit_layer in self.decoder_exits:
            if not 1 <= exit_layer < layers:
                raise ConfigError(
                    f"decoder_exits are {self.decoder_exits}, and the decoder has {layers} layers; "
                    f"give exits from 1 to {layers - 1}"
                )
        parts = [part for part in PARTS if part != "heads" or model.heads is not None]
        if not set(parts) - set(self.freeze):
            raise ConfigError(f"freeze names all that the model has, {', '.join(parts)}")
        if self.ctc and model.config.ctc_exit is None:
            raise ConfigError(
                f"ctc is {self.ctc}, and the encoder's CTC does not write the decoder's tokens; "
                "set ctc to 0, or ctc_exit to the exit that is to draft"
            )
        encoder = model.encoder
        raw = isinstance(encoder, PretrainedCTCEncoder) and encoder.config.input_size is None
        if raw and self.augment is not None:
            raise ConfigError(
                "augment masks features, and this model reads samples; set augment to None"
            )
        return weights


def next_tokens(texts: Sequence[Sequence[int]], eos: int, device: torch.device) -> Tensor:
    """What follows each position that reads a text: its tokens, then `eos`; int64 [B, U + 1].

    IGNORE behind the end of a shorter text.
    """
    rows = [torch.tensor([*text, eos], device=device) for text in texts]
    return pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def noisy(
    text: Sequence[int], share: float, num_tokens: int, generator: torch.Generator
) -> list[int]:
    """`text` with about that share of its tokens replaced by any others; whole for share 0."""
    if not share:
        return list(text)
    replaced = torch.rand(len(text), generator=generator) < share
    other = torch.randint(num_tokens, (len(text),), generator=generator)
    return torch.where(replaced, other, torch.tensor(text, dtype=torch.long)).tolist()


class SpeechLMTask:
    """Implements `train.loop.Task` for a Speech-LM over batches of speech, in its tokens."""

    def __init__(
        self,
        model: SpeechLM,
        batches: SpeechBatches,
        training: SpeechLMTraining,
        seed: int,
        dev: Sequence[SpeechBatch] = (),
    ) -> None:
        self._weights = training.fitted(model)
        self.model: nn.Module = model
        self.batches, self.training, self.dev, self.seed = batches, training, dev, seed
        self._speech_lm, self._warn = model, LeftOutWarning()
        for name, part in model.named_children():
            part.requires_grad_(name not in training.freeze)
        self._learn()

    def _learn(self) -> None:
        """Training mode, but for what is frozen."""
        for name, part in self._speech_lm.named_children():
            part.train(name not in self.training.freeze)

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        """Add shard `shard`'s share of step `step`'s gradient; returns sums over its utterances.

        loss: nats of the texts and their ends; loss_head_k: of what head k is to predict of them;
        loss_decoder_exit_k: of the decoder's exit k; loss_exit_k: of CTC at exit k; all over
        `targets` tokens, ends not counted. infeasible: utterances with more tokens than frames,
        which CTC leaves out. tokens: feature frames.
        """
        batch = self.batches.batch(step, shard, num_shards)
        model, cfg = self._speech_lm, self.training
        num_targets = sum(map(len, batch.targets))
        scale = 1.0 / max(1, num_targets if batch.total_targets is None else batch.total_targets)
        with seeded(model.device, self.seed, step, shard) as generator, self._autocast():
            heard = self._hear(batch, generator)
            nats, below = self._texts_backward(heard, batch.targets, generator, scale)
            ctc = self._ctc_nll(heard, batch) if cfg.ctc else {}
        if ctc:
            mean = torch.stack([nll.sum() for nll in ctc.values()]).mean()
            below.append((cfg.ctc * scale * mean, torch.ones_like(mean)))
        if below:
            torch.autograd.backward([found for found, _ in below], [grad for _, grad in below])
        infeasible = len(batch.targets) - len(feasible(heard.frames, batch.targets))
        if infeasible and cfg.ctc:
            self._warn(step, infeasible)
        return {
            **nats,
            "targets": num_targets,
            "tokens": int(batch.lengths.sum()),
            "audio_s": batch.audio_seconds,
            "infeasible": infeasible,
            **{f"loss_exit_{e}": float(nll.detach().sum()) for e, nll in ctc.items()},
        }

    def _texts_backward(
        self,
        heard: Heard,
        texts: Sequence[Sequence[int]],
        generator: torch.Generator,
        scale: float,
    ) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
        """Add the gradient of the heads and exits above the states that the decoder reads.

        Returns (nats by name, each of these states with its gradient). They are copies, head by
        head: all that lies below is then passed once.
        """
        model, cfg = self._speech_lm, self.training
        decoder, last = model.decoder, model.config.decoder.num_layers
        tokens = model.config.decoder.vocab_size
        seen = [noisy(text, cfg.token_noise, tokens, generator) for text in texts]
        hidden = model.read_exits(heard, seen, {*cfg.decoder_exits, last})
        targets = next_tokens(texts, self._eos, model.device)
        nats, below = dict[str, float](), []
        for e, h in hidden.items():
            tower = TruncatedTower(decoder, e)
            heads = model.heads if e == last else None
            weights = self._weights if e == last else (cfg.early_exit_scale,)
            sums, gradient = multi_token_backward(tower, heads, h, targets, weights, scale)
            name = "loss" if e == last else f"loss_decoder_exit_{e}"
            nats |= {name if k == 1 else f"loss_head_{k}": f.nats for k, f in enumerate(sums, 1)}
            if gradient is not None:
                below.append((h, gradient))
        return nats, below

    @property
    def _eos(self) -> int:
        """Which of the tokens that end a text the decoder learns to write."""
        return self._speech_lm.config.decoder.eos_ids[0]

    def _autocast(self) -> torch.autocast:
        return autocast(self._speech_lm.device, self.training.autocast)

    def _hear(self, batch: SpeechBatch, generator: torch.Generator | None) -> Heard:
        """generator: of what is random in training; None: nothing is."""
        model, augment, features = self._speech_lm, self.training.augment, batch.features
        if generator is not None and augment is not None:
            features = augment(features, batch.lengths, generator)
        exits = model.encoder.config.exits if generator is not None and self.training.ctc else None
        return model.hear(features.to(model.device), batch.lengths.to(model.device), exits)

    def _ctc_nll(self, heard: Heard, batch: SpeechBatch) -> dict[int, Tensor]:
        """Nats of each exit that was read, over the utterances that CTC can write."""
        kept = feasible(heard.frames, batch.targets)
        texts, frames = [batch.targets[row] for row in kept], heard.frames[kept]
        log_probs = torch.stack([heard.exits[e][kept] for e in heard.exits])
        blank_id = self._speech_lm.encoder.config.blank_id
        nll = ctc_nll(log_probs, frames, texts, blank_id) if kept else log_probs.sum((2, 3))
        return dict(zip(heard.exits, nll, strict=True))

    # -- evaluation --------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Over the dev batches; empty without any.

        With the text so far as it was said: for each head nats per token to predict, and the share
        that it gets right (of head 1: loss, accuracy). Of what greedy decoding writes: token error
        rate, and tokens emitted per call of the decoder, which the heads draft for. Of the CTC that
        drafts, if any: nats per token, greedy token error rate, and how many texts are infeasible,
        with more tokens than frames, which count as its errors and not in its loss.
        """
        sums: dict[str, list[float]] = {}
        self._speech_lm.eval()
        try:
            for batch in self.dev:
                for name, score in self._scores(batch).items():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[:] = (a + b for a, b in zip(total, score, strict=True))
        finally:
            self._learn()
        return {name: value / max(1.0, count) for name, (value, count) in sums.items()}

    def _scores(self, batch: SpeechBatch) -> dict[str, tuple[float, int]]:
        """Of a dev batch: name -> (sum, what it is to be divided by; 0: nothing)."""
        model = self._speech_lm
        heard = self._hear(batch, None)
        targets = next_tokens(batch.targets, self._eos, model.device)
        hidden = model.read(heard, batch.targets)
        heads = multi_token_sums(model.decoder, model.heads, hidden, targets)
        found = self._written(heard, batch)
        for k, head in enumerate(heads, 1):
            name = "" if k == 1 else f"_head_{k}"
            found[f"loss{name}"] = head.nats, head.targets
            found[f"accuracy{name}"] = head.hits, head.targets
        if heard.ctc_log_probs is not None:
            found |= self._ctc_scores(heard, heard.ctc_log_probs, batch)
        return found

    def _written(self, heard: Heard, batch: SpeechBatch) -> dict[str, tuple[float, int]]:
        """Scores of what the decoder writes greedily."""
        model, said = self._speech_lm, batch.targets
        cfg, prompts = model.config.decoder, [[model.first_token]] * len(said)
        # Twice as long as what was said, a text is wrong whatever follows.
        rooms = [max(1, model.room(n)) for n in batch.lengths.tolist()]
        longest = [min(2 * len(t) + 10, room) for t, room in zip(said, rooms, strict=True)]
        ends = [RowEnd(Stop(n, frozenset(cfg.eos_ids)), None) for n in longest]
        chooser = Chooser(Sampling(), prompts, range(len(said)), cfg.vocab_size, model.device)
        draft, k = self._draft()
        written: list[list[int]] = [[] for _ in said]
        calls = 0
        prefixes = model.prefixes(heard)
        for step in speculate(model.decoder, prompts, draft, k, chooser, ends, prefixes):
            written[step.row] += step.tokens
            calls += 1  # one for each row that takes part
        texts = [[t for t in row if t not in cfg.eos_ids] for row in written]
        return {
            "token_error_rate": (token_edits(texts, said), sum(map(len, said))),
            "mean_accepted_length": (sum(map(len, written)), calls),
        }

    def _draft(self) -> tuple[Draft, int]:
        """(what drafts for the decoder, how many tokens)."""
        heads = self._speech_lm.heads
        if heads is None:
            return NoDraft(), 0
        return HeadsDraft(heads), heads.num_future_tokens

    def _ctc_scores(
        self, heard: Heard, log_probs: Tensor, batch: SpeechBatch
    ) -> dict[str, tuple[float, int]]:
        said = batch.targets
        kept = feasible(heard.frames, said)
        (nll,) = self._ctc_nll(heard, batch).values()
        written = greedy(log_probs, heard.frames, self._speech_lm.encoder.config.blank_id)
        return {
            "loss_ctc": (float(nll.sum()), sum(len(said[row]) for row in kept)),
            "token_error_rate_ctc": (
                token_edits([w.tokens for w in written], said),
                sum(map(len, said)),
            ),
            "infeasible": (len(said) - len(kept), 0),
        }
