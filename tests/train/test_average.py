"""The weights' moving average: what a run with `average` evaluates, keeps and hands out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import CheckpointError, ConfigError
from offramp.train.loop import Evaluated, StepDone, TrainConfig, train

STEPS = 7


class Model(nn.Module):
    """Weights, a frozen one, running statistics and a counter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)
        for p in self.parameters():
            p.data.normal_(generator=generator)
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).relu())
        return y


class Task:
    def __init__(self) -> None:
        self.model: nn.Module = Model()

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().sum()
        loss.backward()
        return {"loss": loss.item(), "targets": 5, "tokens": 5}

    def evaluate(self) -> Mapping[str, float]:
        return {name: float(v.double().sum()) for name, v in self.model.state_dict().items()}


def run(out: Path, stop: int = 0, **changes: Any) -> tuple[Task, list[Any], list[Any]]:
    """(task, events, weights after each step); killed after `stop` steps, if any."""
    every = {"checkpoint_every": 2, "evaluate_every": 3}
    config = TrainConfig(**{"steps": STEPS, "lr": 0.1, "warmup_steps": 2, **every, **changes})
    task, events, weights = Task(), [], []
    for event in train(task, config, out, {}):
        events.append(event)
        if isinstance(event, StepDone):
            weights.append(copy.deepcopy(task.model.state_dict()))
            if event.step == stop:
                break
    return task, events, weights


def averaged(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """From all steps' weights, in double precision: each with its share of the whole."""
    start = Model().state_dict()
    found = {}
    for name, first in start.items():
        total, left = torch.zeros_like(first, dtype=torch.float64), 1.0
        for step in range(len(weights) - 1, -1, -1):
            kept = min(decay, (1 + step) / (10 + step))
            total += left * (1 - kept) * weights[step][name].double()
            left *= kept
        found[name] = total + left * first.double()
        if not first.is_floating_point():
            found[name] = weights[-1][name]
    return found


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_a_run_hands_out_and_evaluates_the_average_of_its_weights(
    decay: float, tmp_path: Path
) -> None:
    task, events, weights = run(tmp_path, average=decay)
    expected = averaged(weights, decay)
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(task.model.state_dict()["last.weight"], weights[-1]["last.weight"])
    looks = {e.step: e.metrics for e in events if isinstance(e, Evaluated)}
    assert list(looks) == [3, 6, 7]
    for step, metrics in looks.items():
        for name, value in averaged(weights[:step], decay).items():
            assert metrics[name] == pytest.approx(float(value.double().sum()), abs=1e-4), name


def test_averaging_does_not_change_the_training(tmp_path: Path) -> None:
    plain, averaging = run(tmp_path / "0"), run(tmp_path / "1", average=0.9)
    for own, other in zip(plain[2], averaging[2], strict=True):
        assert all(torch.equal(own[name], other[name]) for name in own)
    final = plain[0].model.state_dict()
    assert all(torch.equal(final[name], plain[2][-1][name]) for name in final)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_killed_run_goes_on_to_the_same_average(stop: int, tmp_path: Path) -> None:
    whole, events, _ = run(tmp_path / "whole", average=0.5)
    run(tmp_path / "cut", stop, average=0.5)
    resumed, later, _ = run(tmp_path / "cut", average=0.5)
    again, nothing, _ = run(tmp_path / "cut", average=0.5)  # it has ended
    assert nothing == []
    for task in (resumed, again):
        for name, value in whole.model.state_dict().items():
            assert torch.equal(task.model.state_dict()[name], value), name
    assert later[-1] == events[-1]


def test_a_state_without_an_average_is_not_gone_on_from_with_one(tmp_path: Path) -> None:
    run(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"train\.average was 0\.0, is 0\.5"):
        run(tmp_path, average=0.5)
    with pytest.raises(ConfigError, match=r"average is 1\.0"):
        TrainConfig(steps=1, lr=1.0, average=1.0)
