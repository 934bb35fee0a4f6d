"""The CTC task: the loss by brute force, what a step adds, and a killed run that goes on."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toy_batches
import toy_encoder
from offramp.decoding.exit_policies import edit_distance
from offramp.errors import ConfigError, DataError
from offramp.models.ctc import CTCEncoder
from offramp.train.augment import SpecAugment
from offramp.train.ctc import (
    CTCTask,
    CTCTraining,
    SpeechBatch,
    ctc_nll,
    disagreement,
    distillation,
    forward_exits,
    frames_needed,
)
from offramp.train.loop import Evaluated, StepDone, TrainConfig, train
from offramp.train.schedules import ExitCurriculum
from thinned import thinned
from toy_batches import Batches, Fixed

STEPS = 6
EVERYTHING = CTCTraining(
    curriculum=ExitCurriculum("rotational", 2, weighting="uniform"),
    early_exit_scale=0.5,
    distill=0.3,
    p_max=0.5,
    augment=SpecAugment(1, 3, 2, 0.1),
    consistency=0.2,
)


LENGTHS = (61, 40, 52, 47)
VOCAB_SIZE = 11
BATCHES = Batches(LENGTHS, VOCAB_SIZE)


def speech(seed: int, lengths: tuple[int, ...] = LENGTHS) -> SpeechBatch:
    return toy_batches.speech(seed, lengths, VOCAB_SIZE)


def task(training: CTCTraining | None = None, seed: int = 0, **options: Any) -> CTCTask:
    changes = {**toy_encoder.OURS, **options.pop("changes", {})}
    model = toy_encoder.encoder(seed, **changes).requires_grad_(True).train()
    batches = options.pop("batches", BATCHES)
    return CTCTask(model, batches, training or CTCTraining(), STEPS, seed=5, **options)


def gradient(of: CTCTask) -> Tensor:
    """All gradients as one vector, and none left behind."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in of.model.parameters()]
    of.model.zero_grad()
    return torch.cat([p.flatten() for p in parts])


# -- the loss ----------------------------------------------------------------------------------


def collapse(path: tuple[int, ...], blank: int) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != blank]


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 3], [3, 1, 3], [1, 1, 1]], ids=str)
def test_ctc_sums_over_every_alignment(tokens: list[int], blank: int) -> None:
    V, lengths = 4, [5, 3]
    log_probs = torch.randn(2, 2, 5, V, generator=torch.Generator().manual_seed(0))
    log_probs = log_probs.log_softmax(-1)
    found = ctc_nll(log_probs, torch.tensor(lengths), [tokens, tokens], blank)
    for e, row in itertools.product(range(2), range(2)):
        total = 0.0
        for path in itertools.product(range(V), repeat=lengths[row]):
            if collapse(path, blank) == tokens:
                total += math.exp(sum(float(log_probs[e, row, t, v]) for t, v in enumerate(path)))
        nll = -math.log(total) if total else math.inf
        assert found[e, row].item() == pytest.approx(nll, rel=1e-4)
        assert math.isinf(nll) == (lengths[row] < frames_needed(tokens))


def test_distillation_is_kl_from_the_deepest_exit_over_real_frames() -> None:
    logits = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    p = logits.log_softmax(-1)
    kl = distillation(p, torch.tensor([4, 2]))
    for e in range(3):
        for row, n in enumerate((4, 2)):
            expected = F.kl_div(p[e, row, :n], p[2, row, :n], log_target=True, reduction="sum")
            assert kl[e, row].item() == pytest.approx(expected.item(), abs=1e-5)
    (grad,) = torch.autograd.grad(kl[:2].sum(), logits)
    assert not grad[2].any()
    assert grad[0].any() and not grad[:, 1, 2:].any()


