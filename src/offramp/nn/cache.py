"""The key/value cache: allocated once, an explicit argument, with its own length per row and layer.

Lengths live on the host as tuples of ints, so that reading or truncating them never waits for
a device. A truncation only moves the length: what lies beyond it is overwritten by the next
append. Rows of different length share one tensor; `KVSpan` says where a step's tokens stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.config import DecoderConfig
from offramp.errors import InputError
from offramp.nn.device import upload


class KVCache:
    """Keys and values of `num_layers` layers, each [B, num_kv_heads, capacity, head_dim]."""

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, capacity, config.head_dim)
        # Zeros, not empty memory: a masked key still meets a weight of 0, and 0 * NaN is NaN.
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self._values = torch.zeros(shape, device=device, dtype=dtype)
        self._window = config.sliding_window
        self._lengths: list[tuple[int, ...]] = [(0,) * batch_size] * config.num_layers
        self._last_span: KVSpan | None = None  # a run that is stopped and resumed asks again

    @property
    def capacity(self) -> int:
        return self._keys.shape[3]

    @property
    def batch_size(self) -> int:
        return self._keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def length(self, layer: int) -> tuple[int, ...]:
        """Tokens held by `layer`, per row."""
        return self._lengths[layer]

    def span(self, layer: int, num_tokens: int) -> KVSpan:
        """Where the next `num_tokens` tokens of every row go in `layer` and in those like it."""
        lengths = self._lengths[layer]
        if max(lengths) + num_tokens > self.capacity:
            raise InputError(
                f"the cache holds {self.capacity} positions and {max(lengths) + num_tokens} are "
                "needed; allocate a larger cache or shorten the prompt"
            )
        last = self._last_span
        if last is None or last.start != lengths or last.stop[0] - last.start[0] != num_tokens:
            last = KVSpan.of(lengths, num_tokens, self._keys.device, self._window)
            self._last_span = last
        return last

    def append(
        self, layer: int, keys: Tensor, values: Tensor, span: KVSpan
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, H, T, Dh] of `span`; returns all that its tokens may see."""
        assert self._lengths[layer] == span.start, "the span was made for other lengths"
        for store, new in ((self._keys[layer], keys), (self._values[layer], values)):
            if span.index is None:
                store[:, :, span.start[0] : span.total] = new
            else:
                rows, positions = span.index
                store.transpose(1, 2)[rows, positions] = new.transpose(1, 2)
        self._lengths[layer] = span.stop
        return self._keys[layer, :, :, : span.total], self._values[layer, :, :, : span.total]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all beyond `lengths` (one per row) in every layer that holds more."""
        if len(lengths) != self.batch_size:
            raise InputError(
                f"truncate got {len(lengths)} lengths for {self.batch_size} rows; give one each"
            )
        wanted = tuple(lengths)
        self._lengths = [
            held if held == wanted else tuple(map(min, held, wanted)) for held in self._lengths
        ]

    def reset(self, rows: Sequence[int]) -> None:
        """Empty `rows`, so that other sequences can take their place.

        Their memory is zeroed: a NaN left behind would reach a shorter row through its mask.
        """
        self._keys[:, list(rows)] = 0.0
        self._values[:, list(rows)] = 0.0
        self.truncate([0 if r in rows else self.capacity for r in range(self.batch_size)])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but `rows` (copies the memory of the rows that stay)."""
        index = upload(list(rows), self._keys.device)
        self._keys = self._keys.index_select(1, index)
        self._values = self._values.index_select(1, index)
        self._lengths = [tuple(held[r] for r in rows) for held in self._lengths]


@dataclass(frozen=True)
class KVSpan:
    """The place of T new tokens per row: made once per run and shared by its layers."""

    start: tuple[int, ...]  # first position, per row
    stop: tuple[int, ...]  # first position after, per row
    total: int  # keys that the longest row sees
    positions: Tensor | None  # [B, T] where rows differ, None where all start at start[0]
    index: tuple[Tensor, Tensor] | None  # (rows [B, 1], positions [B, T]) to write at, likewise
    mask: Tensor | None  # [B or 1, 1, T, total], True = may see; None: token t sees up to itself

    @staticmethod
    def of(
        lengths: tuple[int, ...], num_tokens: int, device: torch.device, window: int | None = None
    ) -> KVSpan:
        start, stop = lengths, tuple(n + num_tokens for n in lengths)
        total = max(stop)
        uniform = all(n == start[0] for n in start)
        all_in_window = window is None or total <= window
        # One token, or the first ones of a text: attention knows these cases without a mask.
        if uniform and all_in_window and (num_tokens == 1 or start[0] == 0):
            return KVSpan(start, stop, total, None, None, None)
        if uniform:
            positions = torch.arange(start[0], stop[0], device=device)[None]
        else:
            offsets = upload(start, device)[:, None]
            positions = offsets + torch.arange(num_tokens, device=device)
        keys = torch.arange(total, device=device)
        query = positions[:, None, :, None]
        mask = keys <= query
        if window is not None:
            mask &= keys > query - window
        if uniform:
            return KVSpan(start, stop, total, None, None, mask)
        rows = torch.arange(len(lengths), device=device)[:, None]
        return KVSpan(start, stop, total, positions, (rows, positions), mask)
