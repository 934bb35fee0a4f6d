"""What was heard as a draft: one call if it was heard right, the plain text in any case."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest

import toy_decoding as run
from offramp.decoding.ctc_draft import CTCDraft, edit_distances, find_place
from offramp.decoding.drafts import DecodeState, Outcome
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.stopping import Stop
from offramp.errors import InputError
from offramp.nn.cache import KVCache
from offramp.results import DraftCounts
from toy_listening import MAX_TOKENS, Scene, calls, garbage, mishear, scene

SETTINGS = {"greedy": Sampling(), "sampled": Sampling(0.9, top_k=20, seed=5)}
Heard = Callable[[Scene], list[list[int]]]


@cache
def listening(num_rows: int = 8, setting: str = "greedy") -> Scene:
    return scene(num_rows, seed=2, sampling=SETTINGS[setting])


def _misheard(s: Scene, rate: float = 0.15) -> list[list[int]]:
    rng = random.Random(7)
    return [mishear(text, rng, rate) for text in s.texts]


HEARD: dict[str, Heard] = {
    "all right": lambda s: s.texts,
    "some errors": _misheard,
    "many errors": lambda s: _misheard(s, 0.5),
    "garbage": lambda s: garbage(len(s.texts), seed=1),
    "nothing": lambda s: [[] for _ in s.texts],
    "the end of text early": lambda s: [[*t[:3], s.eos_id, *t[3:]] for t in s.texts],
    "one token again and again": lambda s: [[t[0]] * 40 for t in s.texts],
    "each token twice": lambda s: [[x for x in t for _ in range(2)] for t in s.texts],
    "longer than the limit": lambda s: [[*t, *garbage(1, 3)[0]] for t in s.texts],
    "only the beginning": lambda s: [t[:4] for t in s.texts],
    "only the end": lambda s: [t[4:] for t in s.texts],
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_rows", "setting"),
    [
        pytest.param(1, "greedy", marks=pytest.mark.slow),
        (8, "greedy"),
        pytest.param(1, "sampled", marks=pytest.mark.slow),
        pytest.param(8, "sampled", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("heard", HEARD)
def test_whatever_was_heard_the_text_is_the_plain_one(
    heard: str, num_rows: int, setting: str
) -> None:
    s = listening(num_rows, setting)
    got = s.drafted(CTCDraft(HEARD[heard](s), s.eos_id))
    assert got.rows == s.written
    for row, written in enumerate(s.written):
        assert calls(got, row) <= len(written.tokens)
    kept = sum(DraftCounts.of(step).accepted for step in got.steps)
    assert kept + len(got.steps) == sum(len(row.tokens) for row in s.written)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_what_was_heard_right_is_one_call(num_rows: int) -> None:
    """Prompt, text and its end in one."""
    s = listening(num_rows)
    got = s.drafted(CTCDraft(s.texts, s.eos_id))
    assert got.rows == s.written
    assert len(got.steps) == num_rows


@pytest.mark.parametrize("k", [1, 3, 5])
def test_what_is_cut_off_is_drafted_next(k: int) -> None:
    s = listening()
    got = s.drafted(CTCDraft(s.texts, s.eos_id), num_draft_tokens=k)
    assert got.rows == s.written
    for row, written in enumerate(s.written):
        assert calls(got, row) == -(-len(written.tokens) // (k + 1))


def test_an_end_that_was_heard_too_early_is_not_believed() -> None:
    s = listening()
    got = s.drafted(CTCDraft([t[:4] for t in s.texts], s.eos_id))
    assert got.rows == s.written
    assert all(len(row.tokens) > 5 for row in got.rows)


def test_after_one_wrong_token_a_match_leads_back() -> None:
    """The call that finds the error, one that draws even, one for the rest."""
    s = scene(1, seed=1)
    (text,) = s.texts
    assert len(set(text)) == len(text) >= 6, "no chance matches"
    (stranger, *_) = set(range(61)) - set(text) - {s.eos_id}
    for at in range(len(text) - 1):
        for heard in (
            [*text[:at], stranger, *text[at + 1 :]],
            [*text[:at], *text[at + 1 :]],
            [*text[:at], stranger, *text[at:]],
        ):
            got = s.drafted(CTCDraft([heard], s.eos_id))
            assert got.rows == s.written
            assert len(got.steps) <= 3


def test_nobody_loses_by_hearing_garbage() -> None:
    for seed in range(4):
        s = listening(8, "sampled" if seed % 2 else "greedy")
        got = s.drafted(CTCDraft(garbage(8, seed), s.eos_id))
        assert got.rows == s.written
        assert all(calls(got, b) <= len(row.tokens) for b, row in enumerate(s.written))


def test_a_draft_serves_one_batch_after_another() -> None:
    s = listening()
    draft = CTCDraft(_misheard(s), s.eos_id)
    first, second = s.drafted(draft), s.drafted(draft)
    assert first.steps == second.steps


def test_a_row_that_leaves_takes_its_text_along() -> None:
    """Rows of one batch draft what they draft alone."""
    s = listening()
    heard = _misheard(s)
    together = s.drafted(CTCDraft(heard, s.eos_id))
    for b, text in enumerate(heard):
        alone = run.drafted(
            s.model, s.prompts[:1], CTCDraft([text], s.eos_id), MAX_TOKENS, s.stop,
            prefixes=[s.prefixes[b]],
        )  # fmt: skip
        tokens = [step.tokens for step in together.steps if step.row == b]
        assert tokens == [step.tokens for step in alone.steps]


def test_one_text_per_row() -> None:
    s = listening()
    with pytest.raises(InputError, match="the CTC draft has 2 texts and the batch 8 rows") as error:
        s.drafted(CTCDraft(s.texts[:2], s.eos_id))
    assert "\n" not in str(error.value)


# -- finding the place -------------------------------------------------------------------------


def follow(heard: Sequence[int], written: Sequence[int], expected: int) -> tuple[int, bool]:
    distances = list(range(len(heard) + 1))
    for token in written:
        distances = edit_distances(heard, distances, token)
    return find_place(heard, distances, written[-1], expected)


@pytest.mark.parametrize(
    ("heard", "written", "expected", "place"),
    [
        ([5, 6, 7, 8], [5, 6], 2, (2, True)),
        ([5, 6, 7, 8], [5, 9], 2, (2, False)),  # another token was heard, it seems
        ([5, 6, 7, 8], [5, 9, 7], 3, (3, True)),  # so it was
        ([5, 6, 7, 8], [5, 7], 2, (3, True)),  # a token too many was heard
        ([5, 7, 8], [5, 6], 2, (2, False)),  # as likely as that none was heard for 6
        ([5, 7, 8], [5, 6, 7], 3, (2, True)),  # none was
        ([1, 2, 9, 1, 2, 9, 1, 2], [1, 2, 9, 1, 2], 5, (5, True)),  # not the other two
        ([9, 1, 2], [1, 2], 2, (3, True)),
        ([5, 6, 7], [9], 1, (1, False)),
        ([], [5], 0, (0, False)),
    ],
)
def test_the_place_takes_the_fewest_edits(
    heard: list[int], written: list[int], expected: int, place: tuple[int, bool]
) -> None:
    assert follow(heard, written, expected) == place


def edits(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Levenshtein's distance, from its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[:-1], b[:-1]) + (a[-1] != b[-1]), edits(a[:-1], b) + 1, edits(a, b[:-1]) + 1)


def test_distances_grow_token_by_token_to_what_they_are_by_definition() -> None:
    rng = random.Random(0)
    for _ in range(60):
        heard = [rng.randrange(3) for _ in range(rng.randrange(6))]
        written: list[int] = []
        distances = list(range(len(heard) + 1))
        for _ in range(rng.randrange(1, 5)):
            written.append(rng.randrange(3))
            distances = edit_distances(heard, distances, written[-1])
            whole = [edits(tuple(written), tuple(heard[:i])) for i in range(len(heard) + 1)]
            assert distances == whole
            expected = rng.randint(0, len(heard))
            place, found = find_place(heard, distances, written[-1], expected)
            assert whole[place] == min(whole)
            assert found == (place > 0 and heard[place - 1] == written[-1])
            for i, distance in enumerate(whole):
                if distance == min(whole) and i > 0 and heard[i - 1] == written[-1]:
                    assert found and abs(place - expected) <= abs(i - expected)


def rest_of(heard: list[int], written: list[int]) -> tuple[list[int], list[int]]:
    """After that text and a prompt of one token, 1: (what is proposed, what goes on after 7)."""
    model = run.model()
    chooser = Chooser(Sampling(), [[1]], [0], 61, model.device)
    state = DecodeState(model, KVCache(model.config, 1, 8), [[1]], chooser)
    draft = CTCDraft([heard], eos_id=0)
    draft.begin(state)
    for token in written:
        state.texts[0].append(token)
        draft.observe(state, Outcome([0], [0], beyond=[[]]))
    more = draft.extend(state, 0, [7])
    assert draft.extend(state, 0, [7]) == more, "to be asked is not to follow"
    return draft.propose(state, 9).tokens[0].tolist(), more


def corrected(heard: list[int], written: list[int], chosen: list[int]) -> list[int]:
    """What is proposed once a call that read all of `heard` wrote `written`, and chose `chosen`
    behind it."""
    model = run.model()
    chooser = Chooser(Sampling(), [[1]], [0], 61, model.device)
    state = DecodeState(model, KVCache(model.config, 1, 8), [[1]], chooser)
    draft = CTCDraft([heard], eos_id=0)
    draft.begin(state)
    assert draft.open(state, 20).tokens[0].tolist() == [*heard, 0]
    state.texts[0] += written
    draft.observe(state, Outcome([len(heard) + 1], [len(written) - 1], beyond=[chosen]))
    return draft.extend(state, 0, [])


@pytest.mark.parametrize(
    ("heard", "written", "chosen", "rest"),
    [
        # 9 for 5, and once three tokens are said as heard, 8 for 4
        ([5, 1, 2, 3, 4, 6], [9], [1, 2, 3, 8, 6, 0], [1, 2, 3, 8, 6, 0]),
        ([5, 1, 2, 3, 4, 6], [9], [1, 2, 7, 8, 6, 0], [1, 2, 3, 4, 6, 0]),  # not back yet
        ([5, 1, 2, 3, 4, 6], [9], [1, 2, 3, 8, 0, 0], [1, 2, 3, 8, 6, 0]),  # no end before its time
        ([5, 1, 2, 3], [9], [1, 2, 3, 8], [1, 2, 3, 8, 0]),  # nor where more is to come
        ([5, 1, 2, 3, 4, 6], [9], [1], [1, 2, 3, 4, 6, 0]),  # a draft that was cut
        ([5, 1, 2], [5, 1, 2, 0], [], [0]),
    ],
)
def test_a_call_that_finds_an_error_corrects_those_behind_it(
    heard: list[int], written: list[int], chosen: list[int], rest: list[int]
) -> None:
    assert corrected(heard, written, chosen) == rest


def test_what_goes_on_is_what_was_heard_from_the_place_on() -> None:
    assert rest_of([5, 6, 7, 8], [5]) == ([6, 7, 8, 0], [8, 0])
    assert rest_of([5, 6, 7, 8], [5, 9]) == ([], [8, 0])
    assert rest_of([5, 6, 7, 8], [5, 6, 7, 8]) == ([0], [0])
    assert rest_of([], []) == ([0], [0])


def test_of_two_places_the_one_that_the_text_has_just_come_to_counts() -> None:
    assert rest_of([5, 6, 6, 9], [5, 5, 6])[0] == [6, 9, 0]


def test_a_prompt_was_not_heard() -> None:
    """With it, "1 5" would stand at the end of what was heard."""
    assert rest_of([5, 1, 5, 9], [5])[0] == [1, 5, 9, 0]


def test_text_only_prompts_may_have_something_heard_too() -> None:
    model = run.model().double()
    prompts = [run.prompt(9, seed=1), run.prompt(1, seed=2)]
    expected = run.plain(model, prompts, Stop(10))
    draft = CTCDraft([row.tokens for row in expected], eos_id=0)
    got = run.drafted(model, prompts, draft, 20, Stop(10))
    assert got.rows == expected
    assert len(got.steps) == 2
