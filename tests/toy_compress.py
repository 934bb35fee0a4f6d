"""Every model of the project in toy size, every compression method, and what a model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import toy
import toy_encoder
import toy_transducer
from offramp.compress.adam_saliency import AdamPruning
from offramp.compress.blocks import BlockPruning
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.heads import HeadPruning
from offramp.compress.low_rank import LowRank
from offramp.compress.magnitude import MagnitudePruning
from offramp.compress.method import CompressionMethod
from offramp.compress.quantize import WeightQuantization
from offramp.compress.rows import RowPruning
from offramp.models.ctc import CTCEncoder
from offramp.models.decoder_lm import DecoderLM

MODELS: dict[str, Callable[[], Any]] = {
    "decoder, grouped heads": toy.decoder,
    "decoder, biases, q/k norm": lambda: toy.decoder(
        qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, head_dim=16
    ),
    "decoder, tied": lambda: toy.decoder(tied_embeddings=True),
    "ctc, early-exit baseline": toy_encoder.encoder,
    "ctc, ours": lambda: toy_encoder.encoder(**toy_encoder.OURS),
    "transducer, published": lambda: toy_transducer.transducer(
        **toy_transducer.VARIANTS["published"]
    ),
    "transducer, all together": lambda: toy_transducer.transducer(
        **toy_transducer.VARIANTS["all together"]
    ),
}


class Moments(dict[str, Tensor]):
    """Second moments of any parameter: random, the same each time, of the shape asked for."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(3)
        super().__init__(
            (name, torch.rand(p.shape, generator=generator)) for name, p in model.named_parameters()
        )


# level -> method. A new method is added here, and passes test_matrix.py unchanged.
LEVELLED: dict[str, Callable[[nn.Module, float], CompressionMethod]] = {
    "magnitude": lambda _, level: MagnitudePruning(level),
    "global magnitude": lambda _, level: MagnitudePruning(level, "global"),
    "Adam, w2 sqrt v": lambda model, level: AdamPruning(level, Moments(model)),
    "Adam, w2 v": lambda model, level: AdamPruning(level, Moments(model), "w2_v", "global"),
    "blocks": lambda _, level: BlockPruning(level),
    "global blocks": lambda _, level: BlockPruning(level, "global"),
    "rows": lambda _, level: RowPruning(level),
    "heads": lambda _, level: HeadPruning(level),
    "feed-forward": lambda _, level: FeedForwardPruning(level),
    "low rank": lambda _, level: LowRank(level),
}
METHODS: dict[str, Callable[[nn.Module], CompressionMethod]] = {
    **{name: (lambda model, make=make: make(model, 0.5)) for name, make in LEVELLED.items()},
    "int8": lambda _: WeightQuantization(8, "int8"),
    "int8, bf16 activations": lambda _: WeightQuantization(8, "bfloat16"),
    "int4": lambda _: WeightQuantization(4),
}


def outputs(model: Any) -> Tensor:
    """All that the model computes from the same random inputs, flat."""
    with torch.no_grad():
        if isinstance(model, DecoderLM):
            return model.logits(toy.run(model, toy.tokens(2, 7)), model.config.num_layers).flatten()
        if isinstance(model, CTCEncoder):
            found = toy_encoder.every_exit(model, *toy_encoder.features([61, 40]))[0]
            real = [y[row, :n] for y in found.values() for row, n in ((0, 12), (1, 7))]
            return torch.cat([y.flatten() for y in real])
        x, n = toy_encoder.features([61, 40])
        encoded, lengths = model.encoder(x, n)
        predicted = model.predictor(toy.tokens(2, 3, model.config.vocab_size))
        logits = model.joiner(encoded[:, :, None], predicted[:, None])
        return torch.cat([logits[row, : int(t)].flatten() for row, t in enumerate(lengths)])
