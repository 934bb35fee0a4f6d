"""The beam over blocks against the obvious version, the plain beam, and all blocks there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from offramp.decoding.prefix_beam import PrefixBeam, best_blocks, candidates, prefix_beam
from offramp.decoding.tower_beam import (
    TextHypothesis,
    Tokens,
    log_softmax,
    tower_beam,
)
from offramp.errors import InputError
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.heads import Heads
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


def all_blocks(heads: list[Tensor], limit: float = 0.0) -> dict[Tokens, float]:
    """Every block and its log probability. heads: log-probabilities [V] of each."""
    sure = [k == 0 or math.exp(head.max()) >= limit for k, head in enumerate(heads)]
    heads = heads[: [*sure, False].index(False)]
    found: dict[Tokens, float] = {}
    for tokens in itertools.product(*(range(len(head)) for head in heads)):
        end = next((i + 1 for i, t in enumerate(tokens) if t in EOS), len(tokens))
        found[tokens[:end]] = sum(float(heads[i][t]) for i, t in enumerate(tokens[:end]))
    return found


def slow_prefix_beam(
    model: DecoderLM, heads: Heads, beam: PrefixBeam, prefix: Tensor | None = None
) -> list[TextHypothesis]:
    """Length by length and to the very end, each text read anew."""
    met, done = {(): 0.0}, []
    for length in range(beam.max_tokens + 1):
        here = [item for item in met.items() if len(item[0]) == length]
        here.sort(key=lambda item: -item[1])
        ended = [item for item in here[: beam.beam_size] if EOS & set(item[0])]
        done += [TextHypothesis(text, score, "stop") for text, score in ended]
        opened = [item for item in here if not EOS & set(item[0])][: beam.beam_size]
        if length == beam.max_tokens:
            done += [TextHypothesis(text, score, "length") for text, score in opened]
            break
        for text, score in opened:
            state = state_after(model, PROMPT, text, prefix)
            logits = [model.logits(state, 3), *heads.logits(state, model)]
            first = [log_softmax(x) for x in logits][: beam.max_tokens - length]
            blocks = all_blocks(first, beam.min_confidence)
            for block in sorted(blocks, key=lambda b: -blocks[b])[: beam.width]:
                assert text + block not in met, "a text is met in one way"
                met[text + block] = score + blocks[block]
    return sorted(done, key=lambda h: -h.score)[: beam.n_best]


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("min_confidence", thinned([0.0, 0.3, 1.0], keep=[0.3]))
@pytest.mark.parametrize("count", [2, 3])
def test_the_search_is_the_obvious_one(
    count: int, min_confidence: float, with_prefix: bool
) -> None:
    for seed in range(3):
        model, prefix = small(seed), embeddings(5, seed) if with_prefix else None
        heads = future_heads(model, count, seed)
        for beam_size, n_best in ((2, 1), (3, 4)):
            beam = PrefixBeam(7, EOS, beam_size, n_best, min_confidence)
            found = prefix_beam(model, heads, PROMPT, beam, prefix)
            want = slow_prefix_beam(model, heads, beam, prefix)
            assert_same(found, want)


@pytest.mark.parametrize("beam_size", thinned([1, 2, 4], keep=[2]))
@pytest.mark.parametrize("sure", [False, True], ids=["no heads", "no head is sure enough"])
def test_without_future_heads_it_is_the_plain_beam(beam_size: int, sure: bool) -> None:
    for seed in range(6):
        model, prefix = small(seed), embeddings(4, seed)
        heads = future_heads(model, seed=seed) if sure else None
        beam = PrefixBeam(9, EOS, beam_size, 3, min_confidence=1.0)
        found = prefix_beam(model, heads, PROMPT, beam, prefix)
        assert_same(found, tower_beam(model, PROMPT, beam, prefix))


@pytest.mark.parametrize(("count", "calls"), [(1, 12), (2, 6), (4, 3), (5, 3)])
def test_a_call_reads_as_many_tokens_as_there_are_heads(count: int, calls: int) -> None:
    model = small(2)
    heads = future_heads(model, count) if count > 1 else None
    tower = counted(model)
    prefix_beam(tower, heads, PROMPT, PrefixBeam(12, frozenset(), 3, 3))
    assert tower.trace.layer_calls[0] == calls


def test_heads_may_know_fewer_tokens_than_the_tower() -> None:
    model = small(1)
    beam = PrefixBeam(6, EOS, 3, 3)
    found = prefix_beam(model, future_heads(model, 3, draft_vocab=4), PROMPT, beam)
    want = slow_prefix_beam(model, future_heads(model, 3, draft_vocab=4), beam)
    assert_same(found, want)


# -- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("beam_size", [1, 3, 6])
def test_the_best_blocks_are_the_best_of_all(count: int, beam_size: int) -> None:
    beam, ends = PrefixBeam(9, EOS, beam_size), 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(count, 9, generator=generator, dtype=torch.float64)
        heads = candidates(logits.log_softmax(-1), beam)
        blocks = all_blocks(list(logits.log_softmax(-1)))
        want = sorted(blocks.items(), key=lambda item: -item[1])[: beam.width]
        found = best_blocks(heads, beam)
        assert [block for block, _ in found] == [block for block, _ in want]
        assert [p for _, p in found] == pytest.approx([p for _, p in want])
        ends += sum(len(block) < count for block, _ in found)
    assert ends > 0 or count == 1


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_an_impossible_confidence_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"min_confidence is .*; it must lie between 0 and 1"):
        PrefixBeam(4, EOS, min_confidence=value)
