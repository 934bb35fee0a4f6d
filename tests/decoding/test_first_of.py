"""Several drafts as one: who proposes, what each is told, and that two do better than one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest

import toy_decoding as run
from offramp.decoding.ctc_draft import CTCDraft
from offramp.decoding.drafts import (
    DecodeState,
    Draft,
    EarlyExitDraft,
    NGramDraft,
    NoDraft,
    Outcome,
    Proposal,
)
from offramp.decoding.first_of import FirstOf
from offramp.decoding.heads_draft import HeadsDraft
from offramp.decoding.sampling import Sampling
from offramp.decoding.stopping import Stop
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.nn.tower import TracedTower
from thinned import thinned
from toy_decoding import LAYERS
from toy_listening import KnowingHeads, Scene, calls, garbage, mishear, scene

SETTINGS = {"greedy": Sampling(), "sampled": Sampling(0.9, top_k=20, seed=5)}


@cache
def listening(num_rows: int = 8, setting: str = "greedy") -> Scene:
    return scene(num_rows, seed=8, sampling=SETTINGS[setting])


def heard(s: Scene, rate: float = 0.2, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [mishear(text, rng, rate) for text in s.texts]


def both(s: Scene, rate: float = 0.2, error_rate: float = 0.1) -> FirstOf:
    heads = HeadsDraft(KnowingHeads(s, 4, error_rate))
    return FirstOf({"ctc": CTCDraft(heard(s, rate), s.eos_id), "mtp": heads})


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("num_rows", thinned([1, 8], keep=[8]))
@pytest.mark.parametrize(
    ("rate", "error_rate"),
    [(0.0, 0.0), (0.2, 0.1), pytest.param(0.5, 0.5, marks=pytest.mark.slow), (0.9, 1.0)],
)
def test_what_was_heard_and_heads_write_the_plain_text(
    rate: float, error_rate: float, num_rows: int, setting: str
) -> None:
    s = listening(num_rows, setting)
    tower = TracedTower(s.model, Trace(LAYERS))
    draft = both(s, rate, error_rate)
    got = run.drafted(tower, s.prompts, draft, 16, s.stop, s.sampling, prefixes=s.prefixes)
    assert got.rows == s.written
    rounds = max(calls(got, row) for row in range(num_rows))
    assert tower.trace.layer_calls == [rounds] * LAYERS, "one call per round, prompt included"
    assert all(calls(got, b) <= len(row.tokens) for b, row in enumerate(s.written))
    assert rate > 0 or rounds == 1


def test_two_drafts_need_fewer_calls_than_either() -> None:
    s = listening()
    alone = {
        "ctc": s.drafted(CTCDraft(heard(s), s.eos_id)),
        "mtp": s.drafted(HeadsDraft(KnowingHeads(s, 4, 0.1))),
        "none": s.drafted(run.NoDraft()),
    }
    together = s.drafted(both(s))
    counts = {name: len(got.steps) for name, got in alone.items()}
    assert len(together.steps) < counts["ctc"] < counts["none"]
    assert len(together.steps) < counts["mtp"] < counts["none"]


def test_each_step_names_its_source() -> None:
    s = listening()
    got = s.drafted(both(s))
    accepted = Counter[str | None]()
    for step in got.steps:
        accepted[step.source] += step.accepted
        assert (step.source is None) == (step.drafted == ())
    assert set(accepted) - {None} == {"ctc", "mtp+ctc"}
    assert min(accepted["ctc"], accepted["mtp+ctc"]) > 0
    assert accepted.total() == got.accepted
    for row in range(8):
        first, *_ = [step for step in got.steps if step.row == row]
        assert first.source == "ctc"
    alone = s.drafted(CTCDraft(heard(s), s.eos_id))
    assert {step.source for step in alone.steps} == {None}, "one draft needs no name"


def test_an_error_is_bridged_in_one_call() -> None:
    """One call finds it; heads say what comes next, and what was heard all the rest. Without
    heads, what was heard is taken to have one wrong token. Seldom a decoder of random weights is
    led astray by the error, and corrects what was right: a call or two more."""
    s, steps = listening(1), []
    (text,) = s.texts
    (stranger, *_) = set(range(61)) - set(text) - {s.eos_id}
    for at in range(len(text) - 10, len(text)):  # the rest fits a draft
        replaced = [*text[:at], stranger, *text[at + 1 :]]
        got = s.drafted(FirstOf({"ctc": CTCDraft([replaced], s.eos_id)}))
        assert got.rows == s.written
        steps.append(len(got.steps))
        for wrong in (replaced, [*text[:at], *text[at + 1 :]], [*text[:at], stranger, *text[at:]]):
            ctc, heads = CTCDraft([wrong], s.eos_id), HeadsDraft(KnowingHeads(s, 4))
            got = s.drafted(FirstOf({"ctc": ctc, "mtp": heads}))
            assert got.rows == s.written
            steps.append(len(got.steps))
    assert min(steps) == 2 and max(steps) <= 4, steps
    assert steps.count(2) > 0.75 * len(steps), steps


def test_garbage_from_both_costs_no_call() -> None:
    s = listening()
    draft = FirstOf({
        "ctc": CTCDraft(garbage(8, 1), s.eos_id), "noise": run.GarbageDraft(2),
    })  # fmt: skip
    got = s.drafted(draft)
    assert got.rows == s.written
    assert all(calls(got, b) <= len(row.tokens) for b, row in enumerate(s.written))


class Scripted(Draft):
    """Proposes the rows it is given, round by round, and keeps what it is asked and told."""

    def __init__(self, rounds: list[list[list[int]]], opens: bool = False) -> None:
        self._rounds, self._opens = list(rounds), opens
        self.asked: list[int] = []  # in which rounds
        self.told: list[tuple[list[int], list[int]]] = []

    def open(self, state: DecodeState, k: int) -> Proposal | None:
        return self.propose(state, k) if self._opens else None

    def propose(self, state: DecodeState, k: int) -> Proposal:
        self.asked.append(len(self.told))
        rows = self._rounds.pop(0) if self._rounds else [[] for _ in state.texts]
        return Proposal.ragged(state, [row[:k] for row in rows])

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        self.told.append((list(outcome.drafted), list(outcome.accepted)))


def test_each_row_takes_the_first_that_has_something() -> None:
    s = listening(2)
    one, two = (list(row.tokens) for row in s.written)
    assert min(len(one), len(two)) > 4
    first = Scripted([[one[:2], []], [[], []], [[60], [60]]])
    second = Scripted([[[7, 7, 7], two[:3]], [[7], []]])
    draft = FirstOf({"first": first, "second": second})
    got = run.drafted(s.model, s.prompts, draft, 4, Stop(9), prefixes=s.prefixes)
    assert second.asked[:3] == [0, 1, 3], "in round 2 the first had something for every row"
    names = [(step.source, len(step.drafted)) for step in got.steps[:6]]
    assert names == [
        ("first", 2),
        ("second", 3),
        ("second", 1),
        (None, 0),
        ("first", 1),
        ("first", 1),
    ]
    assert first.told[:3] == [([2, 0], [2, 0]), ([0, 0], [0, 0]), ([1, 1], [0, 0])]
    assert second.told[:3] == [([0, 3], [0, 3]), ([1, 0], [0, 0]), ([0, 0], [0, 0])]


def test_one_that_opens_is_enough() -> None:
    """The prompt is read together with what it has; who does not open comes later."""
    s = listening(1)
    text = list(s.written[0].tokens)
    opener, other = Scripted([[text[:2]], [[]]], opens=True), Scripted([[text[3:5]]])
    tower = TracedTower(s.model, Trace(LAYERS))
    draft = FirstOf({"other": other, "opener": opener})
    got = run.drafted(tower, s.prompts, draft, 4, Stop(6), prefixes=s.prefixes)
    assert [step.source for step in got.steps] == ["opener", "other"]
    assert tower.trace.layer_calls == [2] * LAYERS
    nobody = FirstOf({"n-gram": NGramDraft(), "garbage": run.GarbageDraft()})
    tower = TracedTower(s.model, Trace(LAYERS))
    got = run.drafted(tower, s.prompts, nobody, 4, Stop(6), prefixes=s.prefixes)
    assert tower.trace.layer_calls == [1 + len(got.steps)] * LAYERS


class Fluent(NoDraft):
    """Has nothing to begin with, and goes on with 9, 8, 7 after whatever is said."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[list[int], list[int]]] = []

    def extend(self, state: DecodeState, row: int, tokens: Sequence[int]) -> list[int]:
        return [9, 8, 7]

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        self.outcomes.append((list(outcome.drafted), list(outcome.accepted)))


