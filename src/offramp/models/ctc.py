"""A Conformer CTC encoder as a tower with exits, with parallel branches and posterior feedback.

The early-exit Conformer (arXiv 2309.09546) and Splitformer (arXiv 2506.18035) with the same
parameters as their code builds, without its faults: padding changes nothing, and a tower that
stops at an exit runs nothing beyond. Our improvements are options of `EncoderConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import EncoderConfig
from offramp.errors import InputError
from offramp.nn.conformer import ConformerLayer, Dropout, Frames, sinusoids
from offramp.nn.layer_dropout import run_survivors
from offramp.nn.subsampling import Downsample, Subsampling, upsample


def early_exit_baseline() -> EncoderConfig:
    """The published early-exit Conformer: 31,536,128 parameters, an exit every two layers."""
    return EncoderConfig(
        d_model=256,
        num_layers=12,
        num_heads=8,
        d_ff=2048,
        kernel_size=31,
        vocab_size=256,
        exits=(2, 4, 6, 8, 10, 12),
        dropout=0.1,
    )


def splitformer() -> EncoderConfig:
    """The published Splitformer: half-rate branches at the first and last exit; 36,683,264."""
    return replace(early_exit_baseline(), branches=(2, 12))


def improved(config: EncoderConfig) -> EncoderConfig:
    """`config` with all our improvements: the same trunk, Splitformer's branches, learned."""
    return replace(
        config,
        pad_edges=True,
        subsampling_activation="silu",
        positions="rotary",
        conv_norm="layer",
        shared_head=True,
        feedback=True,
        branches=(config.exits[0], config.num_layers),
        branch_factor=2,
        branch_pool="learned",
        branch_scale=0.5,
    )


@dataclass(frozen=True)
class EncoderState:
    """A batch of utterances part way up the tower.

    h: [B, T', D]. lengths: int64 [B], true frames of T'. layer: how many layers ran. The rest is
    the tower's own: `branch_input` [B, T', D], where the branch of the present span starts;
    `logits` [B, T', V] of the exit just reached, where feedback needs them too.
    """

    h: Tensor
    layer: int
    frames: Frames
    branch_frames: Frames | None
    branch_input: Tensor | None = None
    logits: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return self.frames.lengths

    def select(self, rows: Tensor | Sequence[int]) -> EncoderState:
        """The utterances `rows` [K] alone, without frames that are padding in all of them."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.h.device)
        if len(rows) == 0:
            raise InputError("select got no rows; stop when no utterance is left")
        T = int(self.lengths.index_select(0, rows).max())

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows)[:, :T]

        h, frames = pick(self.h), self.frames.select(rows).trim(T)
        assert h is not None
        branch_frames = self.branch_frames
        if branch_frames is not None:
            branch_frames = branch_frames.select(rows)
            branch_frames = branch_frames.trim(int(branch_frames.lengths.max()))
        branch_input, logits = pick(self.branch_input), pick(self.logits)
        return EncoderState(h, self.layer, frames, branch_frames, branch_input, logits)


class Branch(nn.Module):
    """A layer over fewer frames, parallel to a span of the trunk: scale * up(layer(down(x)))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.down = Downsample(config.branch_factor, config.branch_pool == "learned")
        self.layer = ConformerLayer(config)
        scale = config.branch_scale
        self.scale = None if scale is None else nn.Parameter(torch.full((config.d_model,), scale))

    def forward(self, x: Tensor, frames: Frames, branch_frames: Frames) -> Tensor:
        y = self.layer(self.down(x, frames.real), branch_frames)
        y = upsample(y, self.down.factor, x.shape[1])
        return y if self.scale is None else self.scale * y


