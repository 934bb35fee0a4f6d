"""Minimum word error rate training of a Speech-LM, from the N-best list of its prefix beam.

J = sum over texts i of P_i (W_i - mean W) beside the cross-entropy of what was said, where W_i are
word errors and P_i the probabilities that head 1 gives the texts, so normalised that the list's
sum to 1 (Prabhavalkar et al., arXiv 1712.01818; with several heads: arXiv 2409.08148). The list is
searched without gradients and its texts are read again, all in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from offramp.config import check_counts, check_positive
from offramp.decoding.exit_policies import edit_distance
from offramp.decoding.prefix_beam import PrefixBeam, prefix_beam
from offramp.decoding.tower_beam import TextHypothesis, log_softmax
from offramp.errors import ConfigError
from offramp.models.speech_lm import Heard, SpeechLM
from offramp.nn.tower import Tower
from offramp.train.ctc import SpeechBatch, SpeechBatches
from offramp.train.speech_lm import SpeechLMTask, SpeechLMTraining


@dataclass(frozen=True)
class MWERTraining(SpeechLMTraining):
    """Settings of the method beside those of plain training, whose `head_weights` now weigh the
    cross-entropy: 0.01 to 0.1 is usual.

    mwer: weight of the word errors. n_best: texts per utterance at most. beam_size, max_tokens: of
    the search. with_reference: what was said joins a list that lacks it.
    """

    mwer: float = 1.0
    n_best: int = 4
    beam_size: int = 4
    max_tokens: int = 200
    with_reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(mwer=self.mwer)
        check_counts(2, n_best=self.n_best)
        check_counts(1, beam_size=self.beam_size, max_tokens=self.max_tokens)

    def fitted(self, model: SpeechLM) -> tuple[float, ...]:
        weights = super().fitted(model)
        if {"encoder", "projector", "decoder"} <= set(self.freeze):
            raise ConfigError(
                f"freeze is {', '.join(self.freeze)}, and word errors teach only what head 1 "
                "reads; let the encoder, the projector or the decoder learn"
            )
        return weights


def mwer_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """Expected word errors less their plain mean, [], of the N texts of one list.

    scores: log probabilities [N]; errors: [N]. The mean changes no gradient, which is
    P_i (W_i - sum of P W), but its variance.
    """
    return (scores.softmax(-1) * (errors - errors.mean())).sum()


def text_scores(tower: Tower, hidden: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Head 1's log probability of each text, its end included if it has one: [N].

    hidden: [N, U, D], the top layer's states that predict its tokens; what lies behind the end of
    a shorter text has no effect.
    """
    rows = [torch.tensor(text, device=hidden.device) for text in texts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=-1)
    log_probs = log_softmax(tower.logits(hidden, tower.config.num_layers))
    chosen = log_probs.gather(2, tokens.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(tokens < 0, 0.0).sum(1)


class MWERTask(SpeechLMTask):
    """Implements `train.loop.Task`: plain training, and word errors on top of it."""

    def __init__(
        self,
        model: SpeechLM,
        batches: SpeechBatches,
        decode: Callable[[Sequence[int]], str],
        training: MWERTraining,
        seed: int,
        dev: Sequence[SpeechBatch] = (),
    ) -> None:
        """decode: tokens to the text whose words are compared; special tokens write nothing."""
        self._newest = _Newest(batches)
        super().__init__(model, self._newest, training, seed, dev)
        self._mwer, self._decode = training, decode

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        """As in plain training, and of the lists: expected_errors, best_errors (of the text in
        each that has the fewest) and words, all summed over the utterances."""
        sums = super().backward(step, shard, num_shards)
        return {**sums, **self._word_errors(self._newest.made)}

    def _word_errors(self, batch: SpeechBatch) -> dict[str, float]:
        """Add the gradient of the word errors. The model hears and writes as in use."""
        model = self._speech_lm
        mine = sum(map(len, batch.targets))
        total = mine if batch.total_targets is None else batch.total_targets
        scale = self._mwer.mwer / max(1, total)
        sums = {"expected_errors": 0.0, "best_errors": 0.0, "words": 0.0}
        model.eval()
        try:
            with self._autocast():
                features, lengths = batch.features, batch.lengths
                heard = model.hear(features.to(model.device), lengths.to(model.device), ())
            # One utterance's list at a time, and then all of them through the encoder at once.
            leaves = [a.detach().requires_grad_(a.requires_grad) for a in heard.audio]
            for leaf, said in zip(leaves, batch.targets, strict=True):
                found = self._utterance(replace(heard, audio=[leaf]), said, scale)
                sums = {name: value + found[name] for name, value in sums.items()}
        finally:
            self._learn()
        pairs = [
            (a, x.grad) for a, x in zip(heard.audio, leaves, strict=True) if x.grad is not None
        ]
        if pairs:
            torch.autograd.backward([a for a, _ in pairs], [grad for _, grad in pairs])
        return sums

    def _utterance(self, heard: Heard, said: Sequence[int], scale: float) -> dict[str, float]:
        """heard: of one utterance."""
        model = self._speech_lm
        texts, words = self.n_best(heard, said), self._decode(said).split()
        errors = [edit_distance(self._decode(text).split(), words) for text in texts]
        with self._autocast():
            many = replace(heard, audio=heard.audio * len(texts))
            hidden = model.read(many, [text[:-1] for text in texts])
            scores = text_scores(model.decoder, hidden, texts)
        weights = torch.tensor(errors, dtype=scores.dtype, device=scores.device)
        if len(set(errors)) > 1:  # else there is nothing to learn
            (scale * mwer_loss(scores, weights)).backward()  # type: ignore[no-untyped-call]
        expected = float((scores.detach().softmax(-1) * weights).sum())
        return {"expected_errors": expected, "best_errors": min(errors), "words": len(words)}

    def n_best(self, heard: Heard, said: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of texts that differ in their words, at least one, ended or cut off.

        heard: of one utterance; said: the tokens of what was said in it.
        """
        model, cfg = self._speech_lm, self._mwer
        (prefix,) = model.prefixes(heard)
        ends = frozenset(model.config.decoder.eos_ids)
        room = model.config.decoder.max_positions - len(prefix)
        beam = PrefixBeam(min(cfg.max_tokens, room), ends, cfg.beam_size, cfg.n_best)
        decoder, first = model.decoder, [model.first_token]
        found: list[TextHypothesis] = prefix_beam(
            decoder, model.heads, first, beam, prefix.detach()
        )
        texts = {tuple(self._decode(h.tokens).split()): h.tokens for h in reversed(found)}
        if cfg.with_reference:
            texts.setdefault(tuple(self._decode(said).split()), (*said, self._eos))
        return list(texts.values())


class _Newest:
    """The batches, and the newest of them, which is asked for once."""

    def __init__(self, batches: SpeechBatches) -> None:
        self._batches = batches
        self.made: SpeechBatch

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        self.made = self._batches.batch(step, shard, num_shards)
        return self.made
