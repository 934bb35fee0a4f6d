"""Beam search over a tower against the obvious version, which reads every text from its start."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import toy_decoding
from offramp.decoding.stopping import Stop
from offramp.decoding.tower_beam import (
    TextHypothesis,
    TextRows,
    TowerBeam,
    log_softmax,
    shared,
    tower_beam,
)
from offramp.errors import ConfigError, InputError
from offramp.models.decoder_lm import DecoderLM
from thinned import thinned
from toy_beam import EOS, PROMPT, assert_same, counted, embeddings, small, state_after


def slow_beam(
    model: DecoderLM, prompt: list[int], beam: TowerBeam, prefix: Tensor | None = None
) -> list[TextHypothesis]:
    """All continuations of every open text, each text read anew, and no early end."""
    opened: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: list[TextHypothesis] = []
    for _ in range(beam.max_tokens):
        longer = []
        for text, score in opened:
            state = state_after(model, prompt, text, prefix)
            log_probs = log_softmax(model.logits(state, model.config.num_layers))
            longer += [((*text, t), score + p) for t, p in enumerate(log_probs.tolist())]
        longer.sort(key=lambda item: -item[1])
        done += [TextHypothesis(t, s, "stop") for t, s in longer[: beam.beam_size] if t[-1] in EOS]
        opened = [item for item in longer if item[0][-1] not in EOS][: beam.beam_size]
    done += [TextHypothesis(t, s, "length") for t, s in opened]
    return sorted(done, key=lambda h: -h.score)[: beam.n_best]


@pytest.mark.parametrize("beam_size", thinned([1, 2, 3, 5], keep=[3]))
@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_beam_is_the_obvious_one(beam_size: int, with_prefix: bool) -> None:
    reasons = set()
    for seed in range(4):
        model, prefix = small(seed), embeddings(6, seed) if with_prefix else None
        for n_best in (1, 4):
            beam = TowerBeam(8, EOS, beam_size, n_best)
            found = tower_beam(model, PROMPT, beam, prefix)
            assert_same(found, slow_beam(model, PROMPT, beam, prefix))
            reasons |= {h.finish_reason for h in found}
    assert reasons == {"stop", "length"}


def test_a_beam_that_holds_every_text_finds_the_best_ones() -> None:
    model, most = small(3, vocab_size=6), 3
    texts = [
        text
        for n in range(1, most + 1)
        for text in itertools.product(range(6), repeat=n)
        if not EOS & set(text[:-1]) and (n == most or text[-1] in EOS)
    ]
    scores = {}
    for text in texts:
        logs = [
            log_softmax(model.logits(state_after(model, PROMPT, text[:i]), 3))[token]
            for i, token in enumerate(text)
        ]
        scores[text] = float(sum(logs))
    found = tower_beam(model, PROMPT, TowerBeam(most, EOS, beam_size=500, n_best=5))
    best = sorted(scores, key=lambda text: -scores[text])[:5]
    assert [h.tokens for h in found] == best
    assert [h.score for h in found] == pytest.approx([scores[text] for text in best])


def test_a_beam_of_one_is_greedy_decoding() -> None:
    ended = set()
    for seed in range(8):
        model = small(seed)
        (found,) = tower_beam(model, PROMPT, TowerBeam(12, EOS, beam_size=1))
        (want,) = toy_decoding.plain(model, [PROMPT], Stop(12, EOS))
        assert (found.tokens, found.finish_reason) == (want.tokens, want.reason)
        ended.add(found.finish_reason)
    assert ended == {"stop", "length"}


def test_a_call_per_token_and_no_position_twice() -> None:
    model = small(1)
    traced = counted(model)
    found = tower_beam(traced, PROMPT, TowerBeam(9, frozenset(), 3, 3), embeddings(6))
    assert all(len(h.tokens) == 9 for h in found)
    assert traced.trace.layer_calls[0] == 9
    assert traced.trace.layer_positions[0] == 6 + len(PROMPT) + 8 * 3


def test_the_search_ends_once_no_open_text_can_win() -> None:
    """A text that ends at once with nearly all probability: nothing else is worth a call."""
    model = small(0)
    model.unembedding.weight.zero_()  # type: ignore[union-attr]
    state = state_after(model, PROMPT, ())
    model.unembedding.weight[min(EOS)] = 50 * model.norm(state)  # type: ignore[union-attr]
    calls = counted(model)
    (found,) = tower_beam(calls, PROMPT, TowerBeam(30, EOS))
    assert found.tokens == (min(EOS),)
    assert calls.trace.layer_calls[0] == 1


# -- rows ---------------------------------------------------------------------------------------


def test_rows_give_the_states_of_texts_however_they_grew() -> None:
    """Reordered, cut, doubled, left as they are and grown by unequal numbers of tokens."""
    model, prefix = small(2), embeddings(5)
    rows = TextRows(model, PROMPT, 8, prefix)
    held: list[tuple[int, ...]] = []
    for texts in [
        [(4, 4, 2)],
        [(4, 4, 2, 7), (4, 1, 2, 3, 6), (9,)],
        [(9, 8), (4, 4, 2, 7), (4, 1, 3), (9, 7, 7, 7)],
        [(4, 1, 3, 1, 1, 1, 1, 1)],
    ]:
        for text, states in zip(texts, rows.read(texts), strict=True):
            common = max((shared(text, other) for other in held), default=-1)
            assert len(states) == len(text) - common
            for i, state in enumerate(states):
                beginning = text[: common + 1 + i]
                want = state_after(model, PROMPT, beginning, prefix)
                torch.testing.assert_close(state, want, atol=1e-10, rtol=0)
        held = texts


def test_an_empty_prompt_and_a_foreign_prefix_are_refused() -> None:
    model, beam = small(), TowerBeam(4, EOS)
    with pytest.raises(InputError, match="the prompt is empty; give at least one token"):
        tower_beam(model, [], beam)
    for shape in ([3, 16], [1, 3, 32]):
        with pytest.raises(InputError, match=r"has shape .*; the decoder needs \[m, 32\]"):
            tower_beam(model, PROMPT, beam, torch.zeros(shape))


@pytest.mark.parametrize("name", ["max_tokens", "beam_size", "n_best"])
def test_impossible_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be a whole number of at least 1"):
        TowerBeam(**{"max_tokens": 4, "eos_ids": EOS, name: 0})  # type: ignore[arg-type]
