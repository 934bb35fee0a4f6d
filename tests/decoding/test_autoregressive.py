"""The reference itself: it writes what transformers writes, and what its logits say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toy
import toy_decoding as run
from offramp.decoding.autoregressive import autoregress
from offramp.decoding.drafts import AdaptiveExitDraft, EarlyExitDraft
from offramp.decoding.exits import RoundCosts
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.stopping import Stop
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.models import hub
from offramp.nn.tower import TracedTower, TruncatedTower
from thinned import thinned
from toy_decoding import LAYERS


@pytest.mark.parametrize("variant", thinned(toy.VARIANTS.keys(), toy.KEPT))
def test_each_token_is_the_best_after_the_whole_text(variant: str) -> None:
    """Without a cache, from the start, for every token."""
    model, text = run.model(**toy.VARIANTS[variant]), run.prompt(5)
    (row,) = run.plain(model, [text], Stop(12))
    for token in row.tokens:
        logits = model.logits(toy.run(model, torch.tensor([text])), LAYERS)
        assert int(logits[0, -1].argmax()) == token
        text = [*text, token]


def test_a_step_is_a_token() -> None:
    model, ids = run.model(), run.prompt(5)
    chooser = Chooser(Sampling(), [ids], [0], 61, model.device)
    steps = list(autoregress(model, ids, chooser, run.make_ends(1, Stop(7))[0]))
    assert [len(s.tokens) for s in steps] == [1] * 7
    assert {(s.row, s.drafted, s.accepted, s.exit_layer, s.text) for s in steps} == {
        (0, (), 0, None, "")
    }
    assert [s.finish_reason for s in steps] == [None] * 6 + ["length"]


@pytest.mark.parametrize("length", [1, 6])
def test_every_layer_reads_prompt_and_text_once(length: int) -> None:
    tower = TracedTower(run.model(), Trace(LAYERS))
    run.plain(tower, [run.prompt(length)], Stop(9))
    assert tower.trace.layer_positions == [length + 9 - 1] * LAYERS
    assert tower.trace.layer_calls == [(length > 1) + 9] * LAYERS
    assert tower.trace.head_positions == 9


@pytest.mark.parametrize("exit_layer", [1, 3, LAYERS])
def test_early_exit_is_decoding_with_a_shorter_model(exit_layer: int) -> None:
    model, prompts = run.model(), [run.prompt(5), run.prompt(2)]
    short = run.model(num_layers=LAYERS)
    short.layers = short.layers[:exit_layer]
    short.config = toy.config(num_layers=exit_layer)
    expected = run.plain(short, prompts, Stop(12))
    tower = TracedTower(TruncatedTower(model, exit_layer), Trace(exit_layer))
    assert run.plain(tower, prompts, Stop(12)) == expected
    assert len(tower.trace.layer_calls) == exit_layer
    if exit_layer > 1:  # what leaves early may itself be drafted for
        draft = EarlyExitDraft(1, exit_layer)
        assert run.drafted(tower, prompts, draft, 4, Stop(12)).rows == expected


@pytest.mark.parametrize("exit_layer", [-1, 0, LAYERS + 1])
def test_early_exit_leaves_within_the_tower(exit_layer: int) -> None:
    with pytest.raises(InputError, match=f"exit layer is {exit_layer}; .* 1 and 6") as error:
        TruncatedTower(run.model(), exit_layer)
    assert "\n" not in str(error.value)


# -- transformers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random Llama as transformers makes it, and where it saved it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return model, folder


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_is_that_of_transformers(llama: tuple[Any, Path], penalty: float) -> None:
    theirs, folder = llama
    ours = hub.load_decoder(folder)
    sampling = Sampling(repetition_penalty=penalty)
    stop = Stop(16, frozenset(ours.config.eos_ids))
    texts = set()
    for seed, length in enumerate((1, 11)):
        ids = run.prompt(length, seed, vocab_size=200)
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            expected = theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=16, repetition_penalty=penalty,
            )[0, length:].tolist()  # fmt: skip
        assert list(run.plain(ours, [ids], stop, sampling)[0].tokens) == expected
        for draft in (
            EarlyExitDraft(2, LAYERS),
            AdaptiveExitDraft([1, 3], LAYERS, RoundCosts(1.0, 0.1, 0.02)),
        ):
            (row,) = run.drafted(ours, [ids], draft, 4, stop, sampling).rows
            assert list(row.tokens) == expected
        texts |= set(expected)
    assert len(texts) > 12
