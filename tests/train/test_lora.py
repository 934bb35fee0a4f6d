"""Low-rank updates of a Speech-LM's decoder: what learns, what stays, what is left at the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toy_speech_lm
from offramp.config_speech_lm import HeadsConfig
from offramp.errors import ConfigError
from offramp.models.speech_lm import SpeechLM
from offramp.train.loop import StepDone, TrainConfig, train
from offramp.train.lora import TARGETS, LoRA, low_rank
from offramp.train.mwer import MWERTask, MWERTraining
from offramp.train.speech_lm import SpeechLMTask, SpeechLMTraining
from thinned import thinned
from toy_batches import Batches, speech

pytest.importorskip("peft")

V = toy_speech_lm.V
BATCHES = Batches((61, 30, 46), V)
LORA = LoRA(rank=3, alpha=6.0)
EVERY = replace(LORA, targets=TARGETS, dropout=0.3)
TRUNK = ("encoder", "projector", "decoder", "heads")


def speech_lm(**changes: Any) -> SpeechLM:
    small = {"heads": HeadsConfig(2), "ctc_exit": 3, "decoder": {"num_layers": 2}}
    return toy_speech_lm.speech_lm(**(small | changes))


def task(model: SpeechLM, *freeze: str, **training: Any) -> SpeechLMTask:
    settings = {"ctc": 0.0 if "encoder" in freeze else 0.3, "freeze": freeze, **training}
    return SpeechLMTask(model, BATCHES, SpeechLMTraining(**settings), seed=5)


def learn(it: SpeechLMTask, out: Path) -> None:
    """Two steps."""
    list(train(it, TrainConfig(2, 0.02, 1), out, {}))


def copied(model: SpeechLM) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@torch.no_grad()
def states(model: SpeechLM) -> Tensor:
    """What the decoder makes of three utterances and their texts, in use."""
    batch = speech(7, (61, 30, 46), V)
    model.eval()
    hidden = model.read(model.hear(batch.features.to(model.dtype), batch.lengths), batch.targets)
    return model.decoder.logits(hidden, model.config.decoder.num_layers)


# -- in the decoder ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", thinned({"attention": LORA, "every layer": EVERY}, ["every layer"])
)
def test_merged_it_is_what_it_was_with_its_updates(lora: LoRA, tmp_path: Path) -> None:
    model = speech_lm().double()
    start, first = copied(model), states(model)
    it = task(model, "encoder", "projector", "heads")
    with low_rank(model.decoder, lora, 0):
        assert torch.equal(states(model), first), "updates begin at zero"
        model.decoder.train()
        learn(it, tmp_path)
        learnt = states(model)
        model.decoder.train()
    assert (learnt - first).abs().max() > 0.1
    torch.testing.assert_close(states(model), learnt, rtol=1e-10, atol=1e-10)
    merged = model.state_dict()
    assert merged.keys() == start.keys()
    changed = {name for name in start if not torch.equal(merged[name], start[name])}
    assert changed == {n for n in start if n.split(".")[-2] in lora.targets and "decoder" in n}
    for name in changed:
        rank = torch.linalg.matrix_rank(merged[name] - start[name], atol=1e-9)
        assert rank == lora.rank, name


@pytest.mark.parametrize(
    "freeze",
    thinned(
        {"all but": ("encoder", "projector", "heads"), "one": ("encoder",), "none": ()}, ["one"]
    ),
)
def test_of_the_decoder_only_updates_learn_and_of_the_rest_what_is_not_frozen(
    freeze: tuple[str, ...], tmp_path: Path
) -> None:
    model = speech_lm()
    start = copied(model)
    it = task(model, *freeze, decoder_exits=(1,))
    with low_rank(model.decoder, EVERY, 0):
        it.backward(0, 0, 1)
        having = {name for name, p in model.named_parameters() if p.grad is not None}
        ours = {name for name in having if name.startswith("decoder.")}
        assert len(ours) == 2 * len(TARGETS) * model.config.decoder.num_layers
        assert all(".lora_A." in name or ".lora_B." in name for name in ours)
        assert {name.split(".")[0] for name in having} == set(TRUNK) - set(freeze)
        learn(it, tmp_path)
        now = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items()}
        for name in start:
            if name.startswith(("decoder.", *(f"{part}." for part in freeze))):
                assert torch.equal(now[name], start[name]), name


def test_word_errors_reach_the_updates_alone() -> None:
    model = speech_lm(heads=None)
    training = MWERTraining((0.0,), 0.0, freeze=("encoder", "projector"), with_reference=True)
    words = toy_speech_lm.tokenizer()
    it = MWERTask(model, BATCHES, words.decode, replace(training, max_tokens=6), seed=5)
    with low_rank(model.decoder, LORA, 0):
        it.backward(0, 0, 1)
        found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found and all(".lora_B." in name for name in found)  # A's is 0 while B is


@pytest.mark.parametrize(
    "changes",
    thinned({"average": {"average": 0.5}, "muon": {"optimizer": "muon"}}, ["average"]),
)
@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    def run(folder: str, stop: int) -> SpeechLM:
        model = speech_lm()
        it = task(model, "encoder")
        with low_rank(model.decoder, EVERY, 0):
            config = TrainConfig(4, 0.01, 1, checkpoint_every=2, **changes)
            for event in train(it, config, tmp_path / folder, {}):
                if isinstance(event, StepDone) and event.step == stop:
                    break
        return model

    whole = copied(run("whole", stop=5))
    run("cut", stop=3)  # the state of step 2 is what there is
    resumed = copied(run("cut", stop=5))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_updates_are_drawn_from_the_seed_and_from_nothing_else() -> None:
    drawn = []
    for seed, around in ((1, 0), (1, 3), (2, 0)):
        model = speech_lm()
        torch.manual_seed(around)
        before = torch.random.get_rng_state()
        with low_rank(model.decoder, LORA, seed):
            assert torch.equal(torch.random.get_rng_state(), before)
            state = model.decoder.state_dict()
            drawn.append(torch.cat([x.flatten() for n, x in state.items() if ".lora_A." in n]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be a number greater than 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a number of at least 0 and less than 1"),
        ({"targets": ()}, "targets is empty; give some of qkv, output, gate_up, down"),
        ({"targets": ("q_proj",)}, "targets is 'q_proj'; allowed: qkv, output, gate_up, down"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(LORA, **changes)
    assert str(error.value) == message


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = speech_lm()
    before = list(model.state_dict())
    monkeypatch.setitem(sys.modules, "peft", None)
    missing = pytest.raises(ConfigError, match=r"pip install 'offramp\[hf\]'")
    with missing, low_rank(model.decoder, LORA, 0):
        pass
    assert list(model.state_dict()) == before
