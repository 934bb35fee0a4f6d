"""Word error rate training: the loss and its gradient, the scores, and a step of the task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import toy_batches
import toy_speech_lm
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.exit_policies import edit_distance
from offramp.decoding.tower_beam import TextHypothesis
from offramp.errors import ConfigError
from offramp.models.speech_lm import SpeechLM
from offramp.train import mwer
from offramp.train.ctc import SpeechBatch
from offramp.train.mwer import MWERTask, MWERTraining, mwer_loss, text_scores
from offramp.train.speech_lm import SpeechLMTask, SpeechLMTraining
from toy_batches import Batches, Fixed, gradient

LENGTHS = (61, 30, 46)
V, EOS = toy_speech_lm.V, toy_speech_lm.EOS_ID
BATCHES = Batches(LENGTHS, V)
PLAIN: dict[str, Any] = {"ctc": 0.0, "head_weights": (0.1, 0.1, 0.1)}
SETTINGS = PLAIN | {"max_tokens": 6, "n_best": 3, "beam_size": 3}


def task(**settings: Any) -> MWERTask:
    changes = {"heads": HeadsConfig(3)} | settings.pop("changes", {})
    batches = settings.pop("batches", BATCHES)
    start = toy_speech_lm.checkpoint(**changes)
    training = MWERTraining(**(SETTINGS | settings))
    return MWERTask(start.model.double(), batches, start.tokenizer.decode, training, seed=5)


def the_model(of: SpeechLMTask) -> SpeechLM:
    assert isinstance(of.model, SpeechLM)
    return of.model


# -- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_gradient_is_p_times_the_errors_above_the_expected_ones(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, generator=generator, dtype=torch.float64).requires_grad_()
    errors = torch.randint(6, (count,), generator=generator).double()
    mwer_loss(scores, errors).backward()  # type: ignore[no-untyped-call]
    p = scores.detach().softmax(0)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, p * (errors - (p * errors).sum()))
    assert torch.autograd.gradcheck(lambda s: mwer_loss(s, errors), scores)


def test_what_changes_all_errors_or_all_scores_alike_changes_nothing() -> None:
    scores, errors = torch.tensor([-3.0, -1.0, -9.0]).double(), torch.tensor([2.0, 0, 5]).double()
    want = mwer_loss(scores, errors)
    torch.testing.assert_close(mwer_loss(scores, errors + 7), want)
    torch.testing.assert_close(mwer_loss(scores - 400, errors), want)
    assert float(mwer_loss(scores, torch.full_like(errors, 3.0))) == pytest.approx(0.0)
    assert float(mwer_loss(scores[:1], errors[:1])) == 0.0


def test_scores_are_the_log_probabilities_of_texts_of_any_length() -> None:
    model = toy_speech_lm.speech_lm().double()
    x, n = (getattr(toy_batches.speech(0, (61,), V), name) for name in ("features", "lengths"))
    heard = model.hear(x.double(), n)
    texts = [(4, 9, EOS), (EOS,), (7, 7, 7, 7)]
    many = [text[:-1] for text in texts]
    hidden = torch.nn.utils.rnn.pad_sequence(
        [model.read(heard, [text])[0] for text in many], batch_first=True, padding_value=99.0
    )
    found = text_scores(model.decoder, hidden, texts)
    for score, text in zip(found, texts, strict=True):
        logits = model.decoder.logits(model.read(heard, [text[:-1]]), 5)[0]
        steps = logits.log_softmax(-1)[range(len(text)), list(text)]
        torch.testing.assert_close(score, steps.sum())


# -- a step -------------------------------------------------------------------------------------


def by_utterance(of: MWERTask, batch: SpeechBatch) -> tuple[Tensor, float]:
    """(the word errors' loss, the expected errors), each utterance and text alone."""
    model, decode = the_model(of), toy_speech_lm.tokenizer().decode
    total, expected = torch.zeros((), dtype=torch.float64), 0.0
    for x, n, said in zip(batch.features, batch.lengths, batch.targets, strict=True):
        heard = model.hear(x[None, :n].double(), n[None])
        texts = of.n_best(heard, said)
        scores = torch.cat(
            [text_scores(model.decoder, model.read(heard, [t[:-1]]), [t]) for t in texts]
        )
        errors = [float(edit_distance(decode(t).split(), decode(said).split())) for t in texts]
        total = total + mwer_loss(scores, torch.tensor(errors).double())
        expected += float((scores.detach().softmax(0) * torch.tensor(errors)).sum())
    return total, expected


@pytest.mark.parametrize(
    ("changes", "with_reference"),
    [
        ({}, False),
        ({"prompt": "w3 {audio} w4 w5"}, True),
        pytest.param({"heads": None}, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_adds_the_gradient_of_the_word_errors_to_plain_training(
    changes: dict[str, Any], with_reference: bool
) -> None:
    weights = (0.1,) if "heads" in changes else PLAIN["head_weights"]
    it = task(changes=changes, with_reference=with_reference, mwer=0.7, head_weights=weights)
    sums = it.backward(3, 0, 1)
    ours = gradient(it)
    batch = BATCHES.batch(3, 0, 1)
    training = SpeechLMTraining(**(PLAIN | {"head_weights": weights}))
    plain = SpeechLMTask(the_model(it), BATCHES, training, seed=5)
    same = plain.backward(3, 0, 1)
    the_model(it).eval()
    total, expected = by_utterance(it, batch)
    (0.7 * total / 9).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, gradient(it), rtol=1e-6, atol=1e-9)
    assert sums["expected_errors"] == pytest.approx(expected)
    assert sums["words"] == 9
    assert 0 <= sums["best_errors"] <= sums["expected_errors"]
    assert (sums["best_errors"] == 0) is with_reference
    assert {name: sums[name] for name in same} == pytest.approx(same)


def test_word_errors_are_those_of_the_model_in_use() -> None:
    """What is dropped at random in training is not dropped here."""
    batch = BATCHES.batch(3, 0, 3)
    batches = Fixed(SpeechBatch(batch.features.double(), batch.lengths, batch.targets, 1.0))
    changes = {"encoder": {"dropout": 0.1}}
    it = task(batches=batches, changes=changes, head_weights=(0.0,) * 3, with_reference=True)
    it.backward(0, 0, 1)
    ours = gradient(it)
    the_model(it).eval()
    total, _ = by_utterance(it, batch)
    (total / 3).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, gradient(it), rtol=1e-6, atol=1e-9)


def test_of_texts_with_the_same_words_the_most_probable_is_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens 4 and 5 are two spellings of a word."""
    it = task()
    monkeypatch.setattr(it, "_decode", lambda text: " ".join(str(t // 2) for t in text if t > 1))
    found = [TextHypothesis((first, EOS), -first, "stop") for first in (4, 5, 8)]
    monkeypatch.setattr(mwer, "prefix_beam", lambda *given: found)
    batch = BATCHES.batch(0, 0, 1)
    heard = the_model(it).hear(batch.features[:1].double(), batch.lengths[:1])
    assert set(it.n_best(heard, [])) == {(4, EOS), (8, EOS)}


def test_shards_add_up_to_the_whole_batch() -> None:
    it = task(with_reference=True)
    whole = it.backward(3, 0, 1)
    expected = gradient(it)
    parts = [it.backward(3, shard, 2) for shard in range(2)]
    torch.testing.assert_close(gradient(it), expected, rtol=1e-6, atol=1e-9)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-6)


def test_the_list_holds_texts_of_different_words_and_what_was_said_on_request() -> None:
    it = task(n_best=8, beam_size=8)
    model, batch = the_model(it), BATCHES.batch(0, 0, 1)
    heard = model.hear(batch.features[:1].double(), batch.lengths[:1])
    said = batch.targets[0]
    texts = it.n_best(heard, said)
    decode = toy_speech_lm.tokenizer().decode
    assert 2 <= len({decode(text) for text in texts}) == len(texts) <= 8
    assert all(len(text) <= 6 for text in texts)
    assert (*said, EOS) not in texts
    more = task(n_best=8, beam_size=8, with_reference=True).n_best(heard, said)
    assert set(more) == {*texts, (*said, EOS)}
    found = [token for token in texts[0] if token != EOS]
    assert len(task(n_best=8, beam_size=8, with_reference=True).n_best(heard, found)) == len(texts)


def test_training_makes_the_right_text_of_a_list_the_probable_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = BATCHES.batch(1, 0, 1)
    heard = the_model(it := task()).hear(batch.features[:1].double(), batch.lengths[:1])
    found = it.n_best(heard, [])
    said = [token for token in found[0] if token != EOS]  # the least probable of them
    one = SpeechBatch(batch.features[:1].double(), batch.lengths[:1], [said], 0.6)
    it = task(batches=Fixed(one), head_weights=(0.0,) * 3)  # word errors teach alone
    monkeypatch.setattr(it, "n_best", lambda heard, said: found)  # else the list moves too
    optimizer = torch.optim.Adam(it.model.parameters(), lr=1e-3)
    expected = []
    for step in range(4):
        expected.append(it.backward(step, 0, 1)["expected_errors"])
        optimizer.step()
        optimizer.zero_grad()
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] < 0.7 * expected[0]


def test_the_modes_of_training_come_back_and_the_batch_is_made_once() -> None:
    class Counting(Fixed):
        made = 0

        def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
            self.made += 1
            return super().batch(step, shard, num_shards)

    batches = Counting(BATCHES.batch(0, 0, 1))
    it = task(batches=batches, freeze=("decoder",))
    it.backward(0, 0, 1)
    assert batches.made == 1
    model = the_model(it)
    assert [p.training for p in (model.encoder, model.projector, model.decoder)] == [  # type: ignore[attr-defined]
        True,
        True,
        False,
    ]


def test_only_what_is_not_frozen_learns() -> None:
    it = task(freeze=("encoder", "projector"), with_reference=True)
    it.backward(0, 0, 1)
    learned = {n.split(".")[0] for n, p in it.model.named_parameters() if p.grad is not None}
    assert learned == {"decoder", "heads"}


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mwer": 0.0}, "mwer is 0.0; it must be a number greater than 0"),
        ({"n_best": 1}, "n_best is 1; it must be a whole number of at least 2"),
        ({"beam_size": 0}, "beam_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"ctc": -1.0}, "ctc is -1.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MWERTraining(**settings)


def test_a_frozen_head_1_has_nothing_to_learn_from_word_errors() -> None:
    with pytest.raises(ConfigError, match="teach only what head 1 reads; let the encoder"):
        task(freeze=("encoder", "projector", "decoder"))