def test_those_before_go_on_where_another_ends() -> None:
    """And each is told of its own tokens, though all of them are verified as one draft."""
    s = listening(2)
    one, _ = (list(row.tokens) for row in s.written)
    first, second, third = Fluent(), Scripted([[one[1:4], []]]), Fluent()
    draft = FirstOf({"first": first, "second": second, "third": third})
    got = run.drafted(s.model, s.prompts, Late(draft), 5, Stop(9), prefixes=s.prefixes)
    made = [(step.source, step.drafted) for step in got.steps[2:4]]
    assert made == [("second+first", (*one[1:4], 9, 8)), ("first", (9, 8, 7))]
    assert second.told[1] == ([3, 0], [3, 0])
    assert first.outcomes[1] == third.outcomes[1] == ([0, 0], [0, 0])


class Late(NoDraft):
    """The same, from the second token on."""

    def __init__(self, draft: Draft) -> None:
        self._draft, self._round = draft, 0

    def begin(self, state: DecodeState) -> None:
        self._draft.begin(state)

    def propose(self, state: DecodeState, k: int) -> Proposal:
        self._round += 1
        return Proposal.empty(state) if self._round == 1 else self._draft.propose(state, k)

    def observe(self, state: DecodeState, outcome: Outcome) -> None:
        self._draft.observe(state, outcome)

    def keep(self, rows: Sequence[int]) -> None:
        self._draft.keep(rows)


@pytest.mark.parametrize("order", [("n-gram", "exit"), ("exit", "n-gram")])
def test_a_draft_that_runs_the_tower_stands_alone(order: Sequence[str]) -> None:
    s = listening(1)
    drafts: dict[str, Draft] = {"n-gram": NGramDraft(), "exit": EarlyExitDraft(2, LAYERS)}
    with pytest.raises(InputError, match="'exit' runs the tower's own layers") as error:
        s.drafted(FirstOf({name: drafts[name] for name in order}))
    assert "\n" not in str(error.value)


def test_no_drafts_are_refused() -> None:
    with pytest.raises(InputError, match="no draft to choose from"):
        FirstOf({})
