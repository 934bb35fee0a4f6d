"""What each draft proposes, and that it keeps up with the text; what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

import toy_decoding as run
from offramp.decoding.drafts import (
    AdaptiveExitDraft,
    DecodeState,
    Draft,
    EarlyExitDraft,
    ModelDraft,
    NGramDraft,
    NoDraft,
    Outcome,
    Proposal,
)
from offramp.decoding.exits import ExitSelector, RoundCosts
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import Stop
from offramp.errors import InputError
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.cache import KVCache
from offramp.nn.tower import Tower, TruncatedTower
from thinned import thinned
from toy_decoding import DRAFTS, GREEDY, KEPT, LAYERS

COSTS = RoundCosts(1.0, 0.1, 0.02)
TEXTS = [run.prompt(6, seed=1), run.prompt(3, seed=2)]


def state_of(
    model: Tower, texts: Sequence[Sequence[int]] = TEXTS, sampling: Sampling = GREEDY
) -> DecodeState:
    """As the loop has it after prefill: all but the newest token of each row is in the cache."""
    size = model.config.vocab_size
    cache = KVCache(model.config, len(texts), 64)
    longest = max(map(len, texts))
    padded = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    model.run(model.embed(padded), 0, model.config.num_layers, cache)
    cache.truncate([len(text) - 1 for text in texts])
    chooser = Chooser(sampling, texts, range(len(texts)), size, model.device)
    return DecodeState(model, cache, [list(text) for text in texts], chooser)


def continuations(tower: Tower, count: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    rows = run.plain(tower, [list(t) for t in TEXTS], Stop(count), sampling)
    return [list(row.tokens) for row in rows]


# -- early exit --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 9, 0.9, 1.2, seed=2)])
@pytest.mark.parametrize("exit_layer", [1, 3, 5])
def test_an_early_exit_drafts_what_the_truncated_tower_would_write(
    exit_layer: int, sampling: Sampling
) -> None:
    model = run.model()
    state = state_of(model, sampling=sampling)
    proposal = EarlyExitDraft(exit_layer, LAYERS).propose(state, 5)
    expected = continuations(TruncatedTower(model, exit_layer), 5, sampling)
    assert proposal.tokens.tolist() == expected
    assert proposal.exit_layer == exit_layer
    assert [proposal.length(row) for row in range(2)] == [5, 5]
    assert [state.cache.length(i) for i in (0, exit_layer - 1)] == [(10, 7)] * 2
    assert [state.cache.length(i) for i in (exit_layer, LAYERS - 1)] == [(5, 2)] * 2


def test_the_states_that_are_handed_over_are_those_of_the_tower() -> None:
    """hidden: after `exit_layer` layers, of the newest token and all drafted ones but the last."""
    model = run.model()
    state = state_of(model)
    proposal = EarlyExitDraft(3, LAYERS).propose(state, 4)
    assert proposal.hidden is not None
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([[*text, *proposal.tokens[row, :-1].tolist()]])
        h = model.run(model.embed(ids), 0, 3, KVCache(model.config, 1, ids.shape[1]))
        torch.testing.assert_close(
            proposal.hidden[row], h[0, len(text) - 1 :], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("min_confidence", [0.02, 0.06, 0.15, 0.5])
def test_drafting_stops_at_the_first_unlikely_token(min_confidence: float) -> None:
    model = run.model()
    for seed in range(6):
        text = run.prompt(5, seed)
        state = state_of(model, [text])
        draft = EarlyExitDraft(3, LAYERS, min_confidence)
        drafted = draft.propose(state, 6).tokens[0].tolist()
        tower = TruncatedTower(model, 3)
        likely = []
        for n in range(len(drafted)):
            ids = torch.tensor([text + drafted[:n]])
            h = tower.run(tower.embed(ids), 0, 3, KVCache(tower.config, 1, ids.shape[1]))
            likely.append(float(tower.logits(h, 3)[0, -1].softmax(-1).max()) >= min_confidence)
        assert all(likely[:-1])
        assert not likely[-1] or len(drafted) == 6


def test_a_batch_drafts_on_while_one_row_is_confident() -> None:
    model, texts = run.model(), [run.prompt(5, seed) for seed in range(6)]
    draft = EarlyExitDraft(3, LAYERS, 0.06)
    alone = [draft.propose(state_of(model, [text]), 6).tokens.shape[1] for text in texts]
    together = draft.propose(state_of(model, texts), 6).tokens.shape[1]
    assert min(alone) < max(alone) <= together


def test_drafting_stops_at_the_end_of_text() -> None:
    model = run.model(late=0.0)
    first, second = continuations(model, 6)
    draft = EarlyExitDraft(2, LAYERS, eos_ids=frozenset({first[2]}))
    assert draft.propose(state_of(model, TEXTS[:1]), 6).tokens.tolist() == [first[:3]]
    # As long as one row goes on, the others are carried along.
    assert first[2] not in second[:6]
    assert draft.propose(state_of(model), 6).tokens.tolist() == [first, second]


@pytest.mark.parametrize("exit_layer", [-1, 0, LAYERS, LAYERS + 1])
@pytest.mark.parametrize("make", [
    lambda e: EarlyExitDraft(e, LAYERS),
    lambda e: AdaptiveExitDraft([1, e], LAYERS, COSTS),
])  # fmt: skip
def test_a_draft_leaves_within_the_tower(make: Callable[[int], Draft], exit_layer: int) -> None:
    with pytest.raises(InputError, match=f"exit layer is {exit_layer}; .* between 1 and 5") as e:
        make(exit_layer)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EarlyExitDraft(1, LAYERS, -0.1), "min_confidence is -0.1"),
        (lambda: EarlyExitDraft(1, LAYERS, 1.0), "min_confidence is 1.0"),
        (lambda: EarlyExitDraft(1, LAYERS, float("nan")), "min_confidence is nan"),
        (lambda: AdaptiveExitDraft([], LAYERS, COSTS), "no exit to choose from"),
        (lambda: NGramDraft(0), "max_ngram is 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: Callable[[], Draft], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


# -- adaptive early exit -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_drafting_soon_stops_where_exits_are_of_no_use(seed: int, rows: int) -> None:
    """It goes on looking, so it may try again, but little is drafted in vain."""
    model = run.model(seed, late=1.0)
    for layer in model.layers[4:]:  # the top decides, and no exit below it knows
        layer.feed_forward.down.weight.mul_(20.0)
    prompts = [run.prompt(9, seed + row) for row in range(rows)]
    draft = AdaptiveExitDraft([1, 2, 3], LAYERS, COSTS)
    got = run.drafted(model, prompts, draft, 8, Stop(90))
    assert got.drafted < 0.1 * 90 * rows
    assert sum(len(s.drafted) for s in got.steps[len(got.steps) // 2 :]) <= 2 * rows


@pytest.mark.parametrize("rows", [1, 3])
def test_drafting_goes_deep_where_an_exit_is_perfect(rows: int) -> None:
    model = run.model(late=0.0)  # from layer 2 on all exits agree; layer 1 rarely
    prompts = [run.prompt(9, row) for row in range(rows)]
    draft = AdaptiveExitDraft([1, 2, 3], LAYERS, COSTS)
    got = run.drafted(model, prompts, draft, 8, Stop(60))
    later = got.steps[6 * rows :]  # first the cheapest exit is tried, as nothing is known
    assert {s.exit_layer for s in later if s.drafted} == {2}, "the cheapest of the perfect"
    assert got.accepted > 0.8 * got.drafted
    assert len(got.steps) <= rows * 15  # of 60 tokens; some rounds go into finding the exit
    assert max(len(s.drafted) for s in got.steps) == 8


def test_a_new_batch_is_judged_anew() -> None:
    draft, prompt = AdaptiveExitDraft([2], LAYERS, COSTS), [run.prompt(9)]
    good, bad = run.model(late=0.0), run.model(late=1.0)
    for layer in bad.layers[2:]:
        layer.feed_forward.down.weight.mul_(20.0)
    steps = [run.drafted(m, prompt, draft, 8, Stop(40)).steps for m in (good, bad, good)]
    assert steps[0] == steps[2]
    assert sum(len(s.drafted) for s in steps[1]) < sum(len(s.drafted) for s in steps[0])


def test_after_a_prompt_of_one_token_there_is_no_opinion() -> None:
    model = run.model(late=0.0)
    got = run.drafted(model, [[5]], AdaptiveExitDraft([2], LAYERS, COSTS), 8, Stop(60))
    assert got.rows == run.plain(model, [[5]], Stop(60))
    assert got.accepted == got.drafted > 30


def adaptive(state: DecodeState, rights: dict[int, int]) -> AdaptiveExitDraft:
    """A draft for exits 1, 3, 5 that saw each of `rights` agree so often of 8."""
    draft = AdaptiveExitDraft([1, 3, 5], LAYERS, RoundCosts(1.0, 0.0, 0.0))
    draft.begin(state)
    draft.observe(state, Outcome([], [], {e: (right, 8) for e, right in rights.items()}))
    return draft


@pytest.mark.parametrize(
    ("rights", "seen"),
    [
        # What runs anyway is looked at: above the exit in use; where none is, all of them first,
        # for the answer may be short, then the cheapest of equals.
        ({1: 8, 3: 8, 5: 8}, {4: (3, 5), 8: (3, 5), 12: (3, 5), 16: (3, 5)}),
        ({1: 0, 3: 8, 5: 8}, {4: (5,), 8: (5,), 12: (5,), 16: (5,)}),
        ({1: 0, 3: 0, 5: 0}, {1: (1, 3, 5), 2: (1,), 4: (1,), 8: (1,), 16: (1,)}),
    ],
)
def test_now_and_then_exits_are_compared(
    rights: dict[int, int], seen: dict[int, tuple[int, ...]]
) -> None:
    state = state_of(run.model(), TEXTS[:1])
    draft, watched = adaptive(state, rights), {}
    for round_ in range(1, 17):
        proposal = draft.propose(state, 2)
        state.cache.truncate([len(text) - 1 for text in state.texts])
        if proposal.watch:
            watched[round_] = proposal.watch
    assert watched == seen


def test_a_draft_that_was_cut_was_tried_as_far_as_its_first_refusal() -> None:
    """3 accepted of 6 drafted: the fourth was refused, and nobody knows of the other two."""
    state = state_of(run.model(), TEXTS[:1])
    draft, costs = adaptive(state, {1: 8, 3: 0, 5: 0}), RoundCosts(1.0, 0.0, 0.0)
    honest, hasty = (ExitSelector(LAYERS, [1], costs) for _ in range(2))
    for selector in (honest, hasty):
        selector.record(1, 8, 8)
    for _ in range(40):
        draft.propose(state, 30)
        draft.observe(state, Outcome([6], [3]))
        state.cache.truncate([len(text) - 1 for text in state.texts])
        honest.record(1, 3, 4)
        hasty.record(1, 3, 6)
    assert honest.plan(30) != hasty.plan(30)
    proposal = draft.propose(state, 30)
    assert (proposal.exit_layer, proposal.tokens.shape[1]) == honest.plan(30)


# -- words that stood before -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "k", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 1, 2, 3], 9, [9, 1, 2, 3]),  # no further than the text goes
        ([2, 3, 8, 1, 2, 3, 9, 1, 2, 3], 1, [9]),  # three tokens say more than two
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),  # the latest of two
        ([5, 1, 6, 2, 1], 3, [6, 2, 1]),  # one token will do
        ([4, 4], 3, [4]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
    ],
)
def test_an_n_gram_proposes_what_came_next(text: list[int], k: int, expected: list[int]) -> None:
    proposal = NGramDraft(3).propose(state_of(run.model(), [text]), k)
    assert proposal.tokens.tolist() == [expected]
    assert proposal.hidden is None


def test_an_n_gram_is_what_a_plain_search_finds() -> None:
    """The search goes through bytes; tokens whose bytes resemble each other must not mislead."""
    rng, state = random.Random(0), state_of(run.model(), [[1]])
    for _ in range(2_000):
        alphabet = rng.choice([[0], [0, 1], [0, 1, 256, 65_536], [5, 1_280, 327_680, 2**40]])
        text = [rng.choice(alphabet) for _ in range(rng.randint(1, 20))]
        longest, k = rng.randint(1, 4), rng.randint(1, 3)
        expected: list[int] = []
        for n in range(min(longest, len(text) - 1), 0, -1):
            starts = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
            if starts:
                expected = text[starts[-1] + n : starts[-1] + n + k]
                break
        proposal = NGramDraft(longest).propose(replace(state, texts=[text]), k)
        assert proposal.tokens.tolist() == [expected]


def test_each_row_finds_its_own() -> None:
    texts = [[1, 2, 3, 1], [1, 2, 3], [7, 7]]
    proposal = NGramDraft().propose(state_of(run.model(), texts), 4)
    found = [proposal.tokens[row, : proposal.length(row)].tolist() for row in range(3)]
    assert found == [[2, 3, 1], [], [7]]


def test_text_that_repeats_is_found() -> None:
    model = run.model(late=0.0)
    ids = run.prompt(5)
    once = list(run.plain(model, [ids], Stop(12))[0].tokens)
    loop = [run.prompt(1)[0]] * 3
    got = run.drafted(model, [ids + once + ids + once[:2], loop], NGramDraft(), 6, Stop(24))
    assert got.drafted > 0
    assert got.rows == run.plain(model, [ids + once + ids + once[:2], loop], Stop(24))


# -- another model -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 9, 0.9, 1.2, seed=2)])
def test_a_model_drafts_what_it_would_write(sampling: Sampling) -> None:
    target, small = run.model(), run.model(seed=4, num_layers=2)
    draft, state = ModelDraft(small), state_of(target, sampling=sampling)
    draft.begin(state)
    proposal = draft.propose(state, 5)
    assert proposal.tokens.tolist() == continuations(small, 5, sampling)
    assert (proposal.hidden, proposal.exit_layer) == (None, 0)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, seed=3)])
def test_the_same_model_is_always_right(sampling: Sampling) -> None:
    model, prompts = run.model(), [run.prompt(6, 1), run.prompt(2, 2), run.prompt(9, 3)]
    got = run.drafted(model, prompts, ModelDraft(model), 5, Stop(24), sampling)
    assert got.accepted == got.drafted == 3 * 20
    assert len(got.steps) == 3 * 4


def test_a_model_reads_each_token_once() -> None:
    """The draft model keeps its keys too: prompt and text once, and what was refused."""
    small, prompts, positions = run.model(seed=4, num_layers=2), [run.prompt(7)], []
    small.layers[0].register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1]))
    got = run.drafted(run.model(), prompts, ModelDraft(small), 4, Stop(20))
    rounds = [s for s in got.steps if s.drafted]
    assert positions[0] == 7
    # After a round of all accepted it has the last drafted token still to read, else the newest.
    read = [1 + (s.accepted == len(s.drafted)) for s in rounds[:-1]]
    assert [n for n in positions[1:] if n > 1] == [n for n in read if n > 1]
    assert sum(positions) == 7 + sum(read) + sum(len(s.drafted) - 1 for s in rounds)


def test_models_of_two_vocabularies_do_not_go_together() -> None:
    draft = ModelDraft(run.model(vocab_size=40))
    with pytest.raises(InputError, match="40 tokens and the target 61") as error:
        run.drafted(run.model(), TEXTS, draft, 4, Stop(5))
    assert "\n" not in str(error.value)


# -- the protocol ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("name", DRAFTS)
def test_a_proposal_is_at_most_what_was_asked_for(name: str, k: int) -> None:
    model = run.model()
    state, draft = state_of(model), DRAFTS[name](model)
    draft.begin(state)
    proposal = draft.propose(state, k)
    rows, width = proposal.tokens.shape
    assert (rows, proposal.tokens.dtype) == (2, torch.long)
    assert max(proposal.length(row) for row in range(rows)) <= width <= k
    assert ((proposal.tokens >= 0) & (proposal.tokens < 61)).all()
    assert state.texts == TEXTS, "a draft looks and does not touch"
    hidden = 0 if proposal.hidden is None else proposal.hidden.shape[1]
    assert state.cache.length(0) == tuple(len(text) - 1 + hidden for text in TEXTS)


@pytest.mark.parametrize("name", thinned(DRAFTS.keys(), (*KEPT, "another model")))
def test_a_draft_serves_one_batch_after_another(name: str) -> None:
    """Also after a batch that was given up half-way."""
    model = run.model()
    draft = DRAFTS[name](model)
    chooser = Chooser(GREEDY, TEXTS, [0, 1], 61, model.device)
    given_up = speculate(model, TEXTS, draft, 4, chooser, run.make_ends(2, Stop(20)))
    for _ in range(3):
        next(given_up)
    given_up.close()
    for prompts in ([run.prompt(4)], [run.prompt(2), *TEXTS]):
        expected = run.plain(model, prompts, Stop(9))
        assert run.drafted(model, prompts, draft, 3, Stop(9)).rows == expected


class Recorder(NoDraft):
    """Proposes what it is told to, and keeps what it is told."""

    def __init__(self, proposals: list[list[list[int]]], watch: tuple[int, ...] = ()) -> None:
        self._proposals, self._watch = proposals, watch
        self.outcomes: list[Outcome] = []
        self.kept: list[list[int]] = []

    def propose(self, state: DecodeState, k: int) -> Proposal:
        rows = self._proposals.pop(0) if self._proposals else [[] for _ in state.texts]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
        return Proposal(tokens.view(len(rows), width), [len(r) for r in rows], watch=self._watch)

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def keep(self, rows: Sequence[int]) -> None:
        self.kept.append(list(rows))


def test_a_draft_is_told_what_became_of_its_tokens() -> None:
    model = run.model()
    one, two = continuations(model, 12)
    wrong = [(token + 1) % 61 for token in one]
    draft = Recorder(
        [
            [one[:3], [two[0], wrong[1]]],  # all three, plus one; the first, plus one
            [[wrong[4]], []],  # none, plus one; nothing drafted, one
            [one[5:8], two[3:5]],  # all, plus one; the second row ends with its second token
            [one[9:11]],
        ]
    )
    got = run.drafted(model, TEXTS, draft, 3, [Stop(12), Stop(5)])
    assert got.rows == run.plain(model, TEXTS, [Stop(12), Stop(5)])
    # Behind the newest token the tower read one that was wrong: what it chose there is told too.
    (misled,) = run.plain(model, [[*TEXTS[1], two[0], wrong[1]]], [Stop(1)])
    assert draft.outcomes == [
        Outcome([3, 2], [3, 1], beyond=[[], [*misled.tokens]]),
        Outcome([1, 0], [0, 0], beyond=[draft.outcomes[1].beyond[0], []]),
        Outcome([3, 2], [3, 2], beyond=[[], draft.outcomes[2].beyond[1]]),
        Outcome([2], [2], beyond=[[]]),
    ]
    assert len(draft.outcomes[1].beyond[0]) == len(draft.outcomes[2].beyond[1]) == 1
    assert draft.kept == [[0]]


@pytest.mark.parametrize("sampling", [GREEDY, *(Sampling(1.0, seed=i) for i in range(3))])
def test_a_draft_is_told_how_watched_exits_compare(sampling: Sampling) -> None:
    """Agreements with the tower wherever the context was true: after the newest token and the
    accepted one, not after the refused one."""
    model = run.model()
    text = continuations(model, 4, sampling)[0]
    draft = Recorder([[[text[0], (text[1] + 1) % 61, text[2]]]], watch=(1, 3))
    run.drafted(model, TEXTS[:1], draft, 3, Stop(5), sampling)
    ids = torch.tensor([TEXTS[0] + text[:1]])
    chooser = Chooser(sampling, TEXTS[:1], [0], 61, model.device)
    choice = {}
    for e in (1, 3, LAYERS):
        h = model.run(model.embed(ids), 0, e, KVCache(model.config, 1, ids.shape[1]))
        choice[e] = chooser.choose(model.logits(h, e), [1], None)[0]
    for e in (1, 3):
        same = (choice[e] == choice[LAYERS]).tolist()
        assert draft.outcomes[0].matches[e] == (sum(same[-2:]), 2)


def test_hidden_states_and_their_exit_layer_come_together() -> None:
    tokens, hidden = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 4)
    for wrong in ({"exit_layer": 4}, {"hidden": hidden}):
        with pytest.raises(InputError, match="give both or neither"):
            Proposal(tokens, **wrong)


def test_the_cache_is_no_larger_than_what_can_be_drafted() -> None:
    model = run.model()
    got = run.drafted(model, TEXTS, EarlyExitDraft(3, LAYERS), 10**12, Stop(6))
    assert got.rows == run.plain(model, TEXTS, Stop(6))


def test_a_draft_of_no_tokens_is_not_asked() -> None:
    """With room for one token only, the tower decodes plainly."""

    class Refuses(NoDraft):
        def propose(self, state: DecodeState, k: int) -> Proposal:
            raise AssertionError("nothing can be drafted")

    model: DecoderLM = run.model()
    got = run.drafted(model, TEXTS, Refuses(), 4, Stop(1))
    assert got.rows == run.plain(model, TEXTS, Stop(1))
