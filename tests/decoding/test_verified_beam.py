"""The verified beam finds what the plain beam finds, whatever is drafted, in no more calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from offramp.decoding import verified_beam as module
from offramp.decoding.exit_policies import edit_distance
from offramp.decoding.tower_beam import TextHypothesis, TextRows, Tokens, TowerBeam, tower_beam
from offramp.decoding.verified_beam import CTCTails, HeadTails, TailDraft, verified_beam
from offramp.models.decoder_lm import DecoderLM
from thinned import thinned
from toy_beam import (
    EOS,
    PROMPT,
    assert_same,
    counted,
    embeddings,
    future_heads,
    small,
    state_after,
)


class Says:
    """The same tail behind every text."""

    def __init__(self, *tail: int) -> None:
        self.tail = tail

    def tails(self, texts: Sequence[Tokens], states: Sequence[Tensor | None]) -> list[Tokens]:
        return [self.tail] * len(texts)


class Garbage:
    """Random tokens, a random number of them per text, ends among them."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tails(self, texts: Sequence[Tokens], states: Sequence[Tensor | None]) -> list[Tokens]:
        ids = torch.randint(11, (len(texts), 20), generator=self.generator).tolist()
        counts = torch.randint(20, (len(texts),), generator=self.generator).tolist()
        return [tuple(row[:n]) for row, n in zip(ids, counts, strict=True)]


Maker = Callable[[DecoderLM, Tokens], TailDraft]

DRAFTS: dict[str, Maker] = {
    "nothing": lambda model, best: Says(),
    "an end at once": lambda model, best: Says(7),
    "one token for ever": lambda model, best: Says(*[4] * 50),
    "garbage": lambda model, best: Garbage(),
    "heads": lambda model, best: HeadTails(future_heads(model), model),
    "heads of few tokens": lambda model, best: HeadTails(future_heads(model, draft_vocab=6), model),
    "the best text": lambda model, best: CTCTails(best),
    "the best text, a word wrong": lambda model, best: CTCTails((*best[:2], 9, *best[3:])),
    "the best text, a word short": lambda model, best: CTCTails((*best[:2], *best[3:])),
}


def calls_of(
    model: DecoderLM, search: Callable[..., list[TextHypothesis]]
) -> tuple[list[TextHypothesis], int]:
    tower = counted(model)
    return search(tower), tower.trace.layer_calls[0]


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("beam_size", thinned([1, 2, 4], keep=[4]))
def test_every_draft_finds_what_the_plain_beam_finds(name: str, beam_size: int) -> None:
    for seed in range(4):
        model, prefix = small(seed), embeddings(6, seed) if seed % 2 else None
        beam = TowerBeam(10, EOS, beam_size, n_best=beam_size)
        want, most = calls_of(model, lambda t: tower_beam(t, PROMPT, beam, prefix))  # noqa: B023
        draft = DRAFTS[name](model, want[0].tokens)
        found, calls = calls_of(
            model,
            lambda t: verified_beam(t, PROMPT, beam, draft, prefix),  # noqa: B023
        )
        assert_same(found, want)
        assert calls <= most


def test_a_right_draft_needs_one_call_and_a_beam_of_them_few() -> None:
    all_calls = {1: [0, 0], 4: [0, 0]}
    for beam_size, seed in itertools.product(all_calls, range(6)):
        model, beam = small(seed), TowerBeam(16, EOS, beam_size)
        want, plain = calls_of(model, lambda t: tower_beam(t, PROMPT, beam))  # noqa: B023
        draft = CTCTails(want[0].tokens)
        found, calls = calls_of(model, lambda t: verified_beam(t, PROMPT, beam, draft))  # noqa: B023
        assert_same(found, want)
        if beam_size == 1:
            assert calls == 1
        all_calls[beam_size][0] += plain
        all_calls[beam_size][1] += calls
    assert all_calls[4][1] < 0.9 * all_calls[4][0]


def test_no_text_is_read_twice_and_none_past_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tokens] = []
    total = 0

    class Recorded(TextRows):
        def read(self, texts: Sequence[Tokens]) -> list[Tensor]:
            found = super().read(texts)
            for text, states in zip(texts, found, strict=True):
                read.extend(text[: len(text) - i] for i in range(len(states)))
            return found

    monkeypatch.setattr(module, "TextRows", Recorded)
    for seed, name in itertools.product(range(3), DRAFTS):
        model, beam = small(seed), TowerBeam(9, EOS, 3)
        best = tower_beam(model, PROMPT, beam)[0].tokens
        verified_beam(model, PROMPT, beam, DRAFTS[name](model, best), embeddings(4))
        assert len(read) == len(set(read))
        assert not any(EOS & set(text) for text in read)
        assert max(map(len, read)) < beam.max_tokens
        total += len(read)
        read.clear()
    assert total > 300


# -- drafts -------------------------------------------------------------------------------------


def test_a_ctc_tail_begins_where_the_fewest_edits_have_led() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        drafted = torch.randint(3, (6,), generator=generator).tolist()
        tails = CTCTails(drafted)
        for length in (5, 2, 7):
            text = tuple(torch.randint(3, (length,), generator=generator).tolist())
            edits = [edit_distance(text, tuple(drafted[:i])) for i in range(7)]
            furthest = max(i for i in range(7) if edits[i] == min(edits))
            assert tails.tails([text], [None]) == [tuple(drafted[furthest:])]


def test_a_ctc_tail_goes_on_behind_wrong_missing_and_added_words() -> None:
    tails = CTCTails([1, 2, 3, 4, 5])
    texts = {(): (1, 2, 3, 4, 5), (1, 2): (3, 4, 5), (1, 9): (3, 4, 5), (1, 9, 3): (4, 5)}
    texts |= {(1, 3): (4, 5), (1, 2, 9, 3): (4, 5), (1, 2, 3, 4, 5): (), (1, 2, 3, 4, 5, 9): ()}
    assert tails.tails(list(texts), [None] * len(texts)) == list(texts.values())
    assert CTCTails([]).tails([(), (1,)], [None, None]) == [(), ()]


def test_heads_draft_what_they_find_most_probable() -> None:
    model = small(1)
    heads = future_heads(model, count=3)
    states = [state_after(model, PROMPT, text) for text in [(4,), (2, 9)]]
    found = HeadTails(heads, model).tails([(4,), (), (2, 9)], [states[0], None, states[1]])
    best = [tuple(heads.logits(state, model).argmax(-1).tolist()) for state in states]
    assert found == [best[0], (), best[1]]
    assert best[0] != best[1]
    assert HeadTails(heads, model).tails([()], [None]) == [()]