class CTCEncoder(nn.Module):
    """Features to log-probabilities of pieces, at every exit of `config.exits`.

    `embed` starts a state, `run` carries it up, `log_probs` reads it at an exit. With `feedback`
    every exit layer feeds its posteriors back on the way up, h += Linear(softmax(logits)),
    whether or not anybody reads that exit; so leaving at exit k gives what exit k of a full run
    gives. Stopping at exit k computes neither feedback k nor anything after it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        D, V = config.d_model, config.vocab_size
        self.subsampling = Subsampling(config)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))
        self.branches = nn.ModuleDict({str(e): Branch(config) for e in config.branches})
        self._spans = {config.span_start(e) for e in config.branches}
        self.norm = nn.LayerNorm(D) if config.shared_head else None
        self.heads = nn.ModuleList(
            nn.Linear(D, V) for _ in range(1 if config.shared_head else len(config.exits))
        )
        self.feedback = nn.Linear(V, D) if config.feedback else None

    @property
    def device(self) -> torch.device:
        return self._first_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first_weight.dtype

    @property
    def _first_weight(self) -> Tensor:
        return next(self.parameters())

    def init_weights(self, seed: int) -> None:
        """Xavier-uniform matrices, as published; norms 1, biases 0, the branches as configured."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim >= 2:
                    nn.init.xavier_uniform_(p, generator=generator)
                elif name.endswith("bias") or name.endswith("scores"):
                    p.zero_()
                else:
                    p.fill_(self._start(name))

    def _start(self, name: str) -> float:
        scale = self.config.branch_scale
        return scale if scale is not None and name.endswith(".scale") else 1.0

    # -- the tower ---------------------------------------------------------------------------

    def embed(self, features: Tensor, lengths: Tensor) -> EncoderState:
        """features [B, T, F], of which the first `lengths` [B] frames of a row are real.

        InputError: a row too short for a single frame of the tower. Whatever stands in the
        padding, NaN included, changes nothing.
        """
        cfg = self.config
        lengths = lengths.to(features.device)
        self._check_lengths(features, lengths)
        padding = torch.arange(features.shape[1], device=lengths.device) >= lengths[:, None]
        features = features.masked_fill(padding[:, :, None], 0.0).to(self.dtype)
        edge = cfg.edge_frames
        features, lengths = F.pad(features, (0, 0, edge, edge)), lengths + 2 * edge
        h = self.subsampling(features).to(self.dtype)
        for _ in range(cfg.subsampling_layers):
            lengths = torch.div(lengths - 1, 2, rounding_mode="floor")
        T = int(lengths.max())
        h = h[:, :T]
        if cfg.positions == "absolute":
            h = h + sinusoids(T, cfg.d_model, h)
        head_dim = cfg.head_dim if cfg.positions == "rotary" else None
        frames = Frames.of(lengths, T, head_dim, h)
        lower = frames.every(cfg.branch_factor, head_dim, h) if cfg.branches else None
        return EncoderState(self.dropout(h), 0, frames, lower)

    def run(
        self, state: EncoderState, start: int, stop: int, survivors: Tensor | None = None
    ) -> EncoderState:
        """Layers `start` to `stop` - 1, counted from 0; `start` is where `state` stopped.

        survivors: bool [L, B], for training: which utterances pass through which layer.
        """
        if not (start == state.layer and start <= stop <= self.config.num_layers):
            raise InputError(
                f"layers {start} to {stop} were asked for; allowed: from {state.layer}, where the "
                f"state stopped, to at most {self.config.num_layers}"
            )
        for index in range(start, stop):
            state = self._step(state, index, None if survivors is None else survivors[index])
        return state

    def log_probs(self, state: EncoderState, exit_layer: int) -> Tensor:
        """float32 [B, T', V] at the exit that `state` has just reached."""
        return self.logits(state, exit_layer).float().log_softmax(-1)

    def logits(self, state: EncoderState, exit_layer: int) -> Tensor:
        """What `log_probs` normalises, in the dtype of the computation."""
        if exit_layer not in self.config.exits or exit_layer != state.layer:
            raise InputError(
                f"exit layer is {exit_layer}, and {state.layer} layers ran; it must be one of "
                f"{', '.join(map(str, self.config.exits))}, just reached"
            )
        return self._head(state.h, exit_layer) if state.logits is None else state.logits

    # -- one layer ---------------------------------------------------------------------------

    def _step(self, state: EncoderState, index: int, survivors: Tensor | None) -> EncoderState:
        h, branch_input, exit_layer = state.h, state.branch_input, index + 1
        if self.feedback is not None and state.logits is not None:
            h = h + self.feedback(state.logits.float().softmax(-1).to(self.dtype))
        if index in self._spans:
            branch_input = h
        h = self._layer(index, h, state.frames, survivors)
        if exit_layer in self.config.branches:
            assert branch_input is not None and state.branch_frames is not None
            branch = self.branches[str(exit_layer)]
            h = h + branch(branch_input, state.frames, state.branch_frames)
            branch_input = None
        logits = None
        if self.feedback is not None and exit_layer in self.config.exits:
            # The answer and the feedback both read these.
            logits = self._head(h, exit_layer)
        return replace(state, h=h, layer=exit_layer, branch_input=branch_input, logits=logits)

    def _layer(self, index: int, h: Tensor, frames: Frames, survivors: Tensor | None) -> Tensor:
        if survivors is None:
            output: Tensor = self.layers[index](h, frames)
            return output

        def run(kept: Tensor, rows: Tensor | None) -> Tensor:
            through: Tensor = self.layers[index](
                kept, frames if rows is None else frames.select(rows)
            )
            return through

        return run_survivors(run, h, survivors)

    def _head(self, h: Tensor, exit_layer: int) -> Tensor:
        if self.norm is not None:
            h, which = self.norm(h), 0
        else:
            which = self.config.exits.index(exit_layer)
        logits: Tensor = self.heads[which](h)
        return logits

    def _check_lengths(self, features: Tensor, lengths: Tensor) -> None:
        cfg = self.config
        if features.ndim != 3 or features.shape[2] != cfg.num_mels or len(lengths) == 0:
            raise InputError(
                f"features have shape {list(features.shape)}; they must be [batch, frames, "
                f"{cfg.num_mels}], with one length per row"
            )
        least = cfg.least_frames
        shortest, longest = (int(n) for n in lengths.aminmax())
        if shortest < least or longest > features.shape[1] or len(lengths) != len(features):
            raise InputError(
                f"lengths are {lengths.tolist()} for features {list(features.shape)}; each row "
                f"needs {least} to {features.shape[1]} frames: leave out shorter recordings"
            )
