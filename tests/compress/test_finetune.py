"""Zeros stay zeros through the real training loop, and only as long as they are held."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from offramp.compress.adam_saliency import AdamPruning
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.finetune import second_moments, zeros_held
from offramp.compress.magnitude import MagnitudePruning
from offramp.train.loop import TrainConfig, train
from toy_compress import MODELS, outputs

pytestmark = pytest.mark.slow  # the default suite is to stay short


class Fit:
    """Learns to compute random targets from random inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(16, 12, generator=generator) for _ in range(2))
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        return {"loss": float(loss.detach()), "targets": 1.0, "tokens": 16.0}

    def evaluate(self) -> Mapping[str, float]:
        return {}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))


def fit(model: nn.Module, out: Path, steps: int = 5, **changes: object) -> None:
    config = TrainConfig(steps, lr=1e-2, warmup_steps=0, **changes)  # type: ignore[arg-type]
    list(train(Fit(model), config, out, {"model": "net"}))


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"average": 0.5}], ids=str)
def test_zeros_stay_zeros_in_training(changes: dict[str, object], tmp_path: Path) -> None:
    model = MagnitudePruning(0.5).apply(net())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with zeros_held(model):
        fit(model, tmp_path / "held", **changes)
    for name, was in before.items():
        now = model.state_dict()[name]
        if now.ndim == 2:
            assert torch.equal(now == 0, was == 0), name
        assert not torch.equal(now, was), "the rest has learned"
    fit(model, tmp_path / "free", **changes)
    assert not bool((model[0].weight == 0).any()), "the scope is over"


def test_a_killed_run_goes_on_with_the_same_zeros(tmp_path: Path) -> None:
    whole, cut = (MagnitudePruning(0.5).apply(net()) for _ in range(2))
    with zeros_held(whole):
        fit(whole, tmp_path / "whole")
    config = TrainConfig(5, lr=1e-2, warmup_steps=0, checkpoint_every=2)
    with zeros_held(cut):
        for event in train(Fit(cut), config, tmp_path / "cut", {"model": "net"}):
            if getattr(event, "path", None):
                break
    again = MagnitudePruning(0.5).apply(net())
    with zeros_held(again):
        fit(again, tmp_path / "cut")
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_the_scope_ends_with_an_error_too() -> None:
    model = MagnitudePruning(0.5).apply(net())
    with pytest.raises(RuntimeError, match="mine"), zeros_held(model):
        raise RuntimeError("mine")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 12)).sum().backward()
    optimizer.step()
    assert int((model[2].weight == 0).sum()) < 120


def test_moments_are_those_of_the_optimizer_and_prune(tmp_path: Path) -> None:
    model = net()
    with second_moments(model) as moments:
        fit(model, tmp_path)
    assert moments.keys() == dict(model.named_parameters()).keys()
    assert all(bool((v >= 0).all()) and bool(v.any()) for v in moments.values())
    pruned = AdamPruning(0.5, moments).apply(model)
    score = model[0].weight.square() * moments["0.weight"].sqrt()
    kept = pruned[0].weight != 0
    assert int(kept.sum()) == 120
    assert score[kept].min() >= score[~kept].max()
    with second_moments(model) as none:
        fit(model, tmp_path / "muon", optimizer="muon")
    assert none.keys() == {"0.bias", "2.bias"}, "matrices were Muon's"


def test_a_smaller_model_trains_like_any_other() -> None:
    model = FeedForwardPruning(0.5).apply(MODELS["ctc, ours"]().requires_grad_(True))
    assert all(p.requires_grad for p in model.parameters())
    before = outputs(model)
    x = torch.randn(2, 40, 8)
    state = model.run(model.embed(x, torch.tensor([40, 40])), 0, 5)
    model.log_probs(state, 5).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(outputs(model), before)
