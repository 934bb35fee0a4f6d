"""The transducer task: what a step adds, what is random, evaluation, and a killed run."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toy_batches
import toy_encoder
import toy_speech
import toy_transducer
from offramp.audio.features import FeatureConfig, normalize
from offramp.config import Chunking
from offramp.decoding.exit_policies import edit_distance
from offramp.decoding.transducer import TransducerSearch
from offramp.errors import ConfigError, DataError
from offramp.models.ctc import CTCEncoder
from offramp.models.transducer import Transducer
from offramp.train.augment import SpecAugment
from offramp.train.ctc import SpeechBatch
from offramp.train.loop import Evaluated, StepDone, TrainConfig, train
from offramp.train.transducer import (
    TransducerReader,
    TransducerTask,
    TransducerTraining,
    measure_features,
)
from offramp.train.transducer_loss import Lattice, transducer_loss
from thinned import thinned
from toy_batches import Batches, Fixed

STEPS = 6
EVERYTHING = TransducerTraining(
    chunks=(2, 5, 0),
    window=2,
    ramp_steps=4,
    fastemit=0.01,
    augment=SpecAugment(1, 3, 2, 0.1),
)


LENGTHS = (31, 20, 26, 23)
VOCAB_SIZE = 10
BATCHES = Batches(LENGTHS, VOCAB_SIZE)


def speech(seed: int, lengths: tuple[int, ...] = LENGTHS) -> SpeechBatch:
    return toy_batches.speech(seed, lengths, VOCAB_SIZE)


def transducer(**changes: Any) -> Transducer:
    changes = {"ctc_head": True, "predictor": "stateless", "positions": "rotary"} | changes
    return toy_transducer.transducer(**changes).requires_grad_(True).train()


def task(training: TransducerTraining | None = None, **options: Any) -> TransducerTask:
    model = transducer(**options.pop("changes", {}))
    batches = options.pop("batches", BATCHES)
    return TransducerTask(model, batches, training or TransducerTraining(), seed=5, **options)


def gradient(of: TransducerTask, part: str = "transducer") -> Tensor:
    return toy_batches.gradient(of, part)


# -- one step ----------------------------------------------------------------------------------


def by_utterance(
    model: Transducer, batch: SpeechBatch, chunking: Chunking | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(nats of the transducer, of CTC) of each utterance, alone, node by node."""
    found, blank = [], model.config.blank_id
    for x, n, tokens in zip(batch.features, batch.lengths, batch.targets, strict=True):
        encoded, frames = model.encoder(x[None, :n], n[None], chunking)
        predicted = model.predictor(torch.tensor([tokens]))
        T, U = int(frames), len(tokens)
        scores = [
            [model.joiner.log_probs(encoded[0, t], predicted[0, u]) for u in range(U + 1)]
            for t in range(T)
        ]
        blanks = torch.stack([torch.stack([p[blank] for p in row]) for row in scores])
        labels = torch.stack(
            [
                torch.stack([p[tok] for p, tok in zip(row, [*tokens, 0], strict=True)])
                for row in scores
            ]
        )
        lattice = Lattice(blanks[None], labels[None])
        nll = transducer_loss(lattice, frames, torch.tensor([U]))[0]
        log_probs = model.ctc_log_probs(encoded).transpose(0, 1)
        sizes = frames, torch.tensor([U])
        ctc = F.ctc_loss(log_probs, torch.tensor([tokens]), *sizes, blank=blank, reduction="sum")
        found.append((nll, ctc))
    return found


@pytest.mark.parametrize("changes", [{}, {"factorised_blank": True, "blank_id": 10}], ids=str)
def test_a_step_adds_the_gradient_of_the_mean_loss_per_token(changes: dict[str, Any]) -> None:
    it = task(TransducerTraining(window=0, ctc=0.4), changes=changes)
    sums = it.backward(3, 0, 1)
    ours, model = gradient(it), it.model["transducer"]
    alone = by_utterance(model, BATCHES.batch(3, 0, 1))
    nll, ctc = (sum(part) for part in zip(*alone, strict=True))
    ((nll + 0.4 * ctc) / 12).backward()
    torch.testing.assert_close(ours, gradient(it), rtol=1e-3, atol=1e-6)
    assert sums["loss"] == pytest.approx(nll.item(), rel=1e-4)
    assert sums["loss_ctc"] == pytest.approx(ctc.item(), rel=1e-4)
    assert (sums["targets"], sums["tokens"], sums["infeasible"]) == (12, 100, 0)
    assert sums["audio_s"] == 1.0 and sums["loss_simple"] == 0.0


