"""Batches of speech made ahead in another process, while the model trains on the present one.

Decoding, augmentation, synthesis and features take a quarter of a step on one core. A batch is a
pure function of (step, shard), so who makes it, and when, changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread

import numpy as np
import torch

from offramp.errors import DataError
from offramp.train.ctc import SpeechBatch, SpeechBatches

_DEPTH = 2  # steps ahead: evens out batches that take longer than a step
_Packed = tuple[np.ndarray, np.ndarray, list[list[int]], float, int | None]

_worker: SpeechBatches  # in the worker process: what makes the batches there


class PrefetchedBatches:
    """Implements `train.ctc.SpeechBatches`: what `batches` gives, made ahead in one process.

    The process ends with `close`.
    """

    def __init__(self, batches: SpeechBatches, total_steps: int) -> None:
        """batches: must pickle. No batch is made ahead of `total_steps`."""
        self._total_steps = total_steps
        self._pool = ProcessPoolExecutor(
            # Forking would copy a process whose threads may hold locks.
            1,
            multiprocessing.get_context("spawn"),
            _start,
            (batches,),
        )
        self._made: dict[tuple[int, int, int], Future[_Packed]] = {}

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        try:
            for ahead in range(step, min(step + _DEPTH, self._total_steps - 1) + 1):
                key = ahead, shard, num_shards
                if key not in self._made:
                    self._made[key] = self._pool.submit(_make, *key)
            made = self._made.pop((step, shard, num_shards)).result()
        except BrokenProcessPool as error:
            raise DataError(
                "the process that makes the batches ended; it ran out of memory, or a script "
                "trains outside of `if __name__ == '__main__':`; mend that, or give prefetch=False"
            ) from error
        features, lengths, targets, seconds, total = made
        return SpeechBatch(
            torch.from_numpy(features), torch.from_numpy(lengths), targets, seconds, total
        )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start(batches: SpeechBatches) -> None:
    global _worker
    # Ctrl-C reaches the whole process group; the parent ends this process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # beside the training, a second thread would only fight with it
    _worker = batches


def _end_with_parent() -> None:
    """A parent that was killed ends no process of its pool: this one would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in the worker"
    parent.join()
    os._exit(1)


def _make(step: int, shard: int, num_shards: int) -> _Packed:
    batch = _worker.batch(step, shard, num_shards)
    # As arrays: tensors would travel through shared memory, which small containers run out of.
    features, lengths = batch.features.numpy(), batch.lengths.numpy()
    targets = [list(row) for row in batch.targets]
    return features, lengths, targets, batch.audio_seconds, batch.total_targets