def test_disagreement_is_kl_from_the_other_view_over_real_frames() -> None:
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    p, lengths = logits.log_softmax(-1), (5, 3)
    kl = disagreement(p, torch.tensor([*lengths, *lengths]))
    for e, row in itertools.product(range(3), range(4)):
        n, other = lengths[row % 2], (row + 2) % 4
        expected = F.kl_div(p[e, row, :n], p[e, other, :n], log_target=True, reduction="sum")
        assert kl[e, row].item() == pytest.approx(expected.item(), abs=1e-5)
    (grad,) = torch.autograd.grad(kl[:, 1].sum(), logits)
    assert grad[:, 1, :3].any() and not grad[:, 1, 3:].any()
    assert not grad[:, [0, 2, 3]].any(), "the other view does not move"


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ([], [], 0),
        ([1], [], 1),
        ([], [1, 2], 2),
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3], [1, 3], 1),
        ([1, 2, 3, 4], [2, 3, 4, 5], 2),
        ([1, 1, 1], [2, 2], 3),
        ([5, 1, 2, 6, 3], [1, 2, 3], 2),
    ],
)
def test_edit_distance_counts_the_least_edits(a: list[int], b: list[int], distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


# -- one step ----------------------------------------------------------------------------------


def plain_loss(model: CTCEncoder, batch: SpeechBatch, distill: float = 0.0) -> Tensor:
    """The mean over exits of each utterance's loss, one utterance and one exit at a time."""
    total = torch.zeros(())
    exits = model.config.exits
    for row, tokens in enumerate(batch.targets):
        n = batch.lengths[row : row + 1]
        found, _ = toy_encoder.every_exit(model, batch.features[row : row + 1, : int(n)], n)
        for log_probs in found.values():
            nll = F.ctc_loss(
                log_probs.transpose(0, 1),
                torch.tensor([tokens]),
                torch.tensor([log_probs.shape[1]]),
                torch.tensor([len(tokens)]),
                reduction="sum",
            )
            if log_probs is not found[exits[-1]]:
                teacher = found[exits[-1]].detach()
                kl = F.kl_div(log_probs, teacher, log_target=True, reduction="sum")
                nll = (1 - distill) * nll + distill * kl
            total = total + nll / len(exits)
    return total


@pytest.mark.parametrize("distill", [0.0, 0.4])
def test_a_step_adds_the_gradient_of_the_mean_loss_per_token(distill: float) -> None:
    it = task(CTCTraining(distill=distill))
    sums = it.backward(3, 0, 1)
    ours, batch = gradient(it), BATCHES.batch(3, 0, 1)
    assert isinstance(it.model, CTCEncoder)
    (plain_loss(it.model, batch, distill) / 12).backward()
    torch.testing.assert_close(ours, gradient(it), rtol=1e-3, atol=1e-6)
    exits = [sums[f"loss_exit_{e}"] for e in (2, 3, 5)]
    if distill == 0.0:
        assert sum(exits) / 3 == pytest.approx(plain_loss(it.model, batch).item(), rel=1e-4)
    assert sums["loss"] == exits[-1]
    assert (sums["targets"], sums["tokens"], sums["infeasible"]) == (12, 200, 0)
    assert sums["audio_s"] == 2.0


def two_view_loss(it: CTCTask, batch: SpeechBatch, step: int, distill: float) -> Tensor:
    """CR-CTC at every exit, one utterance and one exit at a time: the mean CTC of both views,
    and alpha times the mean of both divergences."""
    model, cfg = it.model, it.training
    assert isinstance(model, CTCEncoder) and cfg.augment is not None
    draw = np.random.SeedSequence((5, step, 0)).generate_state(2).tolist()[0]
    many = dataclasses.replace(cfg.augment, time_masks=5)
    both = torch.cat((batch.features, batch.features)), torch.cat((batch.lengths, batch.lengths))
    views = many(*both, torch.Generator().manual_seed(draw)).chunk(2)
    assert not torch.equal(views[0].nan_to_num(), views[1].nan_to_num())
    total = torch.zeros(())
    for row, n in enumerate(batch.lengths.tolist()):
        tokens = batch.targets[row]
        alone = [view[row : row + 1, :n] for view in views]
        seen = [toy_encoder.every_exit(model, x, torch.tensor([n]))[0] for x in alone]
        for e, last in itertools.product(seen[0], [max(seen[0])]):
            for one, other in (seen, seen[::-1]):
                own, T = one[e], one[e].shape[1]
                sizes = (torch.tensor([T]), torch.tensor([len(tokens)]))
                ids = torch.tensor([tokens])
                nll = F.ctc_loss(own.transpose(0, 1), ids, *sizes, reduction="sum")
                if e != last:
                    teacher = one[last].detach()
                    kl = F.kl_div(own, teacher, log_target=True, reduction="sum")
                    nll = (1 - distill) * nll + distill * kl
                apart = F.kl_div(own, other[e].detach(), log_target=True, reduction="sum")
                total = total + (nll + cfg.consistency * apart) / 2 / len(seen[0])
    return total


@pytest.mark.parametrize("distill", thinned([0.0, 0.4], keep=[0.4]))
def test_two_views_are_drawn_together_at_every_exit(distill: float) -> None:
    augment = SpecAugment(1, 3, 2, 0.2)
    it = task(CTCTraining(distill=distill, consistency=0.7, augment=augment))
    sums = it.backward(3, 0, 1)
    found, batch = gradient(it), BATCHES.batch(3, 0, 1)
    (two_view_loss(it, batch, 3, distill) / 12).backward()
    torch.testing.assert_close(found, gradient(it), rtol=1e-3, atol=1e-6)
    assert (sums["targets"], sums["tokens"], sums["audio_s"]) == (12, 200, 2.0), "counted once"
    once = task(CTCTraining(distill=distill, augment=augment)).backward(3, 0, 1)
    assert sums["loss"] == pytest.approx(once["loss"], rel=0.5), "the mean of the views"


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_add_up_to_the_whole_batch(num_shards: int) -> None:
    it = task(CTCTraining(distill=0.2))
    whole = it.backward(3, 0, 1)
    expected = gradient(it)
    parts = [it.backward(3, shard, num_shards) for shard in range(num_shards)]
    torch.testing.assert_close(gradient(it), expected, rtol=1e-3, atol=1e-6)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-5)


