"""The cache against the obvious one: a Python list of tokens per row."""

from __future__ import annotations

import math
import random

import pytest
import torch

import toy
from offramp.errors import InputError
from offramp.nn.cache import KVCache, KVSpan
from toy import config

CAPACITY = 24


class ListCache:
    """One layer's tokens as a list per row; a token is the number that its keys are filled with."""

    def __init__(self, batch_size: int) -> None:
        self.rows: list[list[float]] = [[] for _ in range(batch_size)]

    def visible(self, window: int | None, num_tokens: int) -> list[list[list[float]]]:
        """What each of the last `num_tokens` tokens of each row sees."""
        return [
            [row[: i + 1][-(window or CAPACITY) :] for i in range(len(row) - num_tokens, len(row))]
            for row in self.rows
        ]


def append(cache: KVCache, new: torch.Tensor) -> tuple[KVSpan, torch.Tensor, torch.Tensor]:
    """Append tokens `new` [B, T] to every layer, values the negative of keys."""
    B, T = new.shape
    span = cache.span(0, T)
    keys = new[:, None, :, None].expand(B, 2, T, 8)
    for layer in range(5):
        seen, values = cache.append(layer, keys, -keys, span)
    return span, seen, values


def visible(span: KVSpan, keys: torch.Tensor, num_tokens: int) -> list[list[list[float]]]:
    B, _, S, _ = keys.shape
    last = torch.arange(S - num_tokens, S)[:, None]
    mask = torch.arange(S) <= last if span.mask is None else span.mask
    mask = mask.expand(B, 1, num_tokens, S)
    return [[keys[b, 0, mask[b, 0, t], 0].tolist() for t in range(num_tokens)] for b in range(B)]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_operations_equals_lists(seed: int, window: int | None) -> None:
    draw, B = random.Random(seed), 3
    cache, lists = KVCache(config(sliding_window=window), B, CAPACITY), ListCache(B)
    for step in range(40):
        room = CAPACITY - max(map(len, lists.rows))
        match draw.choice(["append", "append", "one", "truncate", "reset", "keep"]):
            case "append" | "one" as kind if room > 0 and lists.rows:
                T = 1 if kind == "one" else draw.randint(1, min(5, room))
                new = step + torch.rand(len(lists.rows), T)
                for row, added in zip(lists.rows, new.tolist(), strict=True):
                    row += added
                span, keys, values = append(cache, new)
                assert visible(span, keys, T) == lists.visible(window, T)
                assert torch.equal(values, -keys)
            case "truncate":
                to = [draw.randint(0, CAPACITY) for _ in lists.rows]
                cache.truncate(to)
                lists.rows = [row[:n] for row, n in zip(lists.rows, to, strict=True)]
            case "reset":
                rows = draw.sample(range(len(lists.rows)), 1)
                cache.reset(rows)
                lists.rows = [[] if i in rows else row for i, row in enumerate(lists.rows)]
            case "keep" if len(lists.rows) > 1 and draw.random() < 0.2:
                rows = draw.sample(range(len(lists.rows)), len(lists.rows) - 1)
                cache.keep(rows)
                lists.rows = [lists.rows[r] for r in rows]
        assert cache.batch_size == len(lists.rows)
        assert all(cache.length(i) == tuple(map(len, lists.rows)) for i in range(5))


def test_nbytes_is_all_that_it_allocates() -> None:
    layers, rows, heads, positions, head_dim, both = 5, 3, 2, 7, 8, 2
    numbers = both * layers * rows * heads * positions * head_dim
    assert KVCache(config(), rows, positions).nbytes == 4 * numbers
    assert KVCache(config(), rows, positions, dtype=torch.bfloat16).nbytes == 2 * numbers


def test_each_range_of_layers_has_its_own_length() -> None:
    model, ids = toy.decoder(), toy.tokens(2, 6)
    cache = KVCache(model.config, 2, 6)
    h = model.run(model.embed(ids), 0, 2, cache)
    assert [cache.length(i) for i in range(5)] == [(6, 6)] * 2 + [(0, 0)] * 3
    cache.truncate([4, 3])
    assert [cache.length(i) for i in range(5)] == [(4, 3)] * 2 + [(0, 0)] * 3
    model.run(h[:, :2], 2, 5, cache)
    assert [cache.length(i) for i in range(5)] == [(4, 3)] * 2 + [(2, 2)] * 3


def test_the_last_position_fits_and_one_more_is_refused() -> None:
    model, cache = toy.decoder(), KVCache(config(), 1, 6)
    toy.run(model, toy.tokens(1, 6), cache)
    with pytest.raises(InputError, match="holds 6 positions and 7 are needed"):
        toy.run(model, toy.tokens(1, 1), cache)
    assert cache.length(0) == (6,), "a refused run leaves the cache as it was"


def test_truncate_wants_one_length_per_row() -> None:
    with pytest.raises(InputError, match="2 lengths for 3 rows"):
        KVCache(config(), 3, 6).truncate([1, 2])


def test_a_span_of_other_lengths_is_our_bug() -> None:
    cache = KVCache(config(), 1, 6)
    stale = cache.span(0, 1)
    append(cache, torch.ones(1, 2))
    with pytest.raises(AssertionError, match="other lengths"):
        cache.append(0, torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), stale)


def test_a_row_that_went_wrong_does_not_poison_the_next_one_in_its_place() -> None:
    """A masked position still meets a weight of 0, and 0 * NaN is NaN."""
    model, cache = toy.decoder(), KVCache(config(), 2, 12)
    bad = model.embed(toy.tokens(2, 8))
    bad[0] = math.nan
    model.run(bad, 0, 5, cache)
    cache.reset([0])
    ids = toy.tokens(2, 2, seed=1)
    h = toy.run(model, ids, cache)
    torch.testing.assert_close(h[:1], toy.run(model, ids[:1]), rtol=0, atol=1e-5)
