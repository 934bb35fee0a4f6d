"""Fewer frames: before the tower, of whole utterances or of streams, and for slower branches.

None of the first lets a padded frame touch a real one: the convolutions take no padding, so what
they write for real frames reads real frames only; the pools weigh real frames only. Those of a
stream read no frame after their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import EncoderConfig, TransducerConfig


class Subsampling(nn.Module):
    """Convolutions of kernel 3 and stride 2 without padding, [B, T, F] -> [B, T', D].

    `config.output_frames` gives T' for T. The published model (`subsampling_activation` none)
    is linear from features to tower.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(config.d_model if i else config.num_mels, config.d_model, 3, stride=2)
            for i in range(config.subsampling_layers)
        )
        self.activation = config.subsampling_activation

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = conv(x)
            if self.activation == "silu":
                x = F.silu(x)
        return x.transpose(1, 2)


class Stack(nn.Module):
    """One matrix for each feature frame; `time_reduction` results side by side are a frame.

    [B, r T', F] -> [B, T', D] (Emformer, arXiv 2010.10759).
    """

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        D = config.d_model
        self.matrix = nn.Linear(config.num_mels, D // config.time_reduction, bias=False)
        self.width = D

    def forward(self, x: Tensor) -> Tensor:
        frames: Tensor = self.matrix(x).view(len(x), -1, self.width)
        return frames


class Halving(nn.Module):
    """Layers that halve the rate: a matrix over three frames, SiLU; [B, h + r T', F] -> [B, T', D].

    h is `config.history`. Convolutions of kernel 3 and stride 2, written as matrices, so that all
    that makes a matrix smaller or faster works for them.
    """

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        D, count = config.d_model, config.time_reduction.bit_length() - 1
        self.layers = nn.ModuleList(
            nn.Linear(3 * (D if n else config.num_mels), D) for n in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.silu(layer(x.unfold(1, 3, 2).transpose(2, 3).flatten(2)))
        return x


class Downsample(nn.Module):
    """One frame for each group of `factor`, [B, T, D] -> [B, ceil(T / factor), D].

    Not learned, it keeps the first frame of each group, as Splitformer does. Learned, it is a
    mean with one softmax-weighted scalar per place (Zipformer, arXiv 2310.11230, section 3.2);
    where a group is cut off by the end, over the frames that are there.
    """

    def __init__(self, factor: int, learned: bool) -> None:
        super().__init__()
        self.factor = factor
        self.scores = nn.Parameter(torch.zeros(factor)) if learned else None

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """real: bool [B, T, 1], False for padding; None: all frames are real."""
        if self.scores is None:
            return x[:, :: self.factor]
        B, T, D = x.shape
        extra = -T % self.factor
        if real is None:
            real = torch.ones(1, T, 1, dtype=torch.bool, device=x.device)
        groups = F.pad(x, (0, 0, 0, extra)).view(B, -1, self.factor, D)
        here = F.pad(real, (0, 0, 0, extra)).view(real.shape[0], -1, self.factor, 1)
        weights = self.scores.float().exp()[:, None] * here
        # A group of padding alone divides 0 by 1; its frames are padding again.
        total = weights.sum(2, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        return (groups * weights.to(x.dtype)).sum(2)


def upsample(x: Tensor, factor: int, num_frames: int) -> Tensor:
    """Each frame `factor` times, [B, ceil(T / factor), D] -> the first T = `num_frames` of them."""
    return x.repeat_interleave(factor, dim=1)[:, :num_frames]
