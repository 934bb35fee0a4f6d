"""The guard flags what the audio does not hold, lets pass what it holds, and stops as one token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import toy_decoding
from offramp.decoding.autoregressive import autoregress
from offramp.decoding.guard import Flag, Guard, GuardedEnd, GuardOptions, joined, repeats
from offramp.decoding.sampling import Chooser
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import Stop
from offramp.errors import ConfigError
from thinned import thinned
from toy_beam import spoken

BLANK = 9
SAID = {3: 4, 7: 5, 8: 5, 12: 4, 15: 6}


def flagged(tokens: list[int], options: GuardOptions | None = None) -> list[Flag]:
    guard = Guard(spoken(20, SAID), BLANK, options or GuardOptions())
    raised = [guard.push(token) for token in tokens]
    assert {flag.start for flag in raised if flag} == {flag.start for flag in guard.flags}
    return guard.flags


def test_what_was_said_raises_no_flag_nor_does_a_word_made_up_now_and_then() -> None:
    assert flagged([4, 5, 4, 6]) == []
    assert flagged([4, 1, 1, 5, 2, 4, 6, 3]) == []
    assert flagged([4, 4, 4, 5, 4, 6]) == []


def test_a_long_run_that_nothing_supports_is_one_flag() -> None:
    options = GuardOptions(max_unheard=3)
    assert flagged([4, 1, 2, 1, 5], options) == []
    assert flagged([4, 1, 2, 1, 3, 5, 4, 6], options) == [Flag("unheard", 1, 5)]
    assert flagged([4, 1, 2, 1, 3, 2, 1, 5, 4, 6], options) == [Flag("unheard", 1, 7)]
    twice = [4, 1, 2, 1, 3, 5, 4, 6, 1, 2, 7, 8]
    assert flagged(twice, options) == [Flag("unheard", 1, 5), Flag("unheard", 8, 12)]


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        ([6, 6], Flag("repetition", 3, 6)),
        ([4, 6, 4, 6], Flag("repetition", 2, 8)),
        ([5, 4, 6, 5, 4, 6], Flag("repetition", 1, 10)),
        ([6], None),
        ([4, 6], None),
        ([1, 2, 3], None),
    ],
)
def test_a_repetition_is_flagged_once_nothing_is_left_to_hear(
    more: list[int], flag: Flag | None
) -> None:
    assert flagged([4, 5, 4, 6, *more]) == ([flag] if flag else [])


def test_a_repetition_that_goes_on_is_one_flag() -> None:
    assert flagged([4, 5, 4, 6, *[6] * 20]) == [Flag("repetition", 3, 24)]


def test_a_repetition_that_was_said_is_none() -> None:
    guard = Guard(spoken(40, {t: 4 for t in range(2, 40, 3)}), BLANK)
    assert [guard.push(4) for _ in range(13)] == [None] * 13
    assert [guard.push(4), guard.push(4)] == [
        Flag("repetition", 11, 14),
        Flag("repetition", 11, 15),
    ]


def test_a_repetition_while_there_is_more_to_hear_is_left_to_the_other_rule() -> None:
    assert flagged([4, 4, 4, 4, 4]) == []
    assert flagged([4, *[1] * 9]) == [Flag("unheard", 1, 10)]


def test_while_the_last_word_is_still_to_be_heard_nothing_is_exhausted() -> None:
    """Even if it starts in the very next frame."""
    said = {3: 4, 5: 6}
    for text, want in (([4, 1, 1, 1], []), ([4, 6, 1, 1, 1], [Flag("repetition", 2, 5)])):
        guard = Guard(spoken(20, said), BLANK)
        for token in text:
            guard.push(token)
        assert guard.flags == want


def test_silence_holds_nothing() -> None:
    guard = Guard(spoken(10, {}), BLANK)
    flags = [guard.push(token) for token in (1, 1, 1)]
    assert flags == [None, None, Flag("repetition", 0, 3)]
    assert Guard(torch.zeros(0, 10), BLANK).push(1) is None


@pytest.mark.parametrize(
    ("tokens", "period", "want"),
    [
        ([1, 1, 1], 1, True),
        ([1, 2, 1], 1, False),
        ([1, 2, 1, 2], 2, True),
        ([1, 2, 2, 1], 2, False),
    ],
)
def test_repeats(tokens: list[int], period: int, want: bool) -> None:
    assert repeats(tokens, period) is want


@pytest.mark.parametrize(("name", "least"), [("max_unheard", 1), ("repeats", 2)])
def test_impossible_options_are_refused(name: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {least - 1}; .* at least {least}"):
        GuardOptions(**{name: least - 1})


@pytest.mark.parametrize("odds", [0.0, -1.0, 1.0, 5.0, math.nan, math.inf, "0.1", True])
def test_odds_that_are_none_are_refused_before_any_work(odds: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"min_odds is .* a number (greater than 0|.* less than 1)"
    ):
        GuardOptions(min_odds=odds)


# -- in the loop --------------------------------------------------------------------------------


def ends_for(texts: list[tuple[int, ...]], limit: int, stops: bool) -> list[GuardedEnd]:
    """One per row: the first half of what the row would write is said, and nothing else."""
    ends = []
    for text in texts:
        said = {4 * i + 2: token for i, token in enumerate(text[: limit // 2])}
        guard = Guard(spoken(120, said, 62), 61, GuardOptions(max_unheard=3))
        ends.append(GuardedEnd(Stop(limit), None, guard, stops))
    return ends


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize(
    "name", thinned(["none", "exit", "garbage", "the same model"], keep=("exit", "garbage"))
)
def test_a_guarded_text_is_the_same_for_every_draft(name: str, stops: bool) -> None:
    model, limit = toy_decoding.model(seed=1), 20
    prompts = [toy_decoding.prompt(n, seed=n) for n in (2, 5, 3)]
    whole = [row.tokens for row in toy_decoding.plain(model, prompts, Stop(limit))]
    ends = ends_for(whole, limit, stops)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        chooser = Chooser(toy_decoding.GREEDY, [prompt], [row], 61, model.device)
        steps = list(autoregress(model, prompt, chooser, end))
        text = tuple(t for step in steps for t in step.tokens)
        assert text == whole[row][: len(text)]
        assert end.guard.flags
        if stops:
            assert (len(text) < limit, end.reason) == (True, "stop")
            assert end.guard.flags[-1].stop == len(text)
        else:
            assert text == whole[row]
    flags = [end.guard.flags for end in ends]
    again = ends_for(whole, limit, stops)
    chooser = Chooser(toy_decoding.GREEDY, prompts, range(3), 61, model.device)
    list(speculate(model, prompts, toy_decoding.DRAFTS[name](model), 4, chooser, again))
    assert [end.guard.flags for end in again] == flags
    assert [end.reason for end in again] == [end.reason for end in ends]


def test_text_that_was_held_back_comes_out_when_the_guard_stops() -> None:
    class Letters:
        """A text stream of letters."""

        def push(self, token: int) -> str:
            return "abcdefghij"[token]

        def flush(self) -> str:
            return "."

    guard = Guard(spoken(20, SAID), BLANK, GuardOptions(max_unheard=1))
    stop = Stop(20, strings=("cb!",))
    end = GuardedEnd(stop, Letters(), guard)  # type: ignore[arg-type]
    assert end.push([4, 2, 1, 4, 4]) == (3, "ecb.")
    assert end.reason == "stop"


def test_flags_that_touch_are_one_flag() -> None:
    def spans(*flags: tuple[int, int]) -> list[tuple[int, int]]:
        made = joined([Flag("unheard", *flag) for flag in flags])
        return [(flag.start, flag.stop) for flag in made]

    assert spans((13, 18), (13, 22), (31, 36)) == [(13, 22), (31, 36)]
    assert spans((3, 5), (8, 9), (4, 12), (12, 13), (15, 16)) == [(3, 13), (15, 16)]
    assert spans() == []
    assert joined([Flag("unheard", 1, 3), Flag("repetition", 2, 4)]) == [Flag("unheard", 1, 4)]


def test_a_text_that_is_cut_where_it_is_flagged_was_cut() -> None:
    guard = Guard(spoken(20, SAID), BLANK, GuardOptions(max_unheard=1))
    end = GuardedEnd(Stop(3), None, guard)
    assert end.push([4, 1, 2, 1]) == (3, "")
    assert guard.flags == [Flag("unheard", 1, 3)]
    assert end.reason == "length"


def test_the_token_that_ends_a_text_is_no_word() -> None:
    guard = Guard(spoken(20, SAID), BLANK, GuardOptions(max_unheard=1))
    end = GuardedEnd(Stop(20, frozenset({BLANK})), None, guard)
    assert end.push([4, 5, BLANK, 4]) == (3, "")
    assert guard.flags == []
