"""From an encoder's frames to embeddings that a decoder reads among those of its tokens.

Neighbouring frames are put side by side, which shortens the audio, and go through one hidden
layer (SLAM-ASR, arXiv 2402.08846). Each frame is normalised first, so that it does not matter how
large an encoder's output is; what lies behind an utterance counts as zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config_speech_lm import ProjectorConfig


class Projector(nn.Module):
    """down(silu(up(`stack` normalised frames side by side))), [B, T', d_in] -> [B, N, d_out]."""

    def __init__(self, config: ProjectorConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(d_in)
        self.up = nn.Linear(config.stack * d_in, config.d_hidden)
        self.down = nn.Linear(config.d_hidden, d_out)

    def init_weights(self, seed: int) -> None:
        """Xavier-uniform matrices; norm 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.up, self.down):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                layer.bias.zero_()
            self.norm.weight.fill_(1.0)
            self.norm.bias.zero_()

    def output_frames(self, num_frames: int) -> int:
        """Embeddings for `num_frames` frames; zeros fill up the last group."""
        return -(-num_frames // self.config.stack)

    def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
        """h [B, T', d_in], of which the first `lengths` [B] frames of a row are real.

        Embeddings [B, ceil(T' / stack), d_out]; row b's are the first `output_frames(lengths[b])`.
        """
        B, T, D = h.shape
        padding = torch.arange(T, device=h.device) >= lengths.to(h.device)[:, None]
        frames = self.norm(h).masked_fill(padding[:, :, None], 0.0)
        stacked = F.pad(frames, (0, 0, 0, -T % self.config.stack))
        stacked = stacked.view(B, -1, self.config.stack * D)
        embeddings: Tensor = self.down(F.silu(self.up(stacked)))
        return embeddings