def test_windows_of_all_nodes_give_the_exact_step() -> None:
    exact, pruned = (
        task(TransducerTraining(window=window, simple=0.0, fastemit=0.1)) for window in (0, 4)
    )
    assert exact.backward(3, 0, 1)["loss"] == pytest.approx(pruned.backward(3, 0, 1)["loss"])
    torch.testing.assert_close(gradient(exact), gradient(pruned), rtol=1e-3, atol=1e-6)


def test_the_additive_joiner_learns_too_and_smaller_windows_cost_more() -> None:
    whole, narrow = (task(TransducerTraining(window=window)) for window in (4, 2))
    losses = [it.backward(3, 0, 1) for it in (whole, narrow)]
    assert losses[0]["loss"] < losses[1]["loss"] < math.inf, "paths are missing"
    found = task(TransducerTraining(window=2, simple=0.0))
    assert losses[0]["loss"] < found.backward(3, 0, 1)["loss"] < losses[1]["loss"], (
        "the model knows better than a new joiner where its paths run"
    )
    assert not any(name.startswith("simple") for name, _ in found.model.named_parameters())
    assert losses[0]["loss_simple"] == pytest.approx(losses[1]["loss_simple"])
    assert gradient(narrow, "simple").any()


def test_weights_move_from_ctc_to_the_transducer() -> None:
    training = TransducerTraining(simple=0.5, ctc=0.2, ramp_steps=10)
    found = [training.weights(step) for step in (0, 5, 10, 99)]
    seen = [(w.transducer, w.simple, w.ctc) for w in found]
    assert seen[0] == pytest.approx((0.1, 1.0, 1.0))
    assert seen[1] == pytest.approx((0.55, 0.75, 0.6))
    assert seen[2] == seen[3] == pytest.approx((1.0, 0.5, 0.2))
    always = TransducerTraining(ctc=0.0, window=0).weights(0)
    assert (always.transducer, always.simple, always.ctc) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("chunks", [(), (0,)], ids=["own", "whole"])
def test_shards_add_up_to_the_whole_batch(chunks: tuple[int, ...]) -> None:
    it = task(TransducerTraining(chunks=chunks, window=3))
    whole = it.backward(3, 0, 1)
    expected = gradient(it, "")
    parts = [it.backward(3, shard, 2) for shard in range(2)]
    torch.testing.assert_close(gradient(it, ""), expected, rtol=1e-3, atol=1e-6)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-5)


def test_chunks_are_drawn_by_step_and_heard_as_drawn() -> None:
    it = task(TransducerTraining(chunks=(2, 5, 0), window=0, ctc=0.0))
    batch, seen = speech(0, (31, 20)), set()
    it.batches = Fixed(batch)
    sizes = {2: Chunking(2, 4, 1), 5: Chunking(5, 4, 1), 0: Chunking(99, 0)}
    for step in range(12):
        losses = {it.backward(step, shard, 2)["loss"] for shard in (0, 1)}
        assert len(losses) == 1, "the shards of a step have chunks of one size"
        seen |= losses
    model = it.model["transducer"]
    with torch.no_grad():
        heard = [by_utterance(model, batch, chunking) for chunking in sizes.values()]
    expected = [sum(float(nll) for nll, _ in alone) for alone in heard]
    assert sorted(seen) == pytest.approx(sorted(expected), rel=1e-5)


