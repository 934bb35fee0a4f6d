"""Batches of tokens as a pure function of the step: nothing to save, nothing to lose on resume.

`TokenWindows` cuts one long stream into windows; `PromptCompletions` pads pairs of similar
length and puts the loss on the completion only. Each epoch has its own order, drawn from
(seed, epoch). A step's batch is split into shards, one per process and accumulation step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.errors import ConfigError, DataError

IGNORE = -100


@dataclass(frozen=True)
class TokenBatch:
    """tokens [B, T]; targets [B, T]: the next token or IGNORE; targets in all the step's shards."""

    tokens: Tensor
    targets: Tensor
    total_targets: int


class TokenBatches(Protocol):
    """Batches by step, the same in every process."""

    def batch(self, step: int, shard: int, num_shards: int) -> TokenBatch: ...


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _shard(rows: Sequence[int], shard: int, num_shards: int) -> list[int]:
    if len(rows) % num_shards:
        raise ConfigError(
            f"a batch of {len(rows)} does not split into {num_shards} shards; "
            "choose batch_size as a multiple of the number of shards"
        )
    return list(rows[shard::num_shards])


class TokenWindows:
    """Windows of `seq_len` + 1 tokens over one stream; each epoch starts at another offset."""

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int) -> None:
        self._tokens, self._seq_len = tokens, seq_len
        self._batch_size, self._seed = batch_size, seed
        self._count = (len(tokens) - seq_len - 1) // seq_len
        if self._count < batch_size:
            raise DataError(
                f"the text has {len(tokens)} tokens; a batch of {batch_size} windows of "
                f"{seq_len} needs {(batch_size + 1) * seq_len + 1}: give more text "
                "or smaller batches"
            )

    def batch(self, step: int, shard: int, num_shards: int) -> TokenBatch:
        per_epoch = self._count // self._batch_size
        epoch, index = divmod(step, per_epoch)
        order = _order(self._count, self._seed, epoch)
        offset = int(np.random.default_rng((self._seed, epoch, 1)).integers(self._seq_len))
        rows = order[index * self._batch_size : (index + 1) * self._batch_size].tolist()
        windows = np.stack(
            [
                self._tokens[offset + r * self._seq_len :][: self._seq_len + 1]
                for r in _shard(rows, shard, num_shards)
            ]
        )
        data = torch.from_numpy(windows.astype(np.int64))
        return TokenBatch(data[:, :-1], data[:, 1:], self._batch_size * self._seq_len)


class PromptCompletions:
    """(prompt, completion) pairs, batched with others of similar length, padded on the right."""

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        batch_size: int,
        pad_id: int,
        seed: int,
    ) -> None:
        if len(pairs) < batch_size:
            raise DataError(f"{len(pairs)} pairs do not fill a batch of {batch_size}; give more")
        self._pairs, self._batch_size, self._pad_id, self._seed = pairs, batch_size, pad_id, seed
        self._lengths = np.array([len(p) + len(c) for p, c in pairs])
        self._epoch: tuple[int, list[list[int]]] | None = None

    def _batches(self, epoch: int) -> list[list[int]]:
        """Rows of each batch of the epoch: shuffled, sorted by length within a pool, shuffled."""
        if self._epoch is None or self._epoch[0] != epoch:
            order, size = _order(len(self._pairs), self._seed, epoch), self._batch_size
            pool = size * 32
            batches = []
            for at in range(0, len(order), pool):
                rows = order[at : at + pool]
                rows = rows[np.argsort(self._lengths[rows], kind="stable")]
                batches += [rows[i : i + size].tolist() for i in range(0, len(rows), size)]
            batches = [b for b in batches if len(b) == size]
            shuffled = np.random.default_rng((self._seed, epoch, 1)).permutation(len(batches))
            self._epoch = epoch, [batches[i] for i in shuffled]
        return self._epoch[1]

    def batch(self, step: int, shard: int, num_shards: int) -> TokenBatch:
        # All pools but the last are whole batches, so every epoch has as many.
        epoch, index = divmod(step, len(self._pairs) // self._batch_size)
        rows = self._batches(epoch)[index]
        total = sum(len(self._pairs[r][1]) for r in rows)
        mine = [self._pairs[r] for r in _shard(rows, shard, num_shards)]
        width = max(len(p) + len(c) for p, c in mine) - 1
        tokens = torch.full((len(mine), width), self._pad_id)
        targets = torch.full((len(mine), width), IGNORE)
        for row, (prompt, completion) in enumerate(mine):
            both = torch.tensor([*prompt, *completion])
            tokens[row, : len(both) - 1] = both[:-1]
            targets[row, len(prompt) - 1 : len(both) - 1] = both[len(prompt) :]
        return TokenBatch(tokens, targets, total)


def pack(lengths: Sequence[float], limit: float) -> list[list[int]]:
    """Neighbours together while the batch, padded to its longest, fits `limit`; their indices.

    An item longer than `limit` is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0.0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if not batches or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
            longest = length
        batches[-1].append(index)
    return batches


def windows(
    tokens: np.ndarray, seq_len: int, batch_size: int, limit: int | None = None
) -> list[TokenBatch]:
    """The stream in order, every token a target once (but the first), for evaluation.

    The last window may be shorter. limit: tokens to read at most.
    """
    stream = torch.from_numpy(tokens[: None if limit is None else limit + 1].astype(np.int64))
    whole = (len(stream) - 1) // seq_len
    body = stream[: whole * seq_len].view(whole, seq_len)
    goal = stream[1 : whole * seq_len + 1].view(whole, seq_len)
    pairs = [*zip(torch.split(body, batch_size), torch.split(goal, batch_size), strict=True)]
    if len(stream) - 1 > whole * seq_len:
        pairs.append((stream[None, whole * seq_len : -1], stream[None, whole * seq_len + 1 :]))
    return [TokenBatch(x, y, y.numel()) for x, y in pairs if x.numel()]
