"""The Speech-LM task: what a step adds, what is frozen, what is random, evaluation."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toy_batches
import toy_speech_lm
from offramp.config_speech_lm import HeadsConfig
from offramp.data.batching import IGNORE
from offramp.decoding.autoregressive import autoregress
from offramp.decoding.ctc import greedy
from offramp.decoding.exit_policies import edit_distance
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.stopping import RowEnd, Stop
from offramp.errors import ConfigError
from offramp.models.speech_lm import Heard, SpeechLM
from offramp.train.augment import SpecAugment
from offramp.train.ctc import SpeechBatch
from offramp.train.loop import StepDone, TrainConfig, train
from offramp.train.multi_token import multi_token_loss
from offramp.train.speech_lm import SpeechLMTask, SpeechLMTraining, next_tokens, noisy
from thinned import thinned
from toy_batches import Batches, Fixed, gradient

LENGTHS = (61, 30, 46, 53)
V, EOS = toy_speech_lm.V, toy_speech_lm.EOS_ID
BATCHES = Batches(LENGTHS, V)
EXITS = (2, 3, 5)
WEIGHTS = (1.0, 0.5, 0.0, 0.25)
HEADS_ALONE = SpeechLMTraining(ctc=0.0, freeze=("encoder", "projector", "decoder"))


def speech(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> SpeechBatch:
    return toy_batches.speech(seed, lengths, V)


def task(training: SpeechLMTraining | None = None, **options: Any) -> SpeechLMTask:
    changes = {"heads": HeadsConfig(), "ctc_exit": 3} | options.pop("changes", {})
    model = toy_speech_lm.speech_lm(**changes)
    if options.pop("double", False):
        model.double()
    batches = options.pop("batches", BATCHES)
    return SpeechLMTask(model, batches, training or SpeechLMTraining(), seed=5, **options)


def the_model(of: SpeechLMTask) -> SpeechLM:
    assert isinstance(of.model, SpeechLM)
    return of.model


# -- one step ----------------------------------------------------------------------------------


def by_utterance(
    model: SpeechLM, batch: SpeechBatch, decoder_exit: int | None = None
) -> tuple[Tensor, Tensor]:
    """(the decoder's and its heads' loss, CTC's at all exits together), each utterance alone."""
    total, ctc = torch.zeros(()), torch.zeros(())
    for x, n, text in zip(batch.features, batch.lengths, batch.targets, strict=True):
        heard = model.hear(x[None, :n], n[None], EXITS)
        hidden = model.read(heard, [text])
        targets = torch.tensor([[*text, EOS]])
        total = total + multi_token_loss(model.decoder, model.heads, hidden, targets, WEIGHTS)
        if decoder_exit:
            early = model.read_exits(heard, [text], (decoder_exit,))[decoder_exit]
            logits = model.decoder.logits(early, decoder_exit)[0]
            total = total + 0.3 * F.cross_entropy(logits, targets[0], reduction="sum")
        for log_probs in heard.exits.values():
            sizes = heard.frames, torch.tensor([len(text)])
            ctc = ctc + F.ctc_loss(
                log_probs.transpose(0, 1), torch.tensor([text]), *sizes, blank=V, reduction="sum"
            )
    return total, ctc


@pytest.mark.parametrize("changes", [{}, {"prompt": "w3 {audio} w4 w5"}], ids=str)
def test_a_step_adds_the_gradient_of_the_mean_loss_per_token(changes: dict[str, Any]) -> None:
    training = SpeechLMTraining(head_weights=WEIGHTS, ctc=0.6)
    it = task(training, changes=changes, double=True)
    sums = it.backward(3, 0, 1)
    ours = gradient(it)
    total, ctc = by_utterance(the_model(it), BATCHES.batch(3, 0, 1))
    ((total + 0.6 * ctc / 3) / 12).backward()
    torch.testing.assert_close(ours, gradient(it), rtol=1e-4, atol=1e-7)
    nats = [sums["loss"], *(sums[f"loss_head_{k}"] for k in (2, 3, 4))]
    weighted = sum(w * n for w, n in zip(WEIGHTS, nats, strict=True))
    assert weighted == pytest.approx(float(total.detach()), rel=1e-6)
    assert sum(sums[f"loss_exit_{e}"] for e in EXITS) == pytest.approx(
        float(ctc.detach()), rel=1e-4
    )
    assert (sums["targets"], sums["tokens"], sums["infeasible"]) == (12, 190, 0)
    assert sums["audio_s"] == 1.9


def test_exits_of_the_decoder_learn_with_their_weight() -> None:
    training = SpeechLMTraining(WEIGHTS, ctc=0.6, decoder_exits=(1,), early_exit_scale=0.3)
    it = task(training, double=True)
    sums = it.backward(3, 0, 1)
    ours = gradient(it)
    total, ctc = by_utterance(the_model(it), BATCHES.batch(3, 0, 1), 1)
    ((total + 0.6 * ctc / 3) / 12).backward()
    torch.testing.assert_close(ours, gradient(it), rtol=1e-4, atol=1e-7)
    nats = [sums["loss"], *(sums[f"loss_head_{k}"] for k in (2, 3, 4))]
    weighted = sum(w * n for w, n in zip(WEIGHTS, nats, strict=True))
    weighted += 0.3 * sums["loss_decoder_exit_1"]
    assert weighted == pytest.approx(float(total.detach()), rel=1e-6)


@pytest.mark.parametrize("exit_layer", [0, 5])
def test_exits_that_the_decoder_does_not_have_are_refused(exit_layer: int) -> None:
    with pytest.raises(ConfigError, match="the decoder has 5 layers; give exits from 1 to 4"):
        task(SpeechLMTraining(decoder_exits=(exit_layer,)))


def test_noise_replaces_the_share_of_tokens_that_is_asked_for() -> None:
    text, generator = list(range(1000)), torch.Generator().manual_seed(0)
    assert noisy(text, 0.0, 5, generator) == text and noisy([], 0.5, 5, generator) == []
    other = noisy(text, 0.2, 5, generator)
    changed = [(a, b) for a, b in zip(text, other, strict=True) if a != b]
    assert 150 < len(changed) < 250 and {b for _, b in changed} == set(range(5))


def test_noisy_text_is_read_and_the_text_that_was_said_is_written() -> None:
    batch = BATCHES.batch(3, 0, 1)
    it = task(SpeechLMTraining(ctc=0.0, token_noise=1.0), changes={"heads": None}, double=True)
    model, read = the_model(it), []
    exits = model.read_exits

    def reading(heard: Heard, texts: list[list[int]], at: set[int]) -> dict[int, Tensor]:
        read.append(texts)
        return exits(heard, texts, at)

    model.read_exits = reading  # type: ignore[method-assign,assignment]
    ours = it.backward(3, 0, 1)["loss"]
    (texts,) = read
    assert texts != batch.targets and [*map(len, texts)] == [*map(len, batch.targets)]
    hidden = model.read(model.hear(batch.features.double(), batch.lengths, ()), texts)
    logits = model.decoder.logits(hidden, model.config.decoder.num_layers)
    goal = next_tokens(batch.targets, EOS, model.device)
    nats = F.cross_entropy(logits.transpose(1, 2), goal, ignore_index=IGNORE, reduction="sum")
    assert ours == pytest.approx(float(nats.detach()), rel=1e-6)


def test_a_model_without_heads_or_drafting_learns_to_write() -> None:
    it = task(SpeechLMTraining(ctc=0.0), changes={"heads": None, "ctc_exit": None})
    sums = it.backward(3, 0, 1)
    assert sums["loss"] > 0 and not any("exit" in name or "head" in name for name in sums)
    assert gradient(it, "encoder.layers").any(), "through the projector"


def test_shards_add_up_to_the_whole_batch() -> None:
    it = task(double=True)
    whole = it.backward(3, 0, 1)
    expected = gradient(it)
    parts = [it.backward(3, shard, 2) for shard in range(2)]
    torch.testing.assert_close(gradient(it), expected, rtol=1e-4, atol=1e-7)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-5)