def test_what_a_step_adds_is_a_function_of_seed_step_and_shard() -> None:
    it = task(dataclasses.replace(EVERYTHING, chunks=()), changes={"dropout": 0.2})
    it.batches = Fixed(speech(0))
    it.backward(4, 0, 1)
    first = gradient(it)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    it.backward(5, 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = gradient(it)
    it.backward(4, 0, 1)
    assert torch.equal(gradient(it), first)
    it.backward(4, 1, 1)
    third = gradient(it)
    assert not torch.equal(other, first) and not torch.equal(third, first)


def test_what_is_hidden_becomes_the_mean() -> None:
    it = task(dataclasses.replace(EVERYTHING, augment=SpecAugment(0, 0, 1, 0.9)))
    read: list[Tensor] = []
    hook = it.model["transducer"].encoder.input.register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0])
    )
    it.batches = Fixed(speech(0))
    it.backward(0, 0, 1)
    plain = task(dataclasses.replace(EVERYTHING, augment=None), batches=it.batches)
    hook.remove()
    plain.model["transducer"].encoder.input.register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0])
    )
    plain.backward(0, 0, 1)
    masked, whole = (x[:, :31] for x in read)
    hidden = (masked == 0.0).all(-1) & (whole != 0.0).any(-1)
    assert hidden.any()
    torch.testing.assert_close(masked[~hidden], whole[~hidden], rtol=1e-5, atol=1e-5)


