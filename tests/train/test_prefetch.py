"""Batches made ahead in another process are the batches, and its faults are ours to see."""

import multiprocessing

import pytest
import torch

from offramp.errors import DataError
from offramp.train.ctc import SpeechBatch
from offramp.train.prefetch import prefetched


class Made:
    """A batch that says which it is; step 3 fails."""

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        if step == 3:
            raise DataError("step 3 cannot be read")
        draw = torch.Generator().manual_seed(100 * step + shard)
        features = torch.rand(2, 5, 3, generator=draw)
        lengths = torch.tensor([5, 4])
        return SpeechBatch(features, lengths, [[step], [shard, 7]], 1.5 * step, num_shards)


def equal(a: SpeechBatch, b: SpeechBatch) -> bool:
    return (
        torch.equal(a.features, b.features)
        and torch.equal(a.lengths, b.lengths)
        and [list(row) for row in a.targets] == [list(row) for row in b.targets]
        and (a.audio_seconds, a.total_targets) == (b.audio_seconds, b.total_targets)
    )


def test_what_is_made_ahead_is_what_would_have_been_made():
    """From any step on, in any order: a resumed run starts in the middle."""
    with prefetched(Made(), total_steps=9) as ahead:
        for step, shard in [(4, 0), (4, 1), (5, 0), (5, 1), (8, 0), (0, 1), (1, 1), (2, 1)]:
            assert equal(ahead.batch(step, shard, 2), Made().batch(step, shard, 2)), step
        with pytest.raises(DataError, match="step 3 cannot be read"):
            ahead.batch(3, 1, 2)
    assert not multiprocessing.active_children()
