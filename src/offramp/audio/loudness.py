"""Speech by its loudness alone: what stands out of the steady sound around it.

Speech swings by 10 to 30 dB from syllable to syllable, in every band of its own; noise, hum and
tones stay as loud as they are, however loud that is. So each band of a window is held against
the quiet ones among its neighbours, as minimum statistics find the noise under speech (Martin,
2001). It needs no model; what else swings, such as music, passes for speech.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offramp.audio.features import FeatureConfig, log_mel
from offramp.audio.silero import WINDOW

_AROUND = 47  # windows on either side, 1.5 s: nobody speaks for 3 s without a dip
_QUIET = 0.1  # of the neighbours; their loudest is the floor
# The mean over the bands, so that what happens to noise in one band does not count for much.
_CERTAIN_DB = 8.0  # so far above the floor is speech for certain, half of it as likely as not
_BANDS = FeatureConfig(
    window_ms=32, hop_ms=32, num_fft=WINDOW, num_mels=8, low_hz=80, preemphasis=0
)
_FULL_SCALE = WINDOW**2 / 5  # what `log_mel` makes of a mean square of 1 in one band, about


class Loudness:
    """Probabilities of speech, window by window; each waits for the 1.5 s that follow it.

    silence_db: windows below this level (of a full-scale square wave) are silence, which is
    neither speech nor a neighbour: noise that begins and ends in digital silence is noise.
    """

    def __init__(self, silence_db: float) -> None:
        self._least = 10 ** (silence_db / 10)
        self._kept = torch.full((_AROUND, _BANDS.num_mels), torch.nan)  # nothing came before

    def push(self, windows: Tensor) -> Tensor:
        """windows [n, 512], consecutive, at 16 kHz -> [m], of the next m that can be told."""
        levels = log_mel(windows.flatten(), _BANDS).clamp(min=math.log(self._least * _FULL_SCALE))
        silent = windows.square().mean(dim=1) < self._least
        return self._told(levels.masked_fill(silent[:, None], torch.nan))

    def finish(self) -> Tensor:
        """Of the windows that still wait."""
        return self._told(torch.full((_AROUND, _BANDS.num_mels), torch.nan))

    def _told(self, levels: Tensor) -> Tensor:
        """levels [n, 8]: natural logarithms of power, NaN where it is silent."""
        levels = torch.cat([self._kept, levels])
        self._kept = levels[-2 * _AROUND :]
        if len(levels) <= 2 * _AROUND:
            return torch.zeros(0)
        floor = levels.unfold(0, 2 * _AROUND + 1, 1).nanquantile(_QUIET, dim=2)
        above_db = 10 / math.log(10) * (levels[_AROUND:-_AROUND] - floor).mean(dim=1)
        return (above_db / _CERTAIN_DB).clamp(0.0, 1.0).nan_to_num(0.0)