def test_what_a_step_adds_is_a_function_of_seed_step_and_shard() -> None:
    training = SpeechLMTraining(augment=SpecAugment(1, 3, 2, 0.1))
    it = task(training, changes={"encoder": {"dropout": 0.2}}, batches=Fixed(speech()))
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
    assert not torch.equal(other, first) and not torch.equal(gradient(it), first)


def test_texts_too_long_for_ctc_are_counted_and_still_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = speech()
    long = [*batch.targets[:1], [1, 2] * 9, *batch.targets[2:]]  # 30 feature frames, 8 of ours
    it = task(batches=Fixed(dataclasses.replace(batch, targets=long)), double=True)
    with caplog.at_level(logging.WARNING):
        sums = it.backward(0, 0, 1)
    assert (sums["infeasible"], sums["targets"]) == (1, 27)
    assert "step 0: 1 utterances have more tokens than frames" in caplog.text
    keep = torch.tensor([0, 2, 3])
    rest = SpeechBatch(
        batch.features[keep], batch.lengths[keep], [batch.targets[i] for i in (0, 2, 3)], 1.0
    )
    it.batches = Fixed(rest)
    without = it.backward(0, 0, 1)
    assert sums["loss_exit_3"] == pytest.approx(without["loss_exit_3"], rel=1e-5)
    assert sums["loss"] > without["loss"] + 18


