"""Fine-tuning a pruned model: zeros stay zeros; and the moments that `AdamPruning` asks for.

Both listen to the steps of any optimizer while their scope lasts, so a training loop runs as it
is:

    with zeros_held(task.model):
        for event in train(task, config, out, settings): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


@contextmanager
def zeros_held(model: nn.Module) -> Iterator[None]:
    """Every matrix entry of `model` that is exactly zero now is zero again after each step.

    Gradients of these entries still count in a clipped norm.
    """
    with torch.no_grad():
        masks = [(p, p == 0) for p in model.parameters() if p.ndim >= 2]
    masks = [(p, mask) for p, mask in masks if bool(mask.any())]

    @torch.no_grad()
    def hold(*_: Any) -> None:
        for p, mask in masks:
            p.masked_fill_(mask, 0.0)

    handle = register_optimizer_step_post_hook(hold)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def second_moments(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each step, the second moments of Adam or AdamW by name.

    Parameters that another optimizer steps, such as Muon, have none.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}

    def gather(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p, state in optimizer.state.items():
            if p in names and "exp_avg_sq" in state:
                found[names[p]] = state["exp_avg_sq"]

    handle = register_optimizer_step_post_hook(gather)
    try:
        yield found
    finally:
        handle.remove()
