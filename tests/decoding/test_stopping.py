"""Rows end exactly where they should, and give out no text that might yet be cut."""

from __future__ import annotations

import random

import pytest

from offramp.decoding.stopping import RowEnd, Stop
from offramp.errors import InputError
from offramp.results import FinishReason
from offramp.tokenizer import EOS, TextStream, TextTokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(["the sun rises in the east and sets in the west"], 290, ["<END>"])


def row_of(stop: Stop, tokenizer: TextTokenizer | None) -> RowEnd:
    return RowEnd(stop, None if tokenizer is None else TextStream(tokenizer))


def one_by_one(end: RowEnd, tokens: list[int]) -> tuple[int, list[str]]:
    """(tokens taken, the text after each)."""
    pieces = []
    for token in tokens:
        taken, piece = end.push([token])
        if not taken:
            assert piece == ""
            break
        pieces.append(piece)
    return len(pieces), pieces


# -- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "taken", "reason"),
    [
        (Stop(9), 5, None),
        (Stop(6), 5, None),
        (Stop(5), 5, "length"),
        (Stop(1), 1, "length"),
        (Stop(9, frozenset({3})), 3, "stop"),  # the token that ends is taken
        (Stop(9, frozenset({5, 2, 77})), 2, "stop"),
        (Stop(3, frozenset({3})), 3, "stop"),  # both at once: it has ended by itself
        (Stop(2, frozenset({3})), 2, "length"),
    ],
)
def test_a_row_takes_tokens_until_its_end(
    stop: Stop, taken: int, reason: FinishReason | None
) -> None:
    end = row_of(stop, None)
    assert end.push([1, 2, 3, 4, 5]) == (taken, "")
    assert end.reason == reason
    assert end.remaining == stop.max_tokens - taken
    if reason is not None:
        assert end.push([6]) == (0, "")
        assert end.remaining == stop.max_tokens - taken


def test_a_token_that_ends_is_not_in_the_text(tokenizer: TextTokenizer) -> None:
    eos = tokenizer.token_id(EOS)
    whole = tokenizer.token_id("<END>")
    assert eos is not None and whole is not None
    words = tokenizer.encode("the sun", special=False)
    for end_id in (eos, whole):
        end = row_of(Stop(99, frozenset({end_id})), tokenizer)
        assert end.push([*words, end_id, *words]) == (len(words) + 1, "the sun")
        assert end.reason == "stop"


# -- strings -----------------------------------------------------------------------------------


