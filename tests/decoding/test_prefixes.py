"""Embeddings before the prompt: plain decoding hears them, every draft writes the plain text, and
a draft that opens costs no call for the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch

import toy
import toy_decoding as run
from offramp.decoding.drafts import DecodeState, Draft, EarlyExitDraft, NoDraft, Outcome, Proposal
from offramp.decoding.sampling import Sampling
from offramp.decoding.stopping import Stop
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.nn.cache import KVCache
from offramp.nn.tower import TracedTower
from thinned import thinned
from toy_decoding import DRAFTS, KEPT, LAYERS
from toy_listening import BOS, Scene, scene

SAMPLED = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)


@cache
def listening(num_rows: int = 8, sampled: bool = False) -> Scene:
    return scene(num_rows, sampling=SAMPLED if sampled else Sampling())


def test_the_scene_is_worth_testing() -> None:
    s = listening()
    assert {row.reason for row in s.written} == {"stop", "length"}
    assert len({p.shape[0] for p in s.prefixes}) > 4
    assert len({row.tokens for row in s.written}) == 8, "the audio must matter"
    assert all(len(set(row.tokens)) > 3 for row in s.written)


@pytest.mark.parametrize("variant", thinned(toy.VARIANTS.keys(), toy.KEPT))
def test_each_token_is_the_best_after_audio_and_text(variant: str) -> None:
    """Without a cache, from the start, for every token."""
    model, text = run.model(**toy.VARIANTS[variant]).double(), run.prompt(3)
    prefix = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).double()
    (row,) = run.plain(model, [text], Stop(12), prefixes=[prefix])
    assert row != run.plain(model, [text], Stop(12))[0]
    for token in row.tokens:
        h = torch.cat((prefix[None], model.embed(torch.tensor([text]))), dim=1)
        h = model.run(h, 0, LAYERS, KVCache(model.config, 1, h.shape[1], dtype=h.dtype))
        assert int(model.logits(h, LAYERS)[0, -1].argmax()) == token
        text = [*text, token]


def test_embeddings_of_tokens_are_tokens() -> None:
    """A prompt may stand before itself as embeddings: nothing else changes, but for sampling, whose
    noise and penalty know the text alone."""
    model, prompts = run.model().double(), [run.prompt(9, seed=1), run.prompt(2, seed=2)]
    prefixes = [model.embed(torch.tensor([p]))[0, :-1] for p in prompts]
    expected = run.plain(model, prompts, Stop(12))
    last = [p[-1:] for p in prompts]
    assert run.plain(model, last, Stop(12), prefixes=prefixes) == expected
    assert run.drafted(model, last, NoDraft(), 4, Stop(12), prefixes=prefixes).rows == expected


@pytest.mark.parametrize(
    ("num_rows", "sampled"),
    [pytest.param(1, False, marks=pytest.mark.slow), (8, False), (8, True)],
)
@pytest.mark.parametrize("draft", thinned(DRAFTS.keys(), (*KEPT, "another model")))
def test_every_draft_writes_the_plain_text(draft: str, num_rows: int, sampled: bool) -> None:
    s = listening(num_rows, sampled)
    assert s.drafted(DRAFTS[draft](s.model), 4).rows == s.written


def test_prompts_of_uneven_length_after_audio_of_uneven_length() -> None:
    s = listening()
    prompts = [run.prompt(1 + 3 * b % 5, seed=b) for b in range(8)]
    expected = run.plain(s.model, prompts, s.stop, prefixes=s.prefixes)
    for draft in (NoDraft(), Opener([[b, 3] for b in range(8)])):
        got = run.drafted(s.model, prompts, draft, 5, s.stop, prefixes=s.prefixes)
        assert got.rows == expected


# -- a draft that opens ------------------------------------------------------------------------


class Opener(Draft):
    """Drafts what it is given with the prompt, then nothing; keeps what it is told."""

    wants_hidden = True

    def __init__(self, rows: Sequence[Sequence[int]], watch: tuple[int, ...] = ()) -> None:
        self._rows, self._watch = rows, watch
        self.outcomes: list[Outcome] = []

    def open(self, state: DecodeState, k: int) -> Proposal:
        made = Proposal.ragged(state, [row[:k] for row in self._rows])
        return Proposal(made.tokens, made.lengths, watch=self._watch)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        return Proposal.empty(state)

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        held, layers = tuple(state.cached()), range(LAYERS)
        assert [state.cache.length(i) for i in layers] == [held] * LAYERS
        self.outcomes.append(outcome)


@pytest.mark.parametrize("with_audio", [False, True])
def test_prompt_and_draft_are_one_call(with_audio: bool) -> None:
    """Rows draft 0 to 7 right tokens and then a wrong one."""
    s = listening()
    prefixes = s.prefixes if with_audio else None
    prompts = [run.prompt(1 + b % 3, seed=b) for b in range(8)]
    expected = run.plain(s.model, prompts, Stop(12), prefixes=prefixes)
    rows = [[*row.tokens[:b], (row.tokens[b] + 1) % 61] for b, row in enumerate(expected)]
    tower, draft = TracedTower(s.model, Trace(LAYERS)), Opener(rows)
    got = run.drafted(tower, prompts, draft, 9, Stop(12), prefixes=prefixes)
    assert got.rows == expected
    assert [len(step.tokens) for step in got.steps[:8]] == [b + 1 for b in range(8)]
    assert [step.accepted for step in got.steps[:8]] == list(range(8))
    rounds = 1 + 11  # the row whose draft was wrong at once writes one token per round
    assert tower.trace.layer_calls == [rounds] * LAYERS
    # Logits at the newest token and each drafted one, for all rows: none for the prompt.
    assert tower.trace.head_positions == 8 * 9 + sum(12 - (b + 1) for b in range(8))


def test_a_draft_that_does_not_open_costs_a_call_more() -> None:
    s = listening(1)
    for draft, extra in ((NoDraft(), 1), (Opener([[]]), 0)):
        tower = TracedTower(s.model, Trace(LAYERS))
        got = run.drafted(tower, s.prompts, draft, 4, Stop(6), prefixes=s.prefixes)
        assert tower.trace.layer_calls == [extra + 6] * LAYERS
        assert tower.trace.layer_positions == [s.prefixes[0].shape[0] + 6] * LAYERS
        assert len(got.steps) == 6


def test_the_longest_prompt_may_have_the_shortest_draft() -> None:
    """Rows are padded to the longest of prompt and draft together."""
    model, prompts = run.model().double(), [run.prompt(20, seed=1), run.prompt(1, seed=2)]
    expected = run.plain(model, prompts, [Stop(1), Stop(14)])
    draft = Opener([[], list(expected[1].tokens[:13])])
    tower = TracedTower(model, Trace(LAYERS))
    got = run.drafted(tower, prompts, draft, 50, [Stop(1), Stop(14)])
    assert got.rows == expected
    assert tower.trace.layer_positions == [2 * 20] * LAYERS


def test_with_room_for_one_token_the_prompt_is_still_read() -> None:
    s = listening()
    expected = run.plain(s.model, s.prompts, Stop(1), prefixes=s.prefixes)
    tower = TracedTower(s.model, Trace(LAYERS))
    got = run.drafted(tower, s.prompts, Opener([[5]] * 8), 4, Stop(1), prefixes=s.prefixes)
    assert got.rows == expected
    assert all(step.drafted == () for step in got.steps)
    assert tower.trace.layer_calls == [1] * LAYERS


def test_a_draft_is_shown_the_state_of_the_newest_token() -> None:
    """That of which the last emitted token was chosen, in every round; and watched exits from the
    first call on."""
    s = listening(3)
    expected = run.plain(s.model, s.prompts, Stop(6), prefixes=s.prefixes)
    draft = Opener([list(row.tokens[:b]) for b, row in enumerate(expected)], watch=(2,))
    run.drafted(s.model, s.prompts, draft, 5, Stop(6), prefixes=s.prefixes)
    for b, row in enumerate(expected):
        ids = torch.tensor([[BOS, *row.tokens[:-1]]])
        h = torch.cat((s.prefixes[b][None], s.model.embed(ids)), dim=1)
        cache = KVCache(s.model.config, 1, h.shape[1], dtype=h.dtype)
        states = s.model.run(h, 0, LAYERS, cache)[0, -6:]
        seen = torch.stack([o.hidden[b] for o in draft.outcomes if len(o.drafted) == 3])
        torch.testing.assert_close(seen, states[b : b + len(seen)], rtol=1e-9, atol=1e-9)
    assert draft.outcomes[0].matches[2][1] == 1 + 2 + 3
    assert all(not o.matches for o in draft.outcomes[1:])


def test_states_are_not_gathered_unless_asked_for() -> None:
    s, draft = listening(1), Opener([[]])
    draft.wants_hidden = False
    run.drafted(s.model, s.prompts, draft, 4, Stop(3), prefixes=s.prefixes)
    assert [o.hidden for o in draft.outcomes] == [None] * 3


# -- what is refused ---------------------------------------------------------------------------


class Hasty(EarlyExitDraft):
    """Hands over states of layers that have not read the prompt."""

    def open(self, state: DecodeState, k: int) -> Proposal:
        return self.propose(state, k)


def test_nobody_has_states_before_the_prompt_is_read() -> None:
    s = listening(1)
    with pytest.raises(InputError, match="no layer has read the prompt") as error:
        run.drafted(s.model, s.prompts, Hasty(2, LAYERS), 4, s.stop, prefixes=s.prefixes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prefixes", "says"),
    [
        ([torch.zeros(3, 32), torch.zeros(3, 32)], "2 prefixes for 1 prompts"),
        ([torch.zeros(3, 31)], r"shape \[3, 31\]; the model needs \[m, 32\]"),
        ([torch.zeros(1, 3, 32)], r"shape \[1, 3, 32\]"),
    ],
)
def test_prefixes_that_do_not_fit_are_refused(prefixes: list[torch.Tensor], says: str) -> None:
    model = run.model()
    with pytest.raises(InputError, match=says) as error:
        run.drafted(model, [[BOS]], NoDraft(), 4, Stop(3), prefixes=prefixes)
    assert "\n" not in str(error.value)
    if len(prefixes) == 1:
        with pytest.raises(InputError, match=says):
            run.plain(model, [[BOS]], Stop(3), prefixes=prefixes)
