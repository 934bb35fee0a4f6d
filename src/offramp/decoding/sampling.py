"""How a token is chosen from logits: one rule for drafts and target, for one position or many.

Randomness is keyed by (seed, row, position): the Gumbel noise of a position is the same
whoever asks, so a sampled token is a function of the logits alone, like an argmax. A draft that
sees the same logits draws the same token, verification is a comparison in sampling as in greedy
decoding, and with one seed speculative sampling writes the very text that plain sampling
writes (Gumbel-max coupling; arXiv 2408.07978). The usual accept-reject rule (arXiv 2211.17192)
only promises the same distribution.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import InputError
from offramp.nn.device import upload


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 do nothing.

    Filters act in this order: repetition penalty (CTRL, arXiv 1909.05858: over prompt and text
    so far), temperature, top-k, top-p (nucleus, arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty}; it must be greater than 0"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}; it must be at least 0 and less than 2^31")


class Chooser:
    """Chooses tokens for the rows of a batch; knows each row's text so far and its noise."""

    def __init__(
        self,
        sampling: Sampling,
        texts: Sequence[Sequence[int]],
        rows: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """texts: prompt tokens per row; rows: the number that keys each row's noise."""
        self._sampling, self._device, self._vocab_size = sampling, device, vocab_size
        self._rows = list(rows)
        self._noise: dict[tuple[int, int], Tensor] = {}
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
            for row, text in enumerate(texts):
                self._seen[row, upload(list(text), device)] = True

    def choose(self, logits: Tensor, positions: Sequence[int], drafted: Tensor | None) -> Tensor:
        """Logits [B, T, V] -> tokens [B, T], without waiting for the device.

        positions: of the first of the T tokens to choose, per row, counted from the start of
        the prompt. drafted [B, n]: tokens after the text so far; column t has seen all but the
        last T - 1 - t of them.
        """
        s = self._sampling
        if s.temperature == 0.0 and self._seen is None:
            return logits.argmax(-1)
        x = logits.float()
        if self._seen is not None:
            x = _penalise(x, self._seen_by_column(x.shape[1], drafted), s.repetition_penalty)
        if s.temperature == 0.0:
            return x.argmax(-1)
        # Less its maximum, so that a tiny temperature gives -inf, never +inf.
        x = (x - x.amax(-1, keepdim=True)) / s.temperature
        x = keep_top(x, s.top_k, s.top_p)
        return (x + self._gumbel(positions, x.shape[1])).argmax(-1)

    def commit(self, row: int, tokens: Sequence[int], length: int) -> None:
        """Row `row` has emitted `tokens` and is now `length` tokens long."""
        if self._seen is not None and tokens:
            self._seen[row, upload(list(tokens), self._device)] = True
        key = self._rows[row]
        for old in [k for k in self._noise if k[0] == key and k[1] < length]:
            del self._noise[old]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but `rows`."""
        self._rows = [self._rows[r] for r in rows]
        self._noise = {k: noise for k, noise in self._noise.items() if k[0] in self._rows}
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def _seen_by_column(self, columns: int, drafted: Tensor | None) -> Tensor:
        assert self._seen is not None
        seen = self._seen[:, None].repeat(1, columns, 1)
        if drafted is not None:
            for t in range(columns):
                seen[:, t].scatter_(1, drafted[:, : drafted.shape[1] - columns + 1 + t], True)
        return seen

    def _gumbel(self, positions: Sequence[int], columns: int) -> Tensor:
        """Standard Gumbel noise [B, columns, V], a function of (seed, row, position)."""
        return torch.stack(
            [
                torch.stack([self._noise_at(row, first + t) for t in range(columns)])
                for row, first in zip(self._rows, positions, strict=True)
            ]
        )

    def _noise_at(self, row: int, position: int) -> Tensor:
        key = (row, position)
        if key not in self._noise:
            # A hash, because a CPU generator reads only 32 bits of its seed: no sum or product
            # of the three would keep their combinations apart.
            name = f"{self._sampling.seed} {row} {position}".encode()
            mixed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")
            generator = torch.Generator(self._device).manual_seed(mixed)
            noise = torch.empty(self._vocab_size, device=self._device)
            self._noise[key] = -noise.exponential_(generator=generator).log()
        return self._noise[key]


def keep_top(x: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [..., V] with all but the top_k, then all outside the top_p nucleus, set to -inf."""
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k, dim=-1).values[..., -1:], -math.inf)
    if top_p < 1.0:
        values, order = x.sort(dim=-1, descending=True)
        p = values.softmax(-1)
        # A token stays while the mass before it is less than top_p: the first always does.
        outside = p.cumsum(-1) - p >= top_p
        x = x.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return x


def _penalise(x: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
