"""Batches made ahead in another process are the batches, and its faults are ours to see."""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from offramp.errors import DataError
from offramp.train.ctc import SpeechBatch
from offramp.train.prefetch import PrefetchedBatches


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


class Dies:
    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        os._exit(1)


@pytest.mark.slow
def test_a_process_that_dies_is_told_in_one_line():
    with closing(PrefetchedBatches(Dies(), total_steps=9)) as ahead:
        for _ in range(2):
            with pytest.raises(DataError, match="the process that makes the batches ended"):
                ahead.batch(0, 0, 1)


@pytest.mark.slow
def test_what_is_made_ahead_is_what_would_have_been_made():
    """From any step on, in any order: a resumed run starts in the middle."""
    with closing(PrefetchedBatches(Made(), total_steps=9)) as ahead:
        for step, shard in [(4, 0), (4, 1), (5, 0), (5, 1), (8, 0), (0, 1), (1, 1), (2, 1)]:
            assert equal(ahead.batch(step, shard, 2), Made().batch(step, shard, 2)), step
        with pytest.raises(DataError, match="step 3 cannot be read"):
            ahead.batch(3, 1, 2)
    assert not multiprocessing.active_children()


ALONE = """
import time
from contextlib import closing
import torch
from offramp.train.ctc import SpeechBatch
from offramp.train.prefetch import PrefetchedBatches

class Made:
    def batch(self, step, shard, num_shards):
        return SpeechBatch(torch.zeros(1, 5, 3), torch.tensor([5]), [[1]], 1.0, 1)

if __name__ == "__main__":
    try:
        with closing(PrefetchedBatches(Made(), total_steps=9)) as ahead:
            ahead.batch(0, 0, 1)
            time.sleep(0.5)  # until the worker waits for more
            print("ready", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "stopped\n"), (signal.SIGKILL, "")], ids=["int", "kill"]
)
def test_the_worker_ends_quietly_with_its_parent(
    tmp_path: Path, number: signal.Signals, said: str
) -> None:
    """Ctrl-C goes to the whole process group, a kill to the parent alone."""
    (tmp_path / "alone.py").write_text(ALONE)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "alone.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        (os.killpg if number is signal.SIGINT else os.kill)(parent.pid, number)
        # The worker holds the pipes too: they end when it has ended.
        out, err = parent.communicate(timeout=20)
        assert out == said and "Traceback" not in err
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
