"""Batches are a pure function of the step, and each epoch uses everything once."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from offramp.data.batching import (
    IGNORE,
    PromptCompletions,
    TokenBatch,
    TokenBatches,
    TokenWindows,
    windows,
)
from offramp.errors import ConfigError, DataError

SEQ, SIZE, PAD = 5, 4, 999


def stream(length: int = 200) -> np.ndarray:
    """Every token is its own position, so that a batch tells where it was cut."""
    return np.arange(length, dtype=np.int32)


def pairs(count: int = 300, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of random lengths; the first prompt token numbers the pair."""
    draw = random.Random(seed)
    return [
        (
            [i, *(500 + draw.randrange(9) for _ in range(draw.randrange(4)))],
            [700 + draw.randrange(9) for _ in range(draw.randint(1, 20))],
        )
        for i in range(count)
    ]


def make(kind: str, seed: int = 0) -> TokenBatches:
    if kind == "windows":
        return TokenWindows(stream(), SEQ, SIZE, seed)
    return PromptCompletions(pairs(30), SIZE, PAD, seed)


def same(a: TokenBatch, b: TokenBatch) -> bool:
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and a.total_targets == b.total_targets
    )


@pytest.mark.parametrize("kind", ["windows", "pairs"])
def test_a_batch_is_a_function_of_its_step_whatever_was_asked_before(kind: str) -> None:
    steps = list(range(40))
    expected = {step: make(kind).batch(step, 0, 1) for step in steps}
    asked = make(kind)
    for seed in range(3):
        random.Random(seed).shuffle(steps)
        assert all(same(asked.batch(step, 0, 1), expected[step]) for step in steps)
    assert not same(make(kind, seed=1).batch(0, 0, 1), expected[0])
    assert not same(expected[0], expected[1])


@pytest.mark.parametrize("kind", ["windows", "pairs"])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_partition_the_batch(kind: str, num_shards: int) -> None:
    batches = make(kind)
    for step in (0, 3, 17):
        whole = batches.batch(step, 0, 1)
        parts = [batches.batch(step, shard, num_shards) for shard in range(num_shards)]

        def rows(batch: TokenBatch) -> list[tuple[list[int], list[int]]]:
            """Without the padding, whose width differs between shards."""
            both = zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
            return [([t for t in x if t != PAD], [t for t in y if t != IGNORE]) for x, y in both]

        assert sorted(rows(whole)) == sorted(row for part in parts for row in rows(part))
        assert {part.total_targets for part in parts} == {whole.total_targets}
        assert whole.total_targets == int((whole.targets != IGNORE).sum())


@pytest.mark.parametrize("kind", ["windows", "pairs"])
def test_a_batch_that_does_not_split_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="batch of 4 does not split into 3 shards"):
        make(kind).batch(0, 0, 3)


# -- windows of one stream ---------------------------------------------------------------------