@pytest.mark.parametrize("targets", [[[1, 2] * 30] * 4, [[], [], [], []]], ids=["long", "empty"])
def test_a_batch_of_which_ctc_learns_nothing_or_little_has_finite_gradients(
    targets: list[list[int]],
) -> None:
    it = task(batches=Fixed(dataclasses.replace(speech(), targets=targets)))
    assert it.backward(0, 0, 1)["loss"] > 0
    found = gradient(it)
    assert found.isfinite().all() and found.any()


def test_autocast_changes_gradients_by_rounding_only() -> None:
    exact, rounded = (task(SpeechLMTraining(autocast=a)) for a in ("none", "bf16"))
    exact.backward(0, 0, 1)
    rounded.backward(0, 0, 1)
    a, b = gradient(exact), gradient(rounded)
    assert b.dtype == torch.float32
    assert 0.0 < float((a - b).norm() / a.norm()) < 0.15


@pytest.mark.parametrize("name", thinned(toy_speech_lm.VARIANTS.keys(), toy_speech_lm.KEPT))
def test_every_model_trains(name: str) -> None:
    changes = dict(toy_speech_lm.VARIANTS[name])
    training = SpeechLMTraining(ctc=0.3 if "ctc_exit" in changes else 0.0)
    model = toy_speech_lm.speech_lm(**changes)
    it = SpeechLMTask(model, BATCHES, training, seed=5)
    it.backward(0, 0, 1)
    assert gradient(it).isfinite().all()


# -- frozen parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [("encoder",), ("decoder",), ("encoder", "decoder")], ids=str)
def test_what_is_frozen_has_no_gradient_and_the_rest_the_same(freeze: tuple[str, ...]) -> None:
    free = task(SpeechLMTraining(ctc=0.0), double=True)
    held = task(SpeechLMTraining(ctc=0.0, freeze=freeze), double=True)
    free.backward(3, 0, 1)
    held.backward(3, 0, 1)
    expected = {n: p.grad for n, p in free.model.named_parameters()}
    for name, p in held.model.named_parameters():
        if name.split(".")[0] in freeze:
            assert p.grad is None and not p.requires_grad, name
        elif (wanted := expected[name]) is not None:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, wanted)


