"""A toy transducer: random weights, every part matters, milliseconds per test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import toy_encoder
from offramp.config import Chunking, TransducerConfig
from offramp.models.transducer import Transducer

CHUNKING = Chunking(chunk=3, left_context=4, right_context=1)
SIZES: dict[str, Any] = {
    "d_model": 16,
    "num_layers": 3,
    "num_heads": 2,
    "d_ff": 24,
    "vocab_size": 11,
    "d_predictor": 12,
    "d_joint": 20,
    "chunking": CHUNKING,
    "num_mels": 8,
    "time_reduction": 2,
}

# As published, every option on its own, and what helps all together.
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {"predictor_layers": 2},
    "stateless": {"predictor": "stateless"},
    "stateless, one token": {"predictor": "stateless", "predictor_context": 1},
    "rotary": {"positions": "rotary"},
    "convolution": {"kernel_size": 5},
    "a kernel longer than the chunk": {"kernel_size": 9},
    "pointwise kernel": {"kernel_size": 1},
    "every feature frame": {"time_reduction": 1},
    "halving": {"subsampling": "halving", "time_reduction": 4},
    "factorised blank": {"factorised_blank": True},
    "factorised blank, not the first": {"factorised_blank": True, "blank_id": 4},
    "ctc head": {"ctc_head": True},
    "all together": {
        "predictor": "stateless",
        "predictor_context": 3,
        "time_reduction": 4,
        "positions": "rotary",
        "kernel_size": 4,
        "factorised_blank": True,
        "ctc_head": True,
        "blank_id": 10,
    },
}

ENCODERS = {
    name: VARIANTS[name]
    for name in ("published", "rotary", "a kernel longer than the chunk", "halving", "all together")
}
PREDICTORS = {
    name: VARIANTS[name]
    for name in ("published", "stateless", "stateless, one token", "all together")
}

# What one model may be asked to serve.
CHUNKINGS: dict[str, Chunking] = {
    "default": CHUNKING,
    "frame by frame": Chunking(1, 4),
    "no left context": Chunking(4, 0, 1),
    "nothing around": Chunking(5, 0),
    "right context longer than the chunk": Chunking(2, 3, 4),
    "left context of many chunks": Chunking(2, 11, 1),
    "all in one chunk": Chunking(64, 2, 2),
    "memory": Chunking(3, 4, 1, memory=2),
    "memory alone": Chunking(2, 0, 0, memory=3),
    "memory longer than the past": Chunking(4, 2, 1, memory=50),
}
# By the default suite, of large matrices.
KEPT = ("published", "all together")
KEPT_CHUNKINGS = ("default", "right context longer than the chunk", "memory")


def config(**changes: Any) -> TransducerConfig:
    return TransducerConfig(**{**SIZES, **changes})


def transducer(seed: int = 0, **changes: Any) -> Transducer:
    """A transducer with random weights and statistics, in eval mode, without gradients."""
    model = Transducer(config(**changes))
    toy_encoder.randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    norm = model.encoder.feature_norm
    norm.mean.normal_(0.0, 0.5, generator=generator)
    norm.inverse_std.uniform_(0.5, 2.0, generator=generator)
    return model.requires_grad_(False).eval()


def streamed(
    model: Transducer,
    features: Tensor,
    lengths: Tensor,
    pieces: list[int],
    chunking: Chunking | None = None,
) -> tuple[Tensor, Tensor]:
    """What a stream writes that gets `pieces` feature frames at a time, over and over, and ends."""
    found, at, turn = [], 0, 0
    with model.streaming(len(features), chunking) as state:
        while at < features.shape[1]:
            piece = features[:, at : at + pieces[turn % len(pieces)]]
            real = (lengths - at).clamp(0, piece.shape[1])
            found.append(model.encoder.push(piece, state, real))
            at, turn = at + piece.shape[1], turn + 1
        found.append(model.encoder.finish(state))
    outputs, counts = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), torch.stack(counts).sum(dim=0)
