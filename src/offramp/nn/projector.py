"""From an encoder's frames to embeddings that a decoder reads among those of its tokens.

Neighbouring frames are put side by side, which shortens the audio, and go through one hidden
layer (SLAM-ASR, arXiv 2402.08846); or what CTC wrote says which frames belong together (after the
CTC compressor of Speech-LLaMA, arXiv 2307.03917): then the decoder reads little more than a text,
and need not find out where in the audio it is. Each frame is normalised first, so that it does not
matter how large an encoder's output is; what lies behind an utterance counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        _init(self, seed)

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


class CTCProjector(nn.Module):
    """down(silu(up(a token's first frame beside the mean of all up to the next token's)))."""

    def __init__(self, config: ProjectorConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(d_in)
        self.up = nn.Linear(2 * d_in, config.d_hidden)
        self.down = nn.Linear(config.d_hidden, d_out)

    def init_weights(self, seed: int) -> None:
        """Xavier-uniform matrices; norm 1, biases 0."""
        _init(self, seed)

    def output_frames(self, num_frames: int) -> int:
        """Embeddings for `num_frames` frames, at most."""
        return num_frames

    def forward(self, h: Tensor, lengths: Tensor, begins: Sequence[Tensor]) -> list[Tensor]:
        """h [B, T', d_in], of which the first `lengths` [B] frames of a row are real.

        begins: for each row the frames, int64 [N_b], where its `token_runs` begin. Embeddings
        [N_b, d_out] of each row.
        """
        frames = [row[:n] for row, n in zip(self.norm(h), lengths.tolist(), strict=True)]
        pairs = zip(frames, begins, strict=True)
        read = [torch.cat((row[at], run_means(row, at)), 1) for row, at in pairs]
        embeddings: Tensor = self.down(F.silu(self.up(torch.cat(read))))
        return list(torch.split(embeddings, [len(at) for at in begins]))


AnyProjector = Projector | CTCProjector


def build_projector(config: ProjectorConfig, d_in: int, d_out: int) -> AnyProjector:
    made: type[AnyProjector] = CTCProjector if config.kind == "ctc" else Projector
    return made(config, d_in, d_out)


def token_runs(labels: Tensor, blank_id: int) -> Tensor:
    """The frames, int64 [N], where CTC's best labels, [T], write a token; and 0, what is before
    the first one."""
    before = labels.roll(1)
    writes = (labels != blank_id) & (labels != before)
    writes[:1] = True
    return writes.nonzero().flatten()


def run_means(frames: Tensor, begins: Tensor) -> Tensor:
    """Means [N, D] of frames [T, D] from each of `begins` up to the next, the last up to T."""
    run = torch.zeros(len(frames), dtype=torch.long, device=frames.device)
    run[begins[1:]] = 1
    run = run.cumsum(0)
    sums = frames.new_zeros(len(begins), frames.shape[1]).index_add(0, run, frames)
    return sums / torch.bincount(run, minlength=len(begins)).to(frames)[:, None]


def _init(projector: AnyProjector, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (projector.up, projector.down):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            layer.bias.zero_()
        projector.norm.weight.fill_(1.0)
        projector.norm.bias.zero_()
