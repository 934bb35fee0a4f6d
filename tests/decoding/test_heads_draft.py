"""Multi-token heads as a draft: the plain text, one decoder call per round, few rounds."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

import toy_decoding as run
from offramp.decoding.drafts import DecodeState
from offramp.decoding.heads_draft import HeadsDraft, future_logits
from offramp.decoding.sampling import Chooser, Sampling
from offramp.energy.trace import Trace
from offramp.nn.cache import KVCache
from offramp.nn.tower import TracedTower
from offramp.results import DraftCounts
from thinned import thinned
from toy_decoding import LAYERS
from toy_listening import MAX_TOKENS, KnowingHeads, Scene, calls, scene, states

SETTINGS = {"greedy": Sampling(), "sampled": Sampling(0.9, top_p=0.9, seed=5)}


@cache
def listening(num_rows: int = 8, setting: str = "greedy") -> Scene:
    return scene(num_rows, seed=4, sampling=SETTINGS[setting])


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("count", thinned(range(2, 7), keep=(2, 4)))
def test_heads_that_know_take_one_call_for_k_tokens(count: int, num_rows: int) -> None:
    """The prompt's call gives one token, every other K."""
    s = listening(num_rows)
    got = s.drafted(HeadsDraft(KnowingHeads(s, count)))
    assert got.rows == s.written
    for row, written in enumerate(s.written):
        assert calls(got, row) == 1 + -(-(len(written.tokens) - 1) // count)
        assert calls(got, row) <= -(-len(written.tokens) // count) + 1


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("error_rate", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("count", thinned([2, 4, 6], keep=[4]))
def test_heads_that_err_write_the_plain_text(count: int, error_rate: float, setting: str) -> None:
    s = listening(8, setting)
    tower = TracedTower(s.model, Trace(LAYERS))
    heads = KnowingHeads(s, count, error_rate)
    got = run.drafted(
        tower, s.prompts, HeadsDraft(heads), 8, s.stop, s.sampling, prefixes=s.prefixes
    )
    assert got.rows == s.written
    rounds = max(calls(got, row) for row in range(8))
    assert tower.trace.layer_calls == [rounds] * LAYERS, "one call per round, prompt included"
    assert all(calls(got, b) <= len(row.tokens) for b, row in enumerate(s.written))
    kept = sum(DraftCounts.of(step).accepted for step in got.steps)
    assert kept + len(got.steps) == sum(len(row.tokens) for row in s.written)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("draft_vocab", [None, 1, 30])
def test_heads_may_know_part_of_the_vocabulary(draft_vocab: int | None, setting: str) -> None:
    s = listening(8, setting)
    heads = run.random_heads(s.model, draft_vocab=draft_vocab)
    got = s.drafted(HeadsDraft(heads))
    assert got.rows == s.written
    if draft_vocab:
        assert all(t < draft_vocab for step in got.steps for t in step.drafted)


def test_tokens_that_heads_do_not_know_are_impossible() -> None:
    s = listening(1)
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).double()
    whole = future_logits(run.random_heads(s.model), h, s.model)
    part = future_logits(run.random_heads(s.model, draft_vocab=30), h, s.model)
    assert whole.shape == part.shape == (3, 3, 61)
    torch.testing.assert_close(part[..., :30], whole[..., :30])
    assert part[..., 30:].eq(-torch.inf).all()


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_the_draft_is_what_the_heads_read_in_the_newest_state(k: int) -> None:
    """And no more of it than was asked for; random heads, so that nothing agrees by design."""
    s = listening(1)
    heads = run.random_heads(s.model, count=4)
    got = s.drafted(HeadsDraft(heads), num_draft_tokens=k)
    assert got.steps[0].drafted == (), "it opens without tokens"
    expected = heads.logits(states(s, 0), s.model).argmax(-1).tolist()
    at = 0
    for step, after in zip(got.steps, got.steps[1:], strict=False):
        at += len(step.tokens)
        assert list(after.drafted) == expected[at - 1][: min(k, MAX_TOKENS - at - 1)]


@pytest.mark.parametrize("least", [0.015, 0.02, 0.1, 1.0])
def test_a_row_drafts_up_to_the_first_head_that_is_not_certain_enough(least: float) -> None:
    s = listening(8)
    heads = run.random_heads(s.model, count=4)
    got = s.drafted(HeadsDraft(heads, least))
    assert got.rows == s.written
    drafted = 0
    for row in range(8):
        chances = heads.logits(states(s, row), s.model).softmax(-1)
        own, at = [step for step in got.steps if step.row == row], 0
        for step, after in pairwise(own):
            at += len(step.tokens)
            certain = [float(head.max()) >= least for head in chances[at - 1]]
            count = certain.index(False) if False in certain else len(certain)
            expected, room = chances[at - 1, :count].argmax(-1).tolist(), MAX_TOKENS - at - 1
            assert list(after.drafted[:room]) == expected[:room]
            drafted += count
    assert (drafted > 0) == (least < 1.0)


def test_with_nothing_chosen_yet_there_is_nothing_to_draft_from() -> None:
    """Least of all the states of another batch."""
    s = listening(1)
    chooser = Chooser(Sampling(), [[1]], [0], 61, s.model.device)
    state = DecodeState(s.model, KVCache(s.model.config, 1, 8), [[1]], chooser)
    draft = HeadsDraft(run.random_heads(s.model))
    s.drafted(draft)
    draft.begin(state)
    assert draft.propose(state, 3).tokens.shape == (1, 0)


def test_a_draft_serves_one_batch_after_another() -> None:
    s = listening()
    draft = HeadsDraft(KnowingHeads(s, 4, error_rate=0.3))
    assert s.drafted(draft).steps == s.drafted(draft).steps


def test_the_tower_is_the_same_with_and_without_heads() -> None:
    """Head 1 is the tower's own path: its logits are those of plain decoding, bit for bit."""
    s = listening(1)
    h = states(s, 0)
    before = s.model.logits(h[None], LAYERS).clone()
    s.drafted(HeadsDraft(run.random_heads(s.model)))
    assert torch.equal(s.model.logits(h[None], LAYERS), before)
