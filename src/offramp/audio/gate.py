"""A gate that shuts where nobody speaks, so that an encoder need not run there.

It knows no future: a frame is voiced if it stands out of the quietest of the last seconds, which
is what steady noise and hum are like; and the gate stays open for a while after the last voiced
frame. What came just before it opens goes through too. It decides by the features alone, frame
by frame, so a stream cut in any way and a recording heard at once pass the same frames.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.audio.features import FeatureConfig
from offramp.config import check_positive, check_range


@dataclass(frozen=True)
class GateOptions:
    """silence_db: quieter frames (against a full-scale square wave) are never voiced.

    margin_db: voiced is what is so much louder than the quietest frame of the last `floor_s`
    seconds; until these have passed, all that is not silent is. hold_s: how long the gate stays
    open after a voiced frame. before_s: what is let through of the time before it opens.
    """

    silence_db: float = -80.0
    margin_db: float = 6.0
    floor_s: float = 5.0
    hold_s: float = 2.4
    before_s: float = 0.4

    def __post_init__(self) -> None:
        check_positive(floor_s=self.floor_s, hold_s=self.hold_s)
        check_range(0, margin_db=self.margin_db, before_s=self.before_s)
        check_range(-150, 0, silence_db=self.silence_db)


class SpeechGate:
    """The gate of one stream. Its frames are blocks of `block` feature frames."""

    def __init__(self, options: GateOptions, features: FeatureConfig, block: int) -> None:
        block_s = block * features.hop / features.sample_rate
        self._options = options
        self._hold = math.ceil(options.hold_s / block_s)
        self._before = math.ceil(options.before_s / block_s)
        # Windows of Kaldi's shape pass on two fifths of the power, by Parseval's theorem on half
        # of the transform's bins; the filters then share it out.
        self._full_scale = math.log(features.window * features.num_fft / 5)
        self._levels: deque[float] = deque(maxlen=math.ceil(options.floor_s / block_s))
        self._kept: deque[Tensor] = deque(maxlen=self._before)
        self._left = 0  # how many blocks it stays open

    @property
    def is_open(self) -> bool:
        return self._left > 0

    def push(self, features: Tensor) -> Tensor | None:
        """features [block, F], of the next block -> what passes, [n, F]; None: nothing.

        The last block of a recording may be shorter. Where the gate opens, earlier blocks pass
        too.
        """
        opened = not self.is_open
        if self._is_voiced(features):
            self._left = self._hold
        elif self._left:
            self._left -= 1
        if not self._left:
            self._kept.append(features)
            return None
        if not opened:
            return features
        passed = torch.cat((*self._kept, features))
        self._kept.clear()
        return passed

    def tensors(self) -> dict[str, Tensor]:
        """A copy of all that `restore` needs."""
        kept = torch.stack(tuple(self._kept)) if self._kept else torch.zeros(0)
        levels = torch.tensor(self._levels, dtype=torch.float64)
        return {"kept": kept, "levels": levels, "left": torch.tensor(self._left)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on where the gate stood from which `tensors` were taken."""
        self._kept.clear()
        self._kept.extend(tensors["kept"].clone())
        self._levels.clear()
        self._levels.extend(tensors["levels"].tolist())
        self._left = int(tensors["left"])

    def _is_voiced(self, features: Tensor) -> bool:
        """Of the frames of a block the loudest counts."""
        power = features.logsumexp(dim=1).max().item()
        level = 10 / math.log(10) * (power - self._full_scale)
        quietest = min(self._levels) if len(self._levels) == self._levels.maxlen else -math.inf
        self._levels.append(level)
        return level >= max(self._options.silence_db, quietest + self._options.margin_db)
