"""Endpoints: three rules, the same in chunks of any size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from offramp.decoding.endpoint import EndpointOptions, Utterance, read_utterances
from offramp.decoding.transducer import TransducerOptions, TransducerSearch
from offramp.decoding.transducer_state import SearchState
from offramp.errors import ConfigError
from toy_search import BLANK, TableJoiner, ToyJoiner, ToyPredictor, V, encoded

FRAME_S = 0.04
OPTIONS = EndpointOptions(silence_s=0.4, trailing_silence_s=0.2, max_utterance_s=1.2)


def speech(pattern: str) -> Tensor:
    """Log probabilities [T, V]: digits are tokens, "." is blank, all of them certain."""
    ids = [BLANK if c == "." else int(c) for c in pattern]
    grid = torch.full((len(ids), V), 1e-6)
    grid[range(len(ids)), ids] = 1.0
    return grid.log()


def run(
    pattern: str, options: EndpointOptions = OPTIONS, chunks: tuple[int, ...] = (1000,)
) -> tuple[SearchState, list[Utterance]]:
    return listen(
        TransducerSearch(ToyPredictor(), TableJoiner(), BLANK), speech(pattern), options, chunks
    )


def listen(
    search: TransducerSearch, grid: Tensor, options: EndpointOptions, chunks: tuple[int, ...]
) -> tuple[SearchState, list[Utterance]]:
    state, found, at = search.start(), [], 0
    for size in itertools.cycle(chunks):
        if at >= len(grid):
            return state, found
        state, more = read_utterances(search, state, grid[at : at + size], FRAME_S, options)
        found, at = found + more, at + size
    raise AssertionError


def summary(utterances: list[Utterance]) -> list[tuple[str, int, int, str]]:
    texts = ["".join(map(str, u.hypotheses[0].tokens)) for u in utterances]
    return [
        (text, u.first_frame, u.end_frame, u.rule)
        for text, u in zip(texts, utterances, strict=True)
    ]


def test_silence_ends_an_utterance_sooner_where_something_was_said() -> None:
    """0.2 s are 5 frames, 0.4 s are 10."""
    state, found = run("." * 10 + "..13...." + "4....." + "..3")
    assert summary(found) == [("", 0, 10, "silence"), ("134", 10, 24, "trailing_silence")]
    assert found[1].hypotheses[0].frames == (12, 13, 18)
    assert state.hypotheses[0].tokens == (3,)
    assert (state.first_frame, state.utterance_frames, state.silent_frames) == (24, 3, 0)


def test_one_frame_less_of_silence_ends_nothing() -> None:
    assert run("." * 9 + "1" + "." * 4 + "3")[1] == []
    assert summary(run("1" + "." * 5)[1]) == [("1", 0, 6, "trailing_silence")]


def test_a_long_utterance_ends_in_the_midst_of_speech() -> None:
    """1.2 s are 30 frames, although 30 * 0.04 is a little more than 1.2 or less."""
    state, found = run("1" * 70)
    assert summary(found) == [("1" * 30, 0, 30, "length"), ("1" * 30, 30, 60, "length")]
    assert state.hypotheses[0].tokens == (1,) * 10


@pytest.mark.parametrize(
    ("off", "pattern", "want"),
    [
        ("silence_s", "." * 25, []),
        ("trailing_silence_s", "1" + "." * 25, [("1", 0, 11, "silence"), ("", 11, 21, "silence")]),
        ("max_utterance_s", "1" * 100, []),
    ],
)
def test_each_rule_can_be_switched_off(
    off: str, pattern: str, want: list[tuple[str, int, int, str]]
) -> None:
    settings = {"silence_s": 0.4, "trailing_silence_s": 0.2, "max_utterance_s": 1.2, off: None}
    assert summary(run(pattern, EndpointOptions(**settings))[1]) == want
    assert summary(run(pattern)[1]) != want


@pytest.mark.parametrize("chunks", [(1,), (4,), (3, 11, 2), (25,)])
def test_endpoints_do_not_depend_on_chunks(chunks: tuple[int, ...]) -> None:
    """A chunk may hold the end of one utterance and the whole of the next."""
    pattern = "..13......4..3.......1" + "." * 30 + "3" * 33 + "......1"
    (state, found), (whole_state, whole) = run(pattern, chunks=chunks), run(pattern)
    assert found == whole
    assert {u.rule for u in whole} == {"silence", "trailing_silence", "length"}
    assert state.hypotheses[0].tokens == whole_state.hypotheses[0].tokens
    assert state.counts == whole_state.counts


def test_a_beam_ends_where_its_best_text_does() -> None:
    options = TransducerOptions(beam_size=4, n_best=3)
    search = TransducerSearch(ToyPredictor(), ToyJoiner(blank_bias=1.5), BLANK, options)
    rules = EndpointOptions(0.4, 0.08, 1.2)
    _, whole = listen(search, encoded(80), rules, (80,))
    _, found = listen(search, encoded(80), rules, (7,))
    assert found == whole
    assert len(whole) > 3
    for u in whole:
        assert len(u.hypotheses) == 3
        frames = u.hypotheses[0].frames
        silence = u.end_frame - (frames[-1] + 1 if frames else u.first_frame)
        # More than least where the text with the later token has just lost its lead.
        assert silence >= {"trailing_silence": 2, "silence": 10, "length": 0}[u.rule]


def test_frames_that_ctc_calls_blank_are_silence() -> None:
    options = TransducerOptions(ctc_blank_skip=0.9)
    search = TransducerSearch(ToyPredictor(), TableJoiner(), BLANK, options)
    blank = torch.tensor([1e-3, *[0.99] * 5, 1e-3]).log()
    state, found = read_utterances(
        search, search.start(), speech("1.....3"), FRAME_S, OPTIONS, blank
    )
    assert summary(found) == [("1", 0, 6, "trailing_silence")]
    assert state.hypotheses[0].tokens == (3,)
    assert state.counts.joiner_calls == 2


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_refused(seconds: float) -> None:
    for name in ("silence_s", "trailing_silence_s", "max_utterance_s"):
        with pytest.raises(ConfigError, match=f"{name} is {seconds}"):
            EndpointOptions(**{name: seconds})
    search = TransducerSearch(ToyPredictor(), TableJoiner(), BLANK)
    with pytest.raises(ConfigError, match="frame_s is"):
        read_utterances(search, search.start(), speech("1"), seconds, OPTIONS)