def test_what_a_step_adds_is_a_function_of_seed_step_and_shard() -> None:
    it = task(EVERYTHING, changes={"dropout": 0.2})
    it.backward(4, 0, 1)
    first = gradient(it)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    it.backward(5, 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = gradient(it)
    it.backward(4, 0, 1)
    assert torch.equal(gradient(it), first)
    assert not torch.equal(other, first)
    # The same rows as another shard's: other masks, other dropout.
    it.batches = Fixed(speech(0))
    it.backward(4, 0, 1)
    first = gradient(it)
    it.backward(4, 1, 1)
    assert not torch.equal(gradient(it), first)


def test_the_curriculum_chooses_the_exits() -> None:
    it = task(CTCTraining(ExitCurriculum("gradual", weighting="uniform")))
    named = [{k for k in it.backward(s, 0, 1) if k.startswith("loss_")} for s in (0, STEPS - 1)]
    assert named == [{"loss_exit_5"}, {"loss_exit_2", "loss_exit_3", "loss_exit_5"}]
    it = task(CTCTraining(early_exit_scale=0.0, distill=0.5))
    assert [k for k in it.backward(0, 0, 1) if k.startswith("loss_")] == ["loss_exit_5"]


@pytest.mark.parametrize("more", [{}, {"consistency": 0.5, "augment": SpecAugment(0, 0, 0)}])
def test_texts_too_long_for_their_frames_are_counted_and_have_no_loss(
    more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batch = speech(0)
    frames = toy_encoder.config().output_frames(40)
    long = [*batch.targets[:1], [1, 1] * (frames // 2), *batch.targets[2:]]
    bad = dataclasses.replace(batch, targets=long, total_targets=9)
    it = task(CTCTraining(distill=0.2, **more), batches=Fixed(bad))
    with caplog.at_level(logging.WARNING):
        sums = it.backward(0, 0, 1)
    found = gradient(it)
    assert (sums["infeasible"], sums["targets"]) == (1, 9)
    assert math.isfinite(sums["loss"])
    assert "step 0: 1 utterances have more tokens than frames" in caplog.text
    keep = torch.tensor([0, 2, 3])
    rest = SpeechBatch(
        batch.features[keep], batch.lengths[keep], [batch.targets[i] for i in (0, 2, 3)], 1.6
    )
    it.batches = Fixed(rest)
    assert it.backward(0, 0, 1)["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    torch.testing.assert_close(found, gradient(it), rtol=1e-3, atol=1e-6)


def test_a_batch_of_which_nothing_can_be_learnt_is_refused() -> None:
    batch = dataclasses.replace(speech(0), targets=[[1] * 60] * 4)
    with pytest.raises(DataError, match="step 7, shard 0: every text has more tokens"):
        task(batches=Fixed(batch)).backward(7, 0, 1)


def test_autocast_changes_gradients_by_rounding_only() -> None:
    exact, rounded = task(CTCTraining()), task(CTCTraining(autocast="bf16"))
    exact.backward(0, 0, 1)
    rounded.backward(0, 0, 1)
    a, b = gradient(exact), gradient(rounded)
    assert b.dtype == torch.float32
    assert 0.0 < float((a - b).norm() / a.norm()) < 0.05


@pytest.mark.parametrize("changes", thinned(toy_encoder.VARIANTS, toy_encoder.KEPT))
def test_every_model_trains_with_everything_on(changes: dict[str, Any]) -> None:
    model = toy_encoder.encoder(**changes, dropout=0.1).requires_grad_(True).train()
    it = CTCTask(model, BATCHES, EVERYTHING, STEPS, seed=5)
    for step in (0, 1):
        it.backward(step, 0, 1)
        assert gradient(it).isfinite().all()


@pytest.mark.slow
def test_training_learns_to_write_the_batch_at_every_exit() -> None:
    batch = speech(0)
    it = task(CTCTraining(augment=None), batches=Fixed(batch), dev=[batch, batch])
    it.model.load_state_dict(fresh().state_dict())
    before = it.evaluate()
    optimizer = torch.optim.Adam(it.model.parameters(), lr=1e-2)
    for step in range(60):
        it.backward(step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    after = it.evaluate()
    assert it.model.training
    for e in (2, 3, 5):
        assert after[f"loss_exit_{e}"] < 0.3 * before[f"loss_exit_{e}"]
        assert after[f"token_error_rate_exit_{e}"] < 0.2 < before[f"token_error_rate_exit_{e}"]


def fresh() -> CTCEncoder:
    model = CTCEncoder(toy_encoder.config(**toy_encoder.OURS))
    model.init_weights(0)
    return model


# -- evaluation --------------------------------------------------------------------------------


def test_evaluation_is_the_loss_and_greedy_error_rate_of_every_exit() -> None:
    batch, other = speech(0), speech(1, (66, 90))
    frames = toy_encoder.config().output_frames(90)
    other = dataclasses.replace(other, targets=[other.targets[0], [1, 2] * frames])
    it = task(dev=[batch, other])
    it.model.eval().requires_grad_(False)
    assert isinstance(it.model, CTCEncoder)
    found = it.evaluate()
    assert not it.model.training
    assert found["infeasible"] == 1
    nats, errors = dict.fromkeys((2, 3, 5), 0.0), dict.fromkeys((2, 3, 5), 0)
    for part in (batch, other):
        log_probs, lengths = forward_exits(it.model, part.features, part.lengths, (2, 3, 5))
        for e, at_exit in zip((2, 3, 5), log_probs, strict=True):
            for row, tokens in enumerate(part.targets):
                path = at_exit[row, : lengths[row]].argmax(-1)
                errors[e] += edit_distance(collapse(tuple(path.tolist()), 0), tokens)
                nll = ctc_nll(at_exit[None, row : row + 1], lengths[row : row + 1], [tokens], 0)
                nats[e] += 0.0 if nll.isinf() else float(nll)
    for e in (2, 3, 5):
        assert found[f"loss_exit_{e}"] == pytest.approx(nats[e] / 15, rel=1e-4)
        assert found[f"token_error_rate_exit_{e}"] == pytest.approx(errors[e] / (15 + 2 * frames))


def test_without_dev_batches_there_is_nothing_to_report() -> None:
    assert task().evaluate() == {}


# -- the loop ----------------------------------------------------------------------------------


class Killed(BaseException):
    """No `except Exception` stops it."""


class Mortal(CTCTask):
    """Dies in the middle of step `dies_at`."""

    dies_at: int | None = None

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        sums = super().backward(step, shard, num_shards)
        if step == self.dies_at:
            raise Killed
        return sums


def run(out: Path, changes: dict[str, Any], dies_at: int | None = None) -> tuple[Any, list[Any]]:
    model = toy_encoder.encoder(**changes, dropout=0.1).requires_grad_(True).train()
    it = Mortal(model, BATCHES, EVERYTHING, STEPS, seed=5, dev=[speech(0)])
    it.dies_at = dies_at
    every = {"checkpoint_every": 2, "evaluate_every": 3}
    config = TrainConfig(STEPS, lr=1e-2, warmup_steps=2, num_shards=2, **every)
    events = []
    try:
        for event in train(it, config, out, {"model": "toy"}):
            events.append(event)
    except Killed:
        pass
    return model, events


@pytest.mark.parametrize("name", thinned(["ours", "splitformer"], keep=["splitformer"]))
def test_a_killed_run_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Batch norm's running statistics (splitformer) included."""
    changes = toy_encoder.VARIANTS[name]
    whole, events = run(tmp_path / "whole", changes)
    run(tmp_path / "resumed", changes, dies_at=3)
    resumed, later = run(tmp_path / "resumed", changes)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    losses = {e.step: e.loss for e in events if isinstance(e, StepDone)}
    assert {e.step: e.loss for e in later if isinstance(e, StepDone)} == {
        step: losses[step] for step in range(3, STEPS + 1)
    }
    looks = [e for e in events if isinstance(e, Evaluated)]
    assert looks[-1] == later[-1]
    assert {"loss_exit_2", "token_error_rate_exit_5", "infeasible"} <= looks[-1].metrics.keys()


# -- augmentation ------------------------------------------------------------------------------


def masked(augment: SpecAugment, lengths: list[int], seed: int = 0) -> Tensor:
    x = torch.ones(len(lengths), max(lengths), 80)
    generator = torch.Generator().manual_seed(seed)
    return augment(x, torch.tensor(lengths), generator) == 0


def test_masks_hide_whole_bands_and_whole_spans_within_their_limits() -> None:
    lengths = [400, 100, 30]
    for seed in range(20):
        band = masked(SpecAugment(1, 27, 0), lengths, seed)
        assert torch.equal(band, band[:, :1].expand_as(band))
        assert (band[:, 0].sum(1) <= 27).all()
        span = masked(SpecAugment(0, 0, 1, 0.1), lengths, seed)
        assert torch.equal(span, span[:, :, :1].expand_as(span))
        for row, n in enumerate(lengths):
            at = span[row, :, 0].nonzero().flatten()
            assert len(at) <= n // 10
            assert len(at) == 0 or (int(at[-1]) < n and int(at[-1] - at[0]) == len(at) - 1)


def test_masks_are_drawn_from_the_generator_and_differ_by_utterance() -> None:
    hidden = masked(SpecAugment(), [300] * 50)
    assert torch.equal(hidden, masked(SpecAugment(), [300] * 50))
    assert not torch.equal(hidden, masked(SpecAugment(), [300] * 50, seed=1))
    assert len({tuple(row.flatten().tolist()) for row in hidden}) == 50
    assert 0.3 < hidden.float().mean() < 0.6
    widths = masked(SpecAugment(1, 3, 0), [10] * 400)[:, 0].sum(1)
    assert widths.unique().tolist() == [0, 1, 2, 3]
    reached = masked(SpecAugment(1, 3, 0), [10] * 400)[:, 0].any(0)
    assert reached.all()


def test_no_masks_change_nothing() -> None:
    assert not masked(SpecAugment(0, 27, 0), [300, 20]).any()
    x, n = torch.ones(1, 50, 80), torch.tensor([50])
    SpecAugment()(x, n, torch.Generator().manual_seed(0))
    assert (x == 1).all()


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"early_exit_scale": -1.0}, "early_exit_scale is -1.0"),
        ({"distill": 1.5}, "distill is 1.5; it must lie between 0 and 1"),
        ({"p_max": 1.0}, "p_max is 1.0"),
        ({"consistency": -0.1}, "consistency is -0.1"),
        ({"consistency": 0.2}, "consistency is 0.2, which compares two maskings, and augment"),
        ({"dropout_schedule": "linear"}, "'linear'; allowed: constant, exp"),
        ({"autocast": "fp16"}, "autocast is 'fp16'; allowed: bf16, none"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CTCTraining(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"freq_masks": -1}, "freq_masks is -1"),
        ({"max_channels": 2.5}, "max_channels is 2.5"),
        ({"time_masks": None}, "time_masks is None"),
        ({"max_time": 1.0}, "max_time is 1.0; it must be a number of at least 0 and less than 1"),
    ],
    ids=str,
)
def test_masks_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SpecAugment(**changes)


def test_layer_dropout_needs_an_encoder_that_has_it() -> None:
    class Other(nn.Linear):
        config = toy_encoder.config()
        device = torch.device("cpu")

        def embed(self, features: Tensor, lengths: Tensor) -> Any: ...

        def run(self, state: Any, start: int, stop: int) -> Any: ...

        def logits(self, state: Any, exit_layer: int) -> Tensor: ...

    with pytest.raises(ConfigError, match=r"p_max is 0\.5; Other has no layer dropout, use 0"):
        CTCTask(Other(1, 1), BATCHES, EVERYTHING, STEPS, seed=0)
