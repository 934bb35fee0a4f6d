"""Peak memory of one training step: loss at the last exit, at all exits, and at all exits jointly.

Run it with Python: it starts one process for each way and prints what each added to its peak
resident memory. The loss at all exits should cost little more than the last exit's; the joint
loss, which holds the logits of all exits at once, is what `early_exit_backward` avoids.
"""

import resource
import subprocess
import sys

import torch

from offramp.config import DecoderConfig
from offramp.models.decoder_lm import DecoderLM
from offramp.train.layerskip import forward_exits
from offramp.train.losses import ExitHead, early_exit_backward, early_exit_loss

WAYS = ("last exit", "all exits", "all exits, jointly")
L, V, B, T = 12, 32_000, 4, 256
SHAPE = DecoderConfig(V, 192, L, 6, 2, 32, 640, max_positions=T, tied_embeddings=True)


def step(way: str) -> float:
    """MiB that one forward and backward pass added to the peak."""
    model = DecoderLM(SHAPE)
    model.init_weights(0)
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    exits = [L - 1] if way == "last exit" else list(range(L))
    weights = dict.fromkeys(exits, 1 / len(exits))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hidden = forward_exits(model, tokens, set(exits), torch.ones(L, B, dtype=torch.bool), None)
    flat, head = (
        {i: h.flatten(0, 1) for i, h in hidden.items()},
        ExitHead(model.norm, model.embedding.weight),
    )
    if way == "all exits, jointly":
        early_exit_loss(head, flat, tokens.flatten(), weights).backward()
    else:
        early_exit_backward(head, flat, tokens.flatten(), weights, scale=1.0, chunk=256)
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
