"""The tower's laws: stop and resume anywhere, in chunks, in ragged rows, and the result is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import toy
from offramp.errors import InputError
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.cache import KVCache
from thinned import thinned

L, B, T = 5, 2, 12
every_variant = pytest.mark.parametrize("changes", thinned(toy.VARIANTS, toy.KEPT))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@every_variant
@pytest.mark.parametrize("num_tokens", [T, 1], ids=["prefill", "decode step"])
def test_stopping_and_resuming_at_any_exit_changes_no_bit(changes: dict, num_tokens: int) -> None:
    model = toy.decoder(**changes)
    before, ids = toy.tokens(B, 6), toy.tokens(B, num_tokens, seed=1)

    def run(*stops: int) -> Tensor:
        cache = KVCache(model.config, B, 6 + num_tokens)
        toy.run(model, before, cache)
        cache.truncate([6, 3])  # ragged, as after a round of drafts
        h = model.embed(ids)
        for start, stop in zip((0, *stops), (*stops, L), strict=True):
            h = model.run(h, start, stop, cache)
        assert cache.length(0) == cache.length(L - 1) == (6 + num_tokens, 3 + num_tokens)
        return h

    whole = run()
    assert all(torch.equal(run(exit_layer), whole) for exit_layer in range(L + 1))
    assert torch.equal(run(1, 2, 3, 4), whole)


@every_variant
@pytest.mark.parametrize("chunks", [[1] * T, [5, 7], [1, 10, 1], [11, 1]], ids=str)
def test_chunked_prefill_equals_whole(changes: dict, chunks: list[int]) -> None:
    model, ids = toy.decoder(**changes), toy.tokens(B, T)
    cache = KVCache(model.config, B, T)
    close(
        torch.cat([toy.run(model, c, cache) for c in ids.split(chunks, 1)], 1), toy.run(model, ids)
    )


@every_variant
def test_upper_layers_may_take_many_steps_of_the_lower_at_once(changes: dict) -> None:
    """Draft and verify: the lower layers one token at a time, the upper over all of them."""
    model, ids, E = toy.decoder(**changes), toy.tokens(B, T), 2
    cache = KVCache(model.config, B, T)
    drafted = [model.run(model.embed(c), 0, E, cache) for c in ids.split(1, 1)]
    close(model.run(torch.cat(drafted, 1), E, L, cache), toy.run(model, ids))


@every_variant
def test_truncating_is_never_having_gone_there(changes: dict) -> None:
    model, ids = toy.decoder(**changes), toy.tokens(B, T)
    straight, strayed = KVCache(model.config, B, T), KVCache(model.config, B, T)
    toy.run(model, ids[:, :7], straight)
    toy.run(model, ids[:, :7], strayed)
    toy.run(model, toy.tokens(B, 5, seed=9), strayed)
    strayed.truncate([7, 7])
    for step in ids[:, 7:].split(2, 1):
        assert torch.equal(toy.run(model, step, strayed), toy.run(model, step, straight))


@every_variant
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_ragged_rows_equal_single_rows(changes: dict, num_tokens: int) -> None:
    model, lengths = toy.decoder(**changes), [2, 9, 5]
    cache = KVCache(model.config, 3, 20)
    toy.run(model, toy.tokens(3, 9), cache)  # row 0 and 2: right padding, then forgotten
    cache.truncate(lengths)
    together = [toy.run(model, toy.tokens(3, num_tokens, seed=s), cache) for s in (1, 2, 3)]
    for row, length in enumerate(lengths):
        alone = KVCache(model.config, 1, 20)
        toy.run(model, toy.tokens(3, 9)[row : row + 1, :length], alone)
        for s, h in enumerate(together, start=1):
            ids = toy.tokens(3, num_tokens, seed=s)[row : row + 1]
            close(h[row : row + 1], toy.run(model, ids, alone))


@every_variant
def test_rows_that_leave_or_start_anew_do_not_disturb_the_others(changes: dict) -> None:
    model, ids = toy.decoder(**changes), toy.tokens(3, T)
    cache = KVCache(model.config, 3, 2 * T)
    toy.run(model, ids[:, :7], cache)
    cache.keep([2, 0])
    ids = ids[[2, 0]]
    close(toy.run(model, ids[:, 7:9], cache), toy.run(model, ids[:, :9])[:, 7:])
    cache.reset([0])
    new = toy.tokens(1, 3, seed=4)
    h = toy.run(model, torch.cat([new, ids[1:, 9:]]), cache)
    close(h[:1], toy.run(model, new))
    close(h[1:], toy.run(model, ids[1:])[:, 9:])


@every_variant
def test_the_training_path_equals_the_tower(changes: dict) -> None:
    model, ids = toy.decoder(**changes), toy.tokens(B, T)
    close(train_path(model, ids), toy.run(model, ids))


@every_variant
def test_packed_documents_equal_documents_alone(changes: dict) -> None:
    model, ids = toy.decoder(**changes), toy.tokens(2, T)
    cuts = [[5, 7], [1, 3, 8]]
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in cuts])
    packed = train_path(model, ids, segments)
    for row, lengths in enumerate(cuts):
        alone = [toy.run(model, part) for part in ids[row : row + 1].split(lengths, 1)]
        close(packed[row : row + 1], torch.cat(alone, 1))


def test_packed_documents_count_positions_from_their_own_start() -> None:
    """Turning all of a document alike changes no attention, so this looks at the angles."""
    view = toy.decoder().view(5, torch.tensor([[0, 0, 0, 1, 1], [7, 2, 2, 2, 2]]))
    cos = toy.decoder().view(5).cos[0]
    at = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert torch.equal(view.cos, cos[at])


def train_path(model: DecoderLM, ids: Tensor, segments: Tensor | None = None) -> Tensor:
    h, view = model.embed(ids), model.view(ids.shape[1], segments)
    for i in range(L):
        h = model.layer(i, h, view)
    return h


def test_every_exit_reads_through_one_norm_and_one_head() -> None:
    tied, own = toy.decoder(tied_embeddings=True), toy.decoder()
    h = torch.randn(1, 2, 32)
    for model in (tied, own):
        head = model.embedding if model.unembedding is None else model.unembedding
        expected = model.norm(h) @ head.weight.T
        assert all(torch.equal(model.logits(h, e), model.logits(h, L)) for e in range(1, L))
        close(model.logits(h, L), expected)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2)])
def test_layers_that_do_not_exist_are_refused(start: int, stop: int) -> None:
    model = toy.decoder()
    with pytest.raises(InputError, match=f"layers {start} to {stop} .*<= 5"):
        model.run(torch.zeros(1, 1, 32), start, stop, KVCache(model.config, 1, 1))


def test_initial_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> list[Tensor]:
        model = DecoderLM(toy.config(qkv_bias=True, d_model=128))
        model.init_weights(seed)
        return list(model.state_dict().values())

    assert all(map(torch.equal, weights(3), weights(3)))
    assert not all(map(torch.equal, weights(3), weights(4)))
    model = DecoderLM(toy.config(qkv_bias=True, d_model=128))
    model.init_weights(0)
    layer = model.layers[0]
    assert layer.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.feed_forward.down.weight.std().item() == pytest.approx(0.02 / 10**0.5, rel=0.05)
    assert torch.equal(layer.attention_norm.weight, torch.ones(128))
    assert not layer.attention.qkv.bias.any()
