"""The LayerSkip task: what one shard of one step's batch adds to the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toy
from offramp.errors import ConfigError
from offramp.nn.layer_dropout import TIME_SCHEDULES
from offramp.train import layerskip
from offramp.train.evaluation import exit_nll
from offramp.train.layerskip import LayerSkipConfig, LayerSkipTask
from offramp.train.schedules import CURRICULA, ExitCurriculum

STEPS = 20
FULL = LayerSkipConfig(
    p_max=0.5,
    dropout_schedule="exp",
    early_exit_scale=0.5,
    curriculum=ExitCurriculum("rotational", 3),
    distill=0.2,
)


def task(settings: LayerSkipConfig = FULL, **options: Any) -> LayerSkipTask:
    model = toy.decoder(tied_embeddings=True).requires_grad_(True).train()
    return LayerSkipTask(model, toy.Batches(), settings, STEPS, seed=5, **options)


def gradient(of: LayerSkipTask) -> Tensor:
    """All gradients as one vector, and none left behind."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in of.model.parameters()]
    of.model.zero_grad()
    return torch.cat([p.flatten() for p in parts])


def test_without_settings_it_trains_the_last_exit_plainly() -> None:
    it = task(LayerSkipConfig(early_exit_scale=0.0))
    sums = it.backward(3, 0, 1)
    ours, batch = gradient(it), it.batches.batch(3, 0, 1)
    h, view = it.model.embed(batch.tokens), it.model.view(7)
    for i in range(5):
        h = it.model.layer(i, h, view)
    logits = it.model.logits(h, 5).flatten(0, 1)
    loss = F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")
    (loss / batch.total_targets).backward()
    torch.testing.assert_close(ours, gradient(it), rtol=1e-4, atol=1e-6)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (sums["targets"], sums["tokens"]) == (20, 28)


def test_what_a_step_adds_is_a_function_of_seed_and_step_alone() -> None:
    it = task()
    it.backward(15, 0, 1)
    first = gradient(it)
    torch.manual_seed(1)
    it.backward(14, 0, 1)
    other = gradient(it)
    it.backward(15, 0, 1)
    assert torch.equal(gradient(it), first)
    assert not torch.equal(other, first)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_add_up_to_the_whole_batch(num_shards: int) -> None:
    it = task(LayerSkipConfig(early_exit_scale=0.5, distill=0.2))
    whole = it.backward(3, 0, 1)
    expected = gradient(it)
    parts = [it.backward(3, shard, num_shards) for shard in range(num_shards)]
    torch.testing.assert_close(gradient(it), expected, rtol=1e-4, atol=1e-6)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value)


def test_every_shard_drops_as_many_samples_in_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one process would wait for the others."""
    it, drawn, draw = task(), [], layerskip.draw_survivors
    monkeypatch.setattr(layerskip, "draw_survivors", lambda *a: drawn.append(s := draw(*a)) or s)
    for step in range(10, 15):
        drawn.clear()
        for shard in range(2):
            it.backward(step, shard, 2)
        assert torch.equal(drawn[0], drawn[1])
    assert not drawn[0].all()


@pytest.mark.parametrize("kind", CURRICULA)
@pytest.mark.parametrize("schedule", TIME_SCHEDULES)
def test_each_curriculum_trains_with_finite_gradients(kind: str, schedule: str) -> None:
    it = task(LayerSkipConfig(0.5, schedule, 0.5, ExitCurriculum(kind, 2), 0.1))
    for step in (0, 7, STEPS - 1):
        it.backward(step, 0, 1)
        assert gradient(it).isfinite().all()


def test_autocast_changes_gradients_by_rounding_only() -> None:
    exact, rounded = task(), task(autocast=torch.bfloat16)
    for step in (0, 16, 17):
        exact.backward(step, 0, 1)
        rounded.backward(step, 0, 1)
        a, b = gradient(exact), gradient(rounded)
        assert b.dtype == torch.float32
        assert 0.0 < float((a - b).norm() / a.norm()) < 0.05


def test_training_lowers_every_exits_loss() -> None:
    it = task(LayerSkipConfig(p_max=0.1, early_exit_scale=1.0, curriculum=ExitCurriculum("all")))
    batch = it.batches.batch(0, 0, 1)
    before, count = exit_nll(it.model, [batch])
    optimizer = torch.optim.Adam(it.model.parameters(), lr=1e-2)
    for _ in range(8):
        it.backward(0, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    after, _ = exit_nll(it.model, [batch])
    assert count == 20
    assert all(a < b for a, b in zip(after[1:], before[1:], strict=True))


def test_exit_nll_is_the_cross_entropy_of_every_exit_over_all_batches() -> None:
    model, batches = toy.decoder(), [toy.Batches().batch(i, 0, 1) for i in range(2)]
    sums, count = exit_nll(model, batches)
    assert count == 40
    for i in range(5):
        expected = 0.0
        for b in batches:
            h, view = model.embed(b.tokens), model.view(7)
            for layer in range(i + 1):
                h = model.layer(layer, h, view)
            logits = model.logits(h, i + 1).flatten(0, 1)
            expected += float(F.cross_entropy(logits, b.targets.flatten(), reduction="sum"))
        assert sums[i] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"p_max": 1.0}, "p_max is 1.0; it must be a number of at least 0 and less than 1"),
        ({"p_max": -0.1}, "p_max is -0.1"),
        ({"dropout_schedule": "linear"}, "'linear'; allowed: constant, exp"),
        ({"early_exit_scale": -1.0}, "early_exit_scale is -1.0; it must be a number of at l"),
        ({"early_exit_scale": math.nan}, "early_exit_scale is nan"),
        ({"early_exit_scale": math.inf}, "early_exit_scale is inf"),
        ({"p_max": math.nan}, "p_max is nan"),
        ({"distill": math.nan}, "distill is nan"),
        ({"distill": 1.5}, "distill is 1.5; it must lie between 0 and 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LayerSkipConfig(**changes)