def test_what_is_frozen_does_not_drop_out_also_after_evaluation() -> None:
    changes = {"encoder": {"dropout": 0.5}}
    it = task(HEADS_ALONE, changes=changes, batches=Fixed(speech()), dev=[speech(1)])
    first = it.backward(1, 0, 1)
    it.evaluate()
    assert it.backward(2, 0, 1) == first
    assert {n: part.training for n, part in it.model.named_children()} == {
        "encoder": False,
        "projector": False,
        "decoder": False,
        "heads": True,
    }


def test_training_heads_over_a_frozen_trunk_leaves_head_1_as_it_is_bit_for_bit(
    tmp_path: Path,
) -> None:
    batch = speech(7)

    def head_1(model: SpeechLM) -> Tensor:
        with torch.no_grad():
            hidden = model.read(model.hear(batch.features, batch.lengths), batch.targets)
            return model.decoder.logits(hidden, 5)

    bare = head_1(toy_speech_lm.speech_lm(ctc_exit=3))
    it = task(HEADS_ALONE, batches=Fixed(speech()))
    model = the_model(it)
    assert torch.equal(head_1(model), bare)
    before = [p.clone() for p in model.heads.parameters()]
    config = TrainConfig(steps=4, lr=1e-2, warmup_steps=1, weight_decay=0.5)
    events = [e for e in train(it, config, tmp_path, {}) if isinstance(e, StepDone)]
    assert len({e.loss for e in events}) == 1, "the loss shown is head 1's"
    assert not any(torch.equal(a, b) for a, b in zip(before, model.heads.parameters(), strict=True))
    assert torch.equal(head_1(model), bare)


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_weights": (1.0, -0.1)}, r"head_weights is -0\.1"),
        ({"ctc": -0.1}, r"ctc is -0\.1"),
        ({"autocast": "fp16"}, "autocast is 'fp16'"),
        ({"freeze": ("tower",)}, "freeze is 'tower'; allowed: encoder, projector"),
        ({"freeze": ("encoder",)}, "ctc is 0.3, and the encoder, which would learn from it, is"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeechLMTraining(**changes)


@pytest.mark.parametrize(
    ("training", "changes", "message"),
    [
        ({"head_weights": (1.0, 0.3)}, {}, "head_weights are 2 for 4 heads"),
        ({"head_weights": (1.0, 0.3)}, {"heads": None}, "head_weights are 2 for 1 heads"),
        ({}, {"ctc_exit": None}, "CTC does not write the decoder's tokens; set ctc to 0, or"),
        (
            {"ctc": 0.0, "freeze": ("encoder", "projector", "decoder")},
            {"heads": None},
            "freeze names all that the model has, encoder, projector, decoder",
        ),
    ],
)
def test_models_that_the_settings_are_not_for_are_refused(
    training: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task(SpeechLMTraining(**training), changes=changes)


def test_the_end_of_a_text_is_a_target_and_padding_is_none() -> None:
    found = next_tokens([[4, 5], [], [6]], EOS, torch.device("cpu"))
    assert found.tolist() == [[4, 5, EOS], [EOS, IGNORE, IGNORE], [6, EOS, IGNORE]]


# -- evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_is_what_each_utterance_gives_alone() -> None:
    dev = [speech(1), dataclasses.replace(speech(2), targets=[[2] * 20, [], [7, 7], [9]])]
    it = task(dev=dev)
    model, sums = the_model(it), dict.fromkeys(("nats", "hits", "ahead", "right", "ctc"), 0.0)
    positions = further = scored = said = edits = infeasible = 0
    with torch.enable_grad():
        found = it.evaluate()
    model.eval()
    for batch in dev:
        for x, n, text in zip(batch.features, batch.lengths, batch.targets, strict=True):
            heard, targets = model.hear(x[None, :n], n[None]), torch.tensor([*text, EOS])
            hidden = model.read(heard, [text])[0]
            first = model.decoder.logits(hidden[None], 5)[0].log_softmax(-1)
            second = model.heads.logits(hidden, model.decoder)[:-1, 0].log_softmax(-1)
            sums["nats"] -= float(first.gather(1, targets[:, None]).sum())
            sums["hits"] += int((first.argmax(-1) == targets).sum())
            sums["ahead"] -= float(second.gather(1, targets[1:, None]).sum())
            sums["right"] += int((second.argmax(-1) == targets[1:]).sum())
            positions, further, said = (
                positions + len(targets),
                further + len(text),
                said + len(text),
            )
            (written,) = greedy(heard.ctc_log_probs, heard.frames, V)
            edits += edit_distance(written.tokens, text)
            loss = F.ctc_loss(
                heard.ctc_log_probs[0],
                torch.tensor(text),
                heard.frames,
                torch.tensor([len(text)]),
                blank=V,
                reduction="sum",
            )
            infeasible += bool(loss.isinf())
            if loss.isfinite():
                sums["ctc"], scored = sums["ctc"] + float(loss), scored + len(text)
    assert found["loss"] == pytest.approx(sums["nats"] / positions, rel=1e-5)
    assert found["accuracy"] == pytest.approx(sums["hits"] / positions)
    assert found["loss_head_2"] == pytest.approx(sums["ahead"] / further, rel=1e-5)
    assert found["accuracy_head_2"] == pytest.approx(sums["right"] / further)
    assert found["loss_ctc"] == pytest.approx(sums["ctc"] / scored, rel=1e-4)
    assert found["token_error_rate_ctc"] == pytest.approx(edits / said)
    assert found["infeasible"] == infeasible == 1
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("heads", [None, HeadsConfig()], ids=["no heads", "heads"])
def test_evaluation_decodes_as_one_token_after_another_would(heads: HeadsConfig | None) -> None:
    dev = speech(1)
    it = task(changes={"heads": heads}, dev=[dev])
    found, model = it.evaluate(), the_model(it)
    model.eval()
    edits = tokens = 0
    for x, n, text in zip(dev.features, dev.lengths, dev.targets, strict=True):
        with torch.no_grad():
            (prefix,) = model.prefixes(model.hear(x[None, :n], n[None]))
        prompt = [model.first_token]
        chooser = Chooser(Sampling(), [prompt], [0], V, model.device)
        end = RowEnd(Stop(16, frozenset({EOS})), None)
        steps = autoregress(model.decoder, prompt, chooser, end, prefix)
        written = [t for step in steps for t in step.tokens]
        tokens += len(written)
        edits += edit_distance([t for t in written if t != EOS], text)
    assert found["token_error_rate"] == pytest.approx(edits / 12)
    if heads is None:
        assert found["mean_accepted_length"] == 1.0
    else:
        assert 1.0 <= found["mean_accepted_length"] <= 4.0


def test_without_dev_batches_there_is_nothing_to_evaluate() -> None:
    assert task().evaluate() == {}


# -- learning ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_to_write_what_each_utterance_says_and_the_heads_too(
    tmp_path: Path,
) -> None:
    batch = dataclasses.replace(speech(), targets=[[2, 7, 9], [9, 3, 3], [60, 5, 2], [44, 2, 8]])
    model = toy_speech_lm.speech_lm(heads=HeadsConfig(), ctc_exit=3)
    it = SpeechLMTask(model, Fixed(batch), SpeechLMTraining(), seed=5, dev=[batch])
    config = TrainConfig(steps=120, lr=1e-2, warmup_steps=5, weight_decay=0.0)
    losses = [e.loss for e in train(it, config, tmp_path, {}) if isinstance(e, StepDone)]
    found = it.evaluate()
    assert losses[-1] < 0.05 < 1.0 < losses[0]
    assert found["accuracy"] == 1.0
    assert all(found[f"accuracy_head_{k}"] == 1.0 for k in (2, 3, 4))
    assert found["token_error_rate_ctc"] == found["token_error_rate"] == 0.0
    assert found["mean_accepted_length"] == 2.0, "a token, then two with EOS in one call"
