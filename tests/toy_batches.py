"""Speech for training tests: random features with random texts, a pure function of the step."""

from __future__ import annotations

import torch
from torch import Tensor

import toy_encoder
from offramp.train.ctc import SpeechBatch
from offramp.train.speech_lm import SpeechLMTask
from offramp.train.transducer import TransducerTask


def speech(seed: int, lengths: tuple[int, ...], vocab_size: int) -> SpeechBatch:
    """Random features of `lengths` frames, three tokens each."""
    x, n = toy_encoder.features(list(lengths), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size, (len(lengths), 3), generator=generator)
    return SpeechBatch(x, n, ids.tolist(), sum(lengths) / 100)


class Batches:
    """Another batch in every step; rows go to the shards in turns."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int) -> None:
        self._lengths, self._vocab_size = lengths, vocab_size

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        whole = speech(1000 + step, self._lengths, self._vocab_size)
        mine = slice(shard, None, num_shards)
        x, n, targets = whole.features[mine], whole.lengths[mine], whole.targets[mine]
        total = sum(map(len, whole.targets))
        return SpeechBatch(x, n, targets, float(n.sum()) / 100, total_targets=total)


class Fixed:
    """The same batch in every step."""

    def __init__(self, batch: SpeechBatch) -> None:
        self._batch = batch

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        return self._batch


def gradient(of: SpeechLMTask | TransducerTask, part: str = "") -> Tensor:
    """All gradients of `part` as one vector, and none left behind."""
    found = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for name, p in of.model.named_parameters()
        if name.startswith(part)
    ]
    of.model.zero_grad()
    return torch.cat(found)
