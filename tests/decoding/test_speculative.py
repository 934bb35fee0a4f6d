"""The draft-verify loop writes what plain decoding writes, and computes nothing twice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

import toy
import toy_decoding as run
from offramp.decoding.drafts import DecodeState, Draft, EarlyExitDraft, NoDraft, Outcome, Proposal
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import Stop
from offramp.energy.trace import Trace
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.cache import KVCache
from offramp.nn.tower import TracedTower
from offramp.tokenizer import TextTokenizer, train_bpe
from thinned import thinned
from toy_decoding import DRAFTS, GREEDY, KEPT, LAYERS

RAGGED = [run.prompt(9, seed=1), run.prompt(1, seed=2), run.prompt(4, seed=3)]
every_draft = pytest.mark.parametrize("draft", DRAFTS)
some_drafts = pytest.mark.parametrize("draft", thinned(DRAFTS.keys(), KEPT))


# -- the same tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("exit_layer", thinned(range(1, LAYERS), keep=(1, 4)))
def test_every_exit_and_draft_length_writes_the_plain_text(exit_layer: int) -> None:
    model, prompts = run.model(seed=exit_layer), [run.prompt(7, seed=exit_layer)]
    expected = run.plain(model, prompts, Stop(14))
    assert len(set(expected[0].tokens)) >= 7, "a text that repeats itself proves little"
    draft = EarlyExitDraft(exit_layer, LAYERS)
    runs = [run.drafted(model, prompts, draft, d, Stop(14)) for d in range(1, 9)]
    assert all(r.rows == expected for r in runs)
    drafted, accepted = sum(r.drafted for r in runs), sum(r.accepted for r in runs)
    assert 0 < accepted < drafted, "both ways of verifying must have been taken"


@cache
def ragged(variant: str) -> tuple[DecoderLM, list[Stop], list[run.Row]]:
    """Prompts of different lengths, rows that end at different times and for different reasons:
    (model, when each row ends, what it writes alone)."""
    model = run.model(seed=5, **toy.VARIANTS[variant])
    end = frozenset({run.plain(model, RAGGED[:1], Stop(5))[0].tokens[4]})
    stops = [Stop(9, end), Stop(9), Stop(3, end)]
    return model, stops, run.plain(model, RAGGED, stops)


@every_draft
@pytest.mark.parametrize("variant", thinned(toy.VARIANTS.keys(), keep=("sliding window",)))
def test_a_ragged_batch_writes_what_its_rows_write_alone(variant: str, draft: str) -> None:
    model, stops, expected = ragged(variant)
    assert expected[0].reason == "stop"
    assert len({len(row.tokens) for row in expected}) == 3
    assert run.drafted(model, RAGGED, DRAFTS[draft](model), 4, stops).rows == expected


@some_drafts
def test_a_batch_of_one_writes_the_plain_text(draft: str) -> None:
    model = run.model(seed=3)
    expected = run.plain(model, RAGGED[:1], Stop(24))
    assert run.drafted(model, RAGGED[:1], DRAFTS[draft](model), 5, Stop(24)).rows == expected


@some_drafts
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_the_last_tokens_are_the_plain_ones(max_tokens: int, draft: str) -> None:
    """max_tokens 1 leaves nothing to draft, 2 and 3 less than the draft length; also after a
    prompt of one token, which leaves nothing to prefill."""
    model = run.model(late=0.0)
    for prompts in ([[7]], RAGGED):
        expected = run.plain(model, prompts, Stop(max_tokens))
        got = run.drafted(model, prompts, DRAFTS[draft](model), 8, Stop(max_tokens))
        assert got.rows == expected
        assert all(len(s.drafted) <= max_tokens - 1 for s in got.steps)


@pytest.mark.parametrize("at", range(6))
def test_the_end_of_text_may_come_anywhere_in_a_draft(at: int) -> None:
    model, prompts = run.model(late=0.0), [run.prompt(5, seed=8)]
    free = run.plain(model, prompts, Stop(6))[0].tokens
    stop = Stop(30, frozenset({free[at]}))
    expected = run.plain(model, prompts, stop)
    # The draft that knows the end stops there, the other runs on: no difference to the text.
    for eos_ids in (frozenset[int](), stop.token_ids):
        draft = EarlyExitDraft(2, LAYERS, eos_ids=eos_ids)
        assert run.drafted(model, prompts, draft, 6, stop).rows == expected


@cache
def cut_by_strings() -> tuple[DecoderLM, TextTokenizer, list[list[int]], Stop, list[run.Row]]:
    """(model, its tokenizer, prompts, strings that end them, what is written before those)"""
    tokenizer = train_bpe(["the sun rises in the east and sets in the west"], 290, [])
    model = run.model(late=0.1, vocab_size=tokenizer.vocab_size)
    _write_letters(model, tokenizer)
    prompts = [tokenizer.encode("the sun"), tokenizer.encode("in")]
    free = run.plain(model, prompts, Stop(20), tokenizer=tokenizer)
    assert all(len(row.text) >= 20 for row in free)
    first, second = (tokenizer.decode(row.tokens[:7]) for row in free)
    # The last letter of one token and the first of the next; where it first stands may be sooner.
    stop = Stop(20, strings=(first[-3:], second[-3:] + "?", second[-2:]))
    expected = run.plain(model, prompts, stop, tokenizer=tokenizer)
    assert [row.reason for row in expected] == ["stop", "stop"]
    return model, tokenizer, prompts, stop, expected


@some_drafts
def test_a_stop_string_over_several_tokens_cuts_where_plain_decoding_does(draft: str) -> None:
    model, tokenizer, prompts, stop, expected = cut_by_strings()
    assert run.drafted(model, prompts, DRAFTS[draft](model), 6, stop, tokenizer=tokenizer).rows == (
        expected
    )


def _write_letters(model: DecoderLM, tokenizer: TextTokenizer) -> None:
    """Let the model choose among tokens of letters only."""
    assert model.unembedding is not None
    for token in range(tokenizer.vocab_size):
        if not tokenizer.decode([token]).isalpha() or not tokenizer.decode([token]).isascii():
            model.unembedding.weight[token] = 0.0


# Logits of these models lie within +-2; 8 bits of mantissa make them wrong by up to 0.1, and two
# ways of rounding have been seen to part where the best two were less than 0.02 apart.
_BF16_EPS = 0.0625


class Logged(TracedTower):
    """A tower that keeps the gap between the best two logits of every token it was asked for."""

    def __init__(self, model: DecoderLM) -> None:
        super().__init__(model, Trace(model.config.num_layers))
        self.gaps: list[float] = []

    def logits(self, h: torch.Tensor, exit_layer: int) -> torch.Tensor:
        logits = super().logits(h, exit_layer)
        best = logits.float().topk(2).values
        self.gaps += (best[..., 0] - best[..., 1]).flatten().tolist()
        return logits


@pytest.mark.parametrize("exit_layer", [1, 3])
@pytest.mark.parametrize("seed", thinned([0, 5], keep=[5]))
def test_in_bfloat16_texts_part_only_where_two_tokens_are_about_equal(
    seed: int, exit_layer: int
) -> None:
    """One row and several are rounded differently: a near-tie may fall the other way."""
    model, prompts = run.model(seed, late=0.4).bfloat16(), [run.prompt(6, seed)]
    tower = Logged(model)
    (expected,) = run.plain(tower, prompts, Stop(30))
    (got,) = run.drafted(model, prompts, EarlyExitDraft(exit_layer, LAYERS), 4, Stop(30)).rows
    pairs = zip(got.tokens, expected.tokens, strict=True)
    parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert parted is None or tower.gaps[parted] <= _BF16_EPS


# -- no work done twice ------------------------------------------------------------------------


def counted(model: DecoderLM) -> list[int]:
    """Positions that pass each layer from now on, counted at the layer itself."""
    counts = [0] * len(model.layers)

    def count(index: int, h: torch.Tensor) -> None:
        counts[index] += h.shape[0] * h.shape[1]

    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _, args, i=i: count(i, args[0]))
    return counts


@every_draft
@pytest.mark.parametrize("late", thinned([0.0, 0.2, 1.0], keep=[0.2]))
def test_no_layer_computes_a_position_twice(late: float, draft: str) -> None:
    """Every layer sees the prompt and the text but for its last token, and what was refused."""
    model, prompts = run.model(late=late), [run.prompt(6)]
    source = DRAFTS[draft](run.model(late=late) if draft == "the same model" else model)
    tower, counts = TracedTower(model, Trace(LAYERS)), counted(model)
    got = run.drafted(tower, prompts, source, 5, Stop(14))
    refused = got.drafted - got.accepted
    # A text that ends in the middle of its draft ends with a token that was computed.
    ended_in_draft = got.steps[-1].accepted == len(got.steps[-1].tokens)
    expected = 6 + 14 + refused - 1 + ended_in_draft
    assert counts == [expected] * LAYERS
    assert tower.trace.layer_positions == counts


def test_work_of_the_reference_case() -> None:
    """12 layers, exit 4, 6 drafts, 64 + 128 tokens, all accepted: every layer sees 191 tokens
    (transformers' assistant_early_exit: 381 in the lower ones)."""
    model = run.model(late=0.0, early_layers=4, num_layers=12, max_positions=256)
    tower, counts = TracedTower(model, Trace(12)), counted(model)
    got = run.drafted(tower, [run.prompt(64)], EarlyExitDraft(4, 12), 6, Stop(128))
    assert (got.accepted, got.drafted) == (109, 109)
    assert len(got.steps) == 19  # 18 rounds of 7 tokens, one of 2
    assert counts == tower.trace.layer_positions == [191] * 12
    assert tower.trace.layer_calls == [1 + 109 + 19] * 4 + [1 + 19] * 8
    assert tower.trace.head_positions == 109 + 128


def test_a_prompt_longer_than_the_others_pads_only_the_prefill() -> None:
    model, draft = run.model(late=0.0), EarlyExitDraft(2, LAYERS)
    counts = counted(model)
    run.drafted(model, [run.prompt(9), run.prompt(3)], draft, 4, Stop(10))
    assert counts == [2 * (8 + 10)] * LAYERS


@dataclass
class Watched(Draft):
    """A draft whose every proposal is preceded by a look at the cache."""

    draft: Draft
    rounds: list[int] = field(default_factory=list)

    def begin(self, state: DecodeState) -> None:
        self.wants_hidden = self.draft.wants_hidden
        self.draft.begin(state)

    def open(self, state: DecodeState, k: int) -> Proposal | None:
        return self.draft.open(state, k)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        self.rounds.append(len(state.texts))
        self._check_lengths(state)
        self._check_contents(state)
        proposal = self.draft.propose(state, k)
        assert proposal.tokens.shape[1] <= k
        return proposal

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        self._check_lengths(state)
        self.draft.observe(state, outcome)

    def keep(self, rows: Sequence[int]) -> None:
        self.draft.keep(rows)

    def _check_lengths(self, state: DecodeState) -> None:
        """The cache holds all of each text but its newest token, and nothing else."""
        held, layers = tuple(len(text) - 1 for text in state.texts), state.tower.config.num_layers
        assert [state.cache.length(i) for i in range(layers)] == [held] * layers

    def _check_contents(self, state: DecodeState) -> None:
        """What follows from the cache is what follows from the text."""
        layers = state.tower.config.num_layers
        h = state.tower.run(state.tower.embed(state.newest()), 0, layers, state.cache)
        state.cache.truncate([len(text) - 1 for text in state.texts])
        for row, text in enumerate(state.texts):
            fresh = KVCache(state.tower.config, 1, len(text))
            again = state.tower.run(state.tower.embed(torch.tensor([text])), 0, layers, fresh)
            torch.testing.assert_close(h[row, -1], again[0, -1], rtol=1e-3, atol=1e-3)


@some_drafts
@pytest.mark.parametrize(
    "variant", thinned(["grouped heads", "sliding window"], keep=["sliding window"])
)
def test_after_each_round_the_cache_is_that_of_the_text(variant: str, draft: str) -> None:
    model = run.model(**toy.VARIANTS[variant])
    watched, stops = Watched(DRAFTS[draft](model)), [Stop(4), Stop(2), Stop(10)]
    got = run.drafted(model, RAGGED, watched, 3, stops)
    assert got.rows == run.plain(model, RAGGED, stops)
    assert {3, 1} <= set(watched.rounds), "rows have left on the way"


# -- what a step says --------------------------------------------------------------------------


@some_drafts
def test_steps_tell_what_was_drafted_and_accepted(draft: str) -> None:
    model, stops = run.model(), [Stop(13), Stop(2), Stop(8)]
    got = run.drafted(model, RAGGED, DRAFTS[draft](model), 4, stops)
    for step in got.steps:
        assert len(step.drafted) <= 4
        assert step.tokens[: step.accepted] == step.drafted[: step.accepted]
        assert len(step.tokens) in (step.accepted, step.accepted + 1)
        if len(step.tokens) == step.accepted:
            assert step.finish_reason == "length"
        elif step.accepted < len(step.drafted):
            assert step.tokens[-1] != step.drafted[step.accepted]
        assert (step.exit_layer is not None) == ("exit" in draft and len(step.drafted) > 0)
    for row, stop in enumerate(stops):
        mine = [s for s in got.steps if s.row == row]
        assert [s.finish_reason for s in mine] == [None] * (len(mine) - 1) + ["length"]
        assert sum(len(s.tokens) for s in mine) == stop.max_tokens


@pytest.mark.parametrize("late", thinned([0.0, 1.0], keep=[1.0]))
def test_garbage_never_takes_more_rounds_than_plain_decoding(late: float) -> None:
    model = run.model(late=late)
    for seed in range(5):
        got = run.drafted(model, RAGGED, run.GarbageDraft(seed), 5, Stop(12))
        for row in range(3):
            assert len([s for s in got.steps if s.row == row]) <= 12


# -- nothing is left behind --------------------------------------------------------------------


def steps_of(model: DecoderLM, prompt: list[int], draft: Draft, sampling: Sampling = GREEDY):
    chooser = Chooser(sampling, [prompt], [0], model.config.vocab_size, model.device)
    return speculate(model, [prompt], draft, 4, chooser, run.make_ends(1, Stop(20)))


class ConsumerError(Exception):
    pass


@pytest.mark.parametrize("ending", ["no error", "close", "throw", "error in the draft"])
def test_the_model_is_as_it_was(ending: str) -> None:
    model = run.model()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    draft = EarlyExitDraft(3, LAYERS)
    steps = steps_of(model, run.prompt(5), draft)
    next(steps)
    if ending == "no error":
        list(steps)
    elif ending == "close":
        steps.close()
    elif ending == "throw":
        with pytest.raises(ConsumerError):
            steps.throw(ConsumerError())
    else:
        draft.propose = _interrupt  # type: ignore[method-assign]
        with pytest.raises(ConsumerError):
            list(steps)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert model.config == config
    assert not model.training
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    fresh = run.plain(run.model(), [run.prompt(5)], Stop(20))
    assert run.drafted(model, [run.prompt(5)], EarlyExitDraft(3, LAYERS), 4, Stop(20)).rows == fresh


def _interrupt(state: DecodeState, k: int) -> Proposal:
    raise ConsumerError


def test_the_consumer_is_not_in_inference_mode_between_steps() -> None:
    for _ in steps_of(run.model(), run.prompt(5), EarlyExitDraft(3, LAYERS)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_a_model_that_has_generated_can_be_trained() -> None:
    model = run.model()
    run.drafted(model, [run.prompt(5)], EarlyExitDraft(3, LAYERS), 4, Stop(5))
    model.requires_grad_(True)
    ids = toy.tokens(2, 6)
    h, view = model.embed(ids), model.view(6)
    for index in range(LAYERS):
        h = model.layer(index, h, view)
    model.logits(h, LAYERS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, seed=4)])
def test_two_generations_may_take_turns_on_one_model(sampling: Sampling) -> None:
    model, prompts = run.model(), [run.prompt(5, seed=1), run.prompt(8, seed=2)]
    alone = [list(steps_of(model, p, EarlyExitDraft(3, LAYERS), sampling)) for p in prompts]
    both = [steps_of(model, p, EarlyExitDraft(3, LAYERS), sampling) for p in prompts]
    mixed: list[list] = [[], []]
    while any(pair := [next(steps, None) for steps in both]):
        for taken, step in zip(mixed, pair, strict=True):
            taken += [step] if step else []
    assert mixed == alone


def test_threads_may_share_a_model() -> None:
    model = run.model()
    prompts = [run.prompt(5 + i, seed=i) for i in range(4)]
    expected = [run.plain(model, [p], Stop(20))[0].tokens for p in prompts]
    shared, got = run.model(), [()] * 4  # a model whose tables are not yet made
    together = threading.Barrier(4, timeout=30)

    def work(index: int) -> None:
        draft = NoDraft() if index == 0 else EarlyExitDraft(index, LAYERS)
        together.wait()
        for step in steps_of(shared, prompts[index], draft):
            got[index] += step.tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