def expected_end(tokenizer: TextTokenizer, tokens: list[int], stop: Stop) -> tuple[int, str]:
    """(tokens, text) by decoding ever longer beginnings and looking for every string in each."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n])
        found = [text.find(s) for s in stop.strings if s in text]
        if found:
            return n, text[: min(found)]
        if n == stop.max_tokens:
            return n, text
    return len(tokens), text


STRINGS = [
    ("rises",),
    ("s in",),  # over several tokens, across a word
    (" in the west",),
    ("e",),
    ("east", "as", "t a"),  # one within another; the earliest counts
    ("the", "he s"),
    ("sunset", "sun rose"),  # never comes, and holds back what might begin it
    ("tt", "ss", "ee"),
]


@pytest.mark.parametrize("max_tokens", [4, 11, 99])
@pytest.mark.parametrize("strings", STRINGS)
def test_text_ends_before_a_stop_string(
    tokenizer: TextTokenizer, strings: tuple[str, ...], max_tokens: int
) -> None:
    stop = Stop(max_tokens, strings=strings)
    tokens = tokenizer.encode("the sun rises in the east and sets in the west", special=False)
    letters = [t for c in tokenizer.decode(tokens) for t in tokenizer.encode(c, special=False)]
    for ids in (tokens, letters):
        taken, text = expected_end(tokenizer, ids, stop)
        found = any(s in tokenizer.decode(ids[:taken]) for s in strings)
        end = row_of(stop, tokenizer)
        count, pieces = one_by_one(end, ids)
        assert count == taken
        assert end.reason == ("stop" if found else "length" if taken == max_tokens else None)
        if end.reason is not None:
            assert "".join(pieces) == text
        else:
            assert text.startswith("".join(pieces))
        together = row_of(stop, tokenizer)
        assert together.push(ids) == (taken, "".join(pieces))
        assert together.reason == end.reason


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_end_where_decoding_all_of_them_says(
    tokenizer: TextTokenizer, seed: int
) -> None:
    """Letters a and b only, so that stop strings begin again and again without being completed."""
    draw = random.Random(seed)
    a, b = (tokenizer.encode(c, special=False)[0] for c in "ab")
    for _ in range(100):
        lengths = [draw.randrange(1, 6) for _ in range(draw.randrange(1, 4))]
        strings = tuple("".join(draw.choice("ab") for _ in range(n)) for n in lengths)
        ids = [draw.choice((a, b)) for _ in range(draw.randrange(1, 25))]
        stop = Stop(draw.randrange(1, 25), strings=strings)
        taken, text = expected_end(tokenizer, ids, stop)
        end = row_of(stop, tokenizer)
        given = end.push(ids)
        assert given[0] == taken
        assert given[1] == text if end.reason else text.startswith(given[1])


def test_only_the_possible_start_of_a_stop_string_is_held_back(tokenizer: TextTokenizer) -> None:
    end = row_of(Stop(99, strings=("abc", "xy")), tokenizer)
    letters = [tokenizer.encode(c, special=False)[0] for c in "aababxabc"]
    assert one_by_one(end, letters)[1] == ["", "a", "", "ab", "", "ab", "x", "", ""]
    assert end.reason == "stop"


def test_what_was_held_back_comes_with_the_last_token(tokenizer: TextTokenizer) -> None:
    eos = tokenizer.token_id(EOS)
    assert eos is not None
    letters = [tokenizer.encode(c, special=False)[0] for c in "xab"]
    end = row_of(Stop(3, strings=("abc",)), tokenizer)
    assert one_by_one(end, letters)[1] == ["x", "", "ab"]
    end = row_of(Stop(9, frozenset({eos}), ("abc",)), tokenizer)
    assert one_by_one(end, [*letters, eos])[1] == ["x", "", "", "ab"]


# -- characters of several tokens --------------------------------------------------------------


def test_a_character_is_held_back_until_it_is_whole(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode("é東", special=False)
    assert len(tokens) == 5
    assert one_by_one(row_of(Stop(9), tokenizer), tokens)[1] == ["", "é", "", "", "東"]
    # Cut in the middle, it is what decoding the tokens makes of it.
    for n in range(1, 6):
        end = row_of(Stop(n), tokenizer)
        assert "".join(one_by_one(end, tokens)[1]) == tokenizer.decode(tokens[:n])
        assert end.reason == "length"


@pytest.mark.parametrize("string", ["東", "é東", "é"])
def test_a_stop_string_may_be_such_a_character(tokenizer: TextTokenizer, string: str) -> None:
    tokens = tokenizer.encode("the é東 sun", special=False)
    taken, text = expected_end(tokenizer, tokens, Stop(99, strings=(string,)))
    end = row_of(Stop(99, strings=(string,)), tokenizer)
    assert end.push(tokens) == (taken, text)
    assert text == "the é東"[: "the é東".index(string)]
    assert end.reason == "stop"


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_row_has_room_for_a_token(max_tokens: int) -> None:
    with pytest.raises(InputError, match=f"max_tokens is {max_tokens}; .* at least 1") as error:
        Stop(max_tokens)
    assert "\n" not in str(error.value)


def test_a_stop_string_has_a_letter() -> None:
    with pytest.raises(InputError, match="a stop string is empty") as error:
        Stop(5, strings=("a", ""))
    assert "\n" not in str(error.value)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InputError, match="stop strings need a tokenizer") as error:
        RowEnd(Stop(5, strings=("a",)), None)
    assert "\n" not in str(error.value)
