"""A toy CTC encoder: random weights, every branch and exit matters, milliseconds per test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.config import EncoderConfig
from offramp.models.ctc import CTCEncoder, EncoderState

SIZES: dict[str, Any] = {
    "d_model": 16,
    "num_layers": 5,
    "num_heads": 2,
    "d_ff": 24,
    "kernel_size": 5,
    "vocab_size": 11,
    "exits": (2, 3, 5),
    "num_mels": 8,
}
OURS: dict[str, Any] = {
    "pad_edges": True,
    "subsampling_activation": "silu",
    "positions": "rotary",
    "conv_norm": "layer",
    "shared_head": True,
    "feedback": True,
    "branches": (2, 5),
    "branch_pool": "learned",
    "branch_scale": 0.5,
}

# Every option on its own, the published models, ours, and ours with each option taken out.
VARIANTS: dict[str, dict[str, Any]] = {
    "early-exit baseline": {},
    "splitformer": {"branches": (2, 5)},
    "full-rate branches": {"branches": (2, 5), "branch_factor": 1},
    "branches everywhere, third of the rate": {"branches": (2, 3, 5), "branch_factor": 3},
    "ours": OURS,
    "subsampling of 2": OURS | {"subsampling": 2},
    "subsampling of 8": OURS | {"subsampling": 8},
    "edges cut off": OURS | {"pad_edges": False},
    "linear subsampling": OURS | {"subsampling_activation": "none"},
    "absolute positions": OURS | {"positions": "absolute"},
    "batch norm": OURS | {"conv_norm": "batch"},
    "no feedback": OURS | {"feedback": False},
    "own heads": OURS | {"feedback": False, "shared_head": False},
    "no branches": OURS | {"branches": ()},
    "first frame of a pair": OURS | {"branch_pool": "first"},
    "unscaled branches": OURS | {"branch_scale": None},
    "learned thirds": OURS | {"branch_factor": 3},
}
# By the default suite, of large matrices.
KEPT = ("splitformer", "branches everywhere, third of the rate", "ours")


def config(**changes: Any) -> EncoderConfig:
    return EncoderConfig(**{**SIZES, **changes})


def encoder(seed: int = 0, **changes: Any) -> CTCEncoder:
    """An encoder with random weights and statistics, in eval mode, without gradients."""
    model = CTCEncoder(config(**changes))
    randomize(model, seed)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Matrices keep the size of their input, about; vectors are 1 (norms) or 0, and a bit."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
        else:
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2, generator=generator)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_(0.0, 0.2, generator=generator)
        elif name.endswith("running_var"):
            b.uniform_(0.5, 2.0, generator=generator)


def features(lengths: list[int], num_mels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(random features [B, max T, F], lengths [B]); the padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), num_mels, generator=generator)
    for row, n in enumerate(lengths):
        x[row, n:] = torch.nan
    return x, torch.tensor(lengths)


def every_exit(
    model: CTCEncoder, x: Tensor, lengths: Tensor
) -> tuple[dict[int, Tensor], EncoderState]:
    """(log-probabilities at every exit, the final state), stopping at each exit."""
    state, found = model.embed(x, lengths), {}
    for exit_layer in model.config.exits:
        state = model.run(state, state.layer, exit_layer)
        found[exit_layer] = model.log_probs(state, exit_layer)
    return found, state