def test_every_window_is_used_once_per_epoch() -> None:
    batches, per_epoch = TokenWindows(stream(), SEQ, SIZE, seed=3), (200 - SEQ - 1) // SEQ // SIZE
    offsets, orders = set(), set()
    for epoch in range(6):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = torch.cat([batches.batch(step, 0, 1).tokens for step in steps])
        starts = seen[:, 0].tolist()
        assert len(set(starts)) == per_epoch * SIZE
        assert len({start % SEQ for start in starts}) == 1, "windows do not overlap"
        offsets.add(starts[0] % SEQ)
        orders.add(tuple(start // SEQ for start in starts))
    assert len(offsets) > 1, "each epoch cuts the stream elsewhere"
    assert len(orders) == 6, "each epoch has its own order"


def test_targets_are_the_next_tokens() -> None:
    batches = TokenWindows(stream(), SEQ, SIZE, seed=0)
    for step in range(50):
        batch = batches.batch(step, 0, 1)
        assert batch.tokens.shape == (SIZE, SEQ)
        assert batch.tokens.dtype == torch.int64
        assert torch.equal(batch.targets, batch.tokens + 1)


@pytest.mark.parametrize("length", range(26, 32))
def test_the_shortest_stream_that_is_taken_fills_its_batch(length: int) -> None:
    """Whatever the offset of the epoch, the last window ends within the stream."""
    batches = TokenWindows(stream(length), SEQ, SIZE, seed=0)
    for step in range(20):
        assert batches.batch(step, 0, 1).tokens.shape == (SIZE, SEQ)


def test_a_stream_too_short_is_refused_with_the_length_it_needs() -> None:
    with pytest.raises(DataError, match="has 25 tokens; a batch of 4 windows of 5 needs 26"):
        TokenWindows(stream(25), SEQ, SIZE, seed=0)


# -- prompts and completions -------------------------------------------------------------------


def test_every_pair_is_used_once_per_epoch() -> None:
    data = pairs()
    batches, per_epoch = PromptCompletions(data, SIZE, PAD, seed=0), len(data) // SIZE
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = torch.cat([batches.batch(step, 0, 1).tokens[:, 0] for step in steps]).tolist()
        assert sorted(seen) == list(range(len(data)))


def test_pairs_that_fill_no_batch_are_left_out_and_others_each_epoch() -> None:
    batches, left = PromptCompletions(pairs(10), SIZE, PAD, seed=0), []
    for epoch in range(12):
        rows = [batches.batch(2 * epoch + i, 0, 1).tokens[:, 0].tolist() for i in range(2)]
        seen = {*rows[0], *rows[1]}
        assert len(seen) == 8
        left += set(range(10)) - seen
    assert len(Counter(left)) > 2


def test_padding_is_on_the_right_and_the_loss_on_the_completion_only() -> None:
    data = pairs()
    batches = PromptCompletions(data, SIZE, PAD, seed=0)
    for step in range(100):
        batch = batches.batch(step, 0, 1)
        widest = 0
        for x, y in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            prompt, completion = data[x[0]]
            real = len(prompt) + len(completion) - 1
            assert x == [*prompt, *completion][:-1] + [PAD] * (len(x) - real)
            assert y == ([IGNORE] * (len(prompt) - 1) + completion + [IGNORE] * (len(y) - real))
            widest = max(widest, real)
        assert batch.tokens.shape == batch.targets.shape == (SIZE, widest)


def test_batches_are_of_similar_length() -> None:
    data = pairs(1280)
    batches = PromptCompletions(data, SIZE, PAD, seed=0)
    padding = [float((batches.batch(i, 0, 1).tokens == PAD).float().mean()) for i in range(320)]
    assert sum(padding) / len(padding) < 0.05
    widths = [batches.batch(i, 0, 1).tokens.shape[1] for i in range(320)]
    assert widths != sorted(widths), "and yet in random order"


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="3 pairs do not fill a batch of 4"):
        PromptCompletions(pairs(3), SIZE, PAD, seed=0)


# -- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 6, 7, 11, 26, 27, 100])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_windows_predict_each_token_once_in_order(length: int, batch_size: int) -> None:
    found = windows(stream(length), SEQ, batch_size)
    assert torch.cat([b.targets.flatten() for b in found]).tolist() == list(range(1, length))
    for b in found:
        assert torch.equal(b.targets, b.tokens + 1)
        assert b.tokens.shape[0] <= batch_size
        assert b.tokens.shape[1] <= SEQ
        assert b.total_targets == b.targets.numel()


@pytest.mark.parametrize("limit", [1, 5, 12, 99, 500])
def test_a_limit_is_the_number_of_targets(limit: int) -> None:
    found = windows(stream(100), SEQ, 4, limit)
    assert sum(b.total_targets for b in found) == min(limit, 99)


def test_a_single_token_has_nothing_to_predict() -> None:
    assert windows(stream(1), SEQ, 4) == []
