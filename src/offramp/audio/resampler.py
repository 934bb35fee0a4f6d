"""Samples of any rate to 16 kHz as they come; how they are cut does not change what comes out.

soxr does the work, as for files (io.py). What its stream remembers cannot be taken out, so the
input that still bears on what is to come is kept beside it: a stream that goes on elsewhere
begins by hearing that again.
"""

from __future__ import annotations

import math

import soxr  # type: ignore[import-untyped]
import torch
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.config import check_counts
from offramp.errors import InputError

LEAST_RATE, MOST_RATE = 4_000, 384_000  # Hz; beyond them nobody records speech
_REACH_S = 0.5  # soxr's filters and the blocks they work in reach back less than half as far


class Resampler:
    """A stream of samples at `rate` Hz, mono.

    What comes out lags behind what came in by up to 0.04 s, 0.12 s at 8 kHz, none at 16 kHz.
    """

    def __init__(self, rate: int) -> None:
        check_counts(1, sample_rate=rate)
        if not LEAST_RATE <= rate <= MOST_RATE:
            raise InputError(
                f"sample_rate is {rate}; it must lie between {LEAST_RATE} and {MOST_RATE} Hz"
            )
        self.rate = rate
        # After so many samples of input a whole number of samples has come out.
        self._period = rate // math.gcd(rate, SAMPLE_RATE)
        self._soxr = self._new()
        self._heard = torch.zeros(0)  # the last of the input, from sample `_first` on
        self._first = 0
        self._at = 0  # number of the sample that soxr makes next
        self._given = 0  # how many were given out
        self._ahead = torch.zeros(0)  # made, not given out yet

    def push(self, samples: Tensor) -> Tensor:
        """samples [n], float32 -> [m]; m may be 0."""
        if self._soxr is None:
            return samples
        self._heard = torch.cat((self._heard, samples))
        old = len(self._heard) - round(_REACH_S * self.rate)
        if old >= self._period:
            old -= old % self._period
            self._heard, self._first = self._heard[old:].clone(), self._first + old
        return self._give(self._made(samples, last=False))

    def finish(self) -> Tensor:
        """What still waits, once no more samples come."""
        nothing = torch.zeros(0)
        return nothing if self._soxr is None else self._give(self._made(nothing, last=True))

    def tensors(self) -> dict[str, Tensor]:
        """A copy of all that `restore` needs."""
        counts = torch.tensor([self.rate, self._first, self._given])
        return {"heard": self._heard.clone(), "counts": counts}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on where the stream stood from which `tensors` were taken, to within rounding.

        InputError: it had another rate.
        """
        rate, first, given = tensors["counts"].tolist()
        if rate != self.rate:
            raise InputError(f"the saved stream has {rate} Hz, this one {self.rate} Hz")
        self._heard, self._first, self._given = tensors["heard"].clone(), first, given
        self._soxr = self._new()
        if self._soxr is not None:
            self._at = first // self._period * (self._period * SAMPLE_RATE // self.rate)
            self._ahead = self._made(self._heard, last=False)

    def _new(self) -> soxr.ResampleStream | None:
        """None: there is nothing to do."""
        if self.rate == SAMPLE_RATE:
            return None
        return soxr.ResampleStream(self.rate, SAMPLE_RATE, 1, dtype="float32")

    def _made(self, samples: Tensor, last: bool) -> Tensor:
        """What comes out, without that which was given out before the stream was restored."""
        assert self._soxr is not None
        made = torch.from_numpy(self._soxr.resample_chunk(samples.numpy(), last=last))
        known = min(len(made), max(0, self._given - self._at))
        self._at += len(made)
        return made[known:]

    def _give(self, made: Tensor) -> Tensor:
        if len(self._ahead):
            made, self._ahead = torch.cat((self._ahead, made)), self._ahead[:0]
        self._given += len(made)
        return made
