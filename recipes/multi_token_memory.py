"""Peak memory of one training step with one head, with eight, and with eight jointly.

Run it with Python: it starts one process for each way and prints what each added to its peak
resident memory. Eight heads should cost little more than one; the joint loss, which holds the
logits of all heads at once, is what `multi_token_backward` avoids.
"""

import resource
import subprocess
import sys

import torch

from offramp.config import DecoderConfig
from offramp.config_speech_lm import HeadsConfig
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.heads import build_heads
from offramp.train.multi_token import multi_token_backward, multi_token_loss

WAYS = {"1 head": 1, "8 heads": 8, "8 heads, jointly": 8}
L, V, B, T = 4, 32_000, 4, 128
SHAPE = DecoderConfig(V, 192, L, 6, 2, 32, 640, max_positions=T, tied_embeddings=True)


def step(way: str) -> float:
    """MiB that one forward and backward pass added to the peak."""
    model, count = DecoderLM(SHAPE), WAYS[way]
    model.init_weights(0)
    heads = build_heads(HeadsConfig(count), SHAPE) if count > 1 else None
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hidden, view = model.embed(tokens), model.view(T)
    for index in range(L):
        hidden = model.layer(index, hidden, view)
    if way.endswith("jointly"):
        multi_token_loss(model, heads, hidden, tokens, [1.0] * count).backward()
    else:
        _, gradient = multi_token_backward(model, heads, hidden, tokens, [1.0] * count, 1.0)
        hidden.backward(gradient)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"{step(sys.argv[1]):.0f}")
    else:
        print(f"{L} layers, {B * T} positions, vocabulary {V:,}, fp32")
        for way in WAYS:
            made = subprocess.run(
                [sys.executable, __file__, way], capture_output=True, text=True, check=True
            )
            print(f"{way:20} {int(made.stdout):6,} MiB")