def test_texts_too_long_for_their_frames_are_counted_and_have_no_loss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = speech(0)
    long = [*batch.targets[:1], [1, 2] * 9, *batch.targets[2:]]  # 20 feature frames, 10 of ours
    bad = dataclasses.replace(batch, targets=long, total_targets=9)
    it = task(batches=Fixed(bad))
    with caplog.at_level(logging.WARNING):
        sums = it.backward(0, 0, 1)
    found = gradient(it, "")
    assert (sums["infeasible"], sums["targets"]) == (1, 9)
    assert "step 0: 1 utterances have more tokens than frames" in caplog.text
    keep = torch.tensor([0, 2, 3])
    it.batches = Fixed(
        SpeechBatch(
            batch.features[keep], batch.lengths[keep], [batch.targets[i] for i in (0, 2, 3)], 1.0
        )
    )
    assert it.backward(0, 0, 1)["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    torch.testing.assert_close(found, gradient(it, ""), rtol=1e-3, atol=1e-6)


def test_a_batch_of_which_nothing_can_be_learnt_is_refused() -> None:
    batch = dataclasses.replace(speech(0), targets=[[1] * 60] * 4)
    with pytest.raises(DataError, match="step 7, shard 0: every text has more tokens"):
        task(batches=Fixed(batch)).backward(7, 0, 1)


def test_utterances_without_a_word_have_a_loss() -> None:
    batch = dataclasses.replace(speech(0), targets=[[], [1], [], []])
    it = task(batches=Fixed(batch))
    assert it.backward(0, 0, 1)["targets"] == 1
    assert gradient(it, "").isfinite().all()


def test_autocast_changes_gradients_by_rounding_only() -> None:
    exact, rounded = (task(TransducerTraining(window=4, autocast=a)) for a in ("none", "bf16"))
    exact.backward(0, 0, 1)
    rounded.backward(0, 0, 1)
    a, b = gradient(exact), gradient(rounded)
    assert b.dtype == torch.float32
    assert 0.0 < float((a - b).norm() / a.norm()) < 0.1


@pytest.mark.parametrize("changes", thinned(toy_transducer.VARIANTS, toy_transducer.KEPT))
def test_every_model_trains_with_everything_on(changes: dict[str, Any]) -> None:
    model = toy_transducer.transducer(**changes, dropout=0.1).requires_grad_(True).train()
    training = dataclasses.replace(EVERYTHING, ctc=0.3 if changes.get("ctc_head") else 0.0)
    for batch_of in (BATCHES, Fixed(speech(1))):
        it = TransducerTask(model, batch_of, training, seed=5)
        it.backward(0, 0, 1)
        assert gradient(it, "").isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"chunks": (4, -1)}, "chunks is -1"),
        ({"ctc": -0.1}, r"ctc is -0\.1"),
        ({"autocast": "fp16"}, "autocast is 'fp16'"),
        ({"distill": 1.1}, r"distill is 1\.1"),
        ({"distill": 0.5, "ctc": 0.0}, "distill is 0.5, of what the CTC head learns, and ctc is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransducerTraining(**changes)


def test_ctc_needs_a_head() -> None:
    with pytest.raises(ConfigError, match="has no CTC head; set ctc_head"):
        task(changes={"ctc_head": False})


# -- a teacher ---------------------------------------------------------------------------------


def teacher(**changes: Any) -> CTCEncoder:
    """With the frames and tokens of `transducer()`."""
    return toy_encoder.encoder(**{"subsampling": 2, "pad_edges": True, **changes})


@torch.no_grad()
def test_a_teacher_is_what_a_share_of_the_ctc_head_learns() -> None:
    """By hand, utterance by utterance; one has no loss, another lies in padding."""
    batch = dataclasses.replace(speech(0), targets=[[2, 7], [1] * 30, [3], []])
    model, theirs = transducer(), teacher()
    found = {}
    for share in (0.0, 0.3, 1.0):
        training = TransducerTraining(distill=share)
        given = None if share == 0.0 else theirs
        it = TransducerTask(model, Fixed(batch), training, seed=5, teacher=given)
        with torch.enable_grad():
            found[share] = it.backward(0, 0, 1)["loss_ctc"]
    taught = 0.0
    for row in (0, 2, 3):
        n = batch.lengths[row : row + 1]
        x = batch.features[row : row + 1, : int(n)]
        state = theirs.embed(normalize(x, n), n)
        p = theirs.logits(theirs.run(state, 0, 5), 5).log_softmax(-1)[0]
        q = model.ctc_log_probs(model.encoder(x, n)[0])[0]
        assert len(p) == len(q)
        taught += float((p.exp() * (p - q)).sum())
    assert found[1.0] == pytest.approx(taught, rel=1e-4)
    assert found[0.3] == pytest.approx(0.7 * found[0.0] + 0.3 * taught, rel=1e-4)
    assert all(p.grad is None for p in theirs.parameters())


@pytest.mark.parametrize(
    ("share", "changes", "message"),
    [
        (0.0, {}, "distill is 0.0 and there is a teacher; give both or neither"),
        (0.5, None, "distill is 0.5 and there is no teacher"),
        (0.5, {"subsampling": 4}, "feature frames per frame: the teacher has 4, the model 2"),
        (0.5, {"vocab_size": 12}, "vocab_size: the teacher has 12, the model 11"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(share: float, changes: Any, message: str) -> None:
    given = None if changes is None else teacher(**changes)
    with pytest.raises(ConfigError, match=message):
        task(TransducerTraining(distill=share), teacher=given)


# -- learning ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_to_write_three_texts() -> None:
    """Tones for words, through features, statistics, all losses, and the search."""
    reader = TransducerReader(FeatureConfig(num_mels=20), toy_speech.tokenizer())
    said = ["do mi", "mi", "mi do do"]
    features, lengths = reader.inputs([toy_speech.speak(text) for text in said])
    # A token a word: a search of one token per frame could not write two at once.
    targets = [[1 if word == "do" else 2 for word in text.split()] for text in said]
    batch = SpeechBatch(features, lengths, targets, 3.0)
    model = Transducer(
        toy_transducer.config(
            num_mels=20,
            d_model=32,
            num_layers=2,
            d_joint=32,
            chunking=Chunking(4, 6, 1),
            time_reduction=4,
            predictor="stateless",
            ctc_head=True,
            kernel_size=5,
            positions="rotary",
        )
    )
    model.init_weights(0)
    training = TransducerTraining(window=3, ramp_steps=20)
    it = TransducerTask(model, Fixed(batch), training, seed=0, dev=[batch])
    measure_features(model, it.batches, 1)
    before = it.evaluate()
    optimizer = torch.optim.Adam(it.model.parameters(), lr=1e-2)
    for step in range(120):
        it.backward(step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    after = it.evaluate()
    assert it.model.training
    assert before["token_error_rate"] > 0.5
    assert after["token_error_rate"] == 0.0 and after["token_error_rate_ctc"] == 0.0
    assert after["loss"] < 0.1 * before["loss"]


def test_features_are_measured_over_the_true_frames_of_the_first_batches() -> None:
    model = toy_transducer.transducer()
    measure_features(model, BATCHES, 2)
    frames = torch.cat([speech(1000 + step).features.flatten(0, 1) for step in range(2)])
    frames = frames[~frames.isnan().any(-1)]
    norm = model.encoder.feature_norm
    torch.testing.assert_close(norm.mean, frames.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(1 / norm.inverse_std, frames.std(0, correction=0))


# -- evaluation --------------------------------------------------------------------------------


def test_evaluation_is_the_loss_and_greedy_error_rate_in_the_models_chunks() -> None:
    batch, other = speech(0), speech(1, (33, 25))
    other = dataclasses.replace(other, targets=[other.targets[0], [1, 2] * 25])
    it = task(TransducerTraining(chunks=(5,)), dev=[batch, other])
    found = it.evaluate()
    assert it.model.training and found["infeasible"] == 1
    model = it.model["transducer"].eval().requires_grad_(False)
    search = TransducerSearch(model.predictor, model.joiner, model.config.blank_id)
    nats, errors = [0.0, 0.0], 0
    for part in (batch, other):
        for (x, n, tokens), losses in zip(
            zip(part.features, part.lengths, part.targets, strict=True),
            by_utterance(model, part),
            strict=True,
        ):
            streamed = toy_transducer.streamed(model, x[None, :n], n[None], [3])
            (state,) = search.step([search.start()], *streamed)
            errors += edit_distance(search.best(state)[0].tokens, tokens)
            if len(tokens) == 3:
                nats = [sum(pair) for pair in zip(nats, map(float, losses), strict=True)]
    assert found["loss"] == pytest.approx(nats[0] / 15, rel=1e-4)
    assert found["loss_ctc"] == pytest.approx(nats[1] / 15, rel=1e-4)
    assert found["token_error_rate"] == pytest.approx(errors / 65)


def test_without_dev_batches_there_is_nothing_to_report() -> None:
    assert task().evaluate() == {}


def test_without_a_head_ctc_is_not_reported() -> None:
    it = task(TransducerTraining(ctc=0.0), changes={"ctc_head": False}, dev=[speech(0)])
    assert it.evaluate().keys() == {"loss", "token_error_rate", "infeasible"}


# -- the loop ----------------------------------------------------------------------------------


class Killed(BaseException):
    """No `except Exception` stops it."""


class Mortal(TransducerTask):
    """Dies in the middle of step `dies_at`."""

    dies_at: int | None = None

    def backward(self, step: int, shard: int, num_shards: int) -> Mapping[str, float]:
        sums = super().backward(step, shard, num_shards)
        if step == self.dies_at:
            raise Killed
        return sums


def run(out: Path, dies_at: int | None = None) -> tuple[Any, list[Any]]:
    it = Mortal(transducer(dropout=0.1), BATCHES, EVERYTHING, seed=5, dev=[speech(0)])
    it.dies_at = dies_at
    every = {"checkpoint_every": 2, "evaluate_every": 3}
    config = TrainConfig(STEPS, lr=1e-2, warmup_steps=2, num_shards=2, **every)
    events = []
    try:
        for event in train(it, config, out, {"model": "toy"}):
            events.append(event)
    except Killed:
        pass
    return it.model, events


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, events = run(tmp_path / "whole")
    run(tmp_path / "resumed", dies_at=3)
    resumed, later = run(tmp_path / "resumed")
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    losses = {e.step: e.loss for e in events if isinstance(e, StepDone)}
    assert {e.step: e.loss for e in later if isinstance(e, StepDone)} == {
        step: losses[step] for step in range(3, STEPS + 1)
    }
    looks = [e for e in events if isinstance(e, Evaluated)]
    assert looks[-1] == later[-1]
