"""Heads: what they compute, one by one and together, and that head 1 knows nothing of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toy
from offramp.compress.quantized import QuantizedLinear
from offramp.config_speech_lm import HeadsConfig
from offramp.energy.trace import Trace
from offramp.models.decoder_lm import DecoderLM
from offramp.models.stored import quantize
from offramp.nn.heads import Heads, IndependentHeads, LatentHeads, build_heads
from offramp.nn.tower import TracedTower

KINDS = ("latent", "independent")
V, D, L = 61, 32, 5


def heads_for(model: DecoderLM, seed: int | None = 3, **changes: Any) -> Heads:
    """With random weights; None: as they are made."""
    heads = build_heads(HeadsConfig(**changes), model.config).requires_grad_(False)
    if seed is not None:
        toy.randomize(heads, seed)
    return heads.to(model.dtype)


def states(model: DecoderLM, *shape: int) -> Tensor:
    """Random hidden states [*shape, D]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=generator).to(model.dtype)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (1, 1), (0,)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("draft_vocab", [None, 17])
def test_latent_heads_read_moved_states_as_the_tower_reads_its_own(
    shape: tuple[int, ...], tied: bool, draft_vocab: int | None
) -> None:
    model = toy.decoder(tied_embeddings=tied).double()
    heads = heads_for(model, count=4, draft_vocab=draft_vocab)
    assert isinstance(heads, LatentHeads)
    h = states(model, *shape)
    found = heads.logits(h, model)
    assert found.shape == (*shape, 3, draft_vocab or V)
    for k, matrix in enumerate(heads.expansion.weight.chunk(3)):
        latent = h + F.silu(h @ matrix.T)
        torch.testing.assert_close(heads.latents(h)[..., k, :], latent)
        read = model.logits(latent, L)[..., :draft_vocab]
        torch.testing.assert_close(found[..., k, :], read)
        torch.testing.assert_close(heads.head_logits(k, h, model), read)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (0,)], ids=str)
@pytest.mark.parametrize("draft_vocab", [None, 17])
def test_independent_heads_are_a_norm_and_a_matrix_each(
    shape: tuple[int, ...], draft_vocab: int | None
) -> None:
    model = toy.decoder().double()
    heads = heads_for(model, kind="independent", count=3, draft_vocab=draft_vocab)
    assert isinstance(heads, IndependentHeads)
    h = states(model, *shape)
    found = heads.logits(h, model)
    assert found.shape == (*shape, 2, draft_vocab or V)
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * heads.norm.weight
    for k, matrix in enumerate(heads.unembedding.weight.chunk(2)):
        torch.testing.assert_close(found[..., k, :], normed @ matrix.T)
        torch.testing.assert_close(heads.head_logits(k, h, model), normed @ matrix.T)


def test_latent_heads_begin_as_head_1_and_independent_ones_undecided() -> None:
    model = toy.decoder().double()
    h = states(model, 4)
    latent, independent = (heads_for(model, None, kind=kind) for kind in KINDS)
    own = model.logits(h[None], L)[0]
    torch.testing.assert_close(latent.logits(h, model), own[:, None].expand(4, 3, V))
    assert not independent.logits(h, model).any()


@pytest.mark.parametrize("kind", KINDS)
def test_head_1_does_not_change_by_a_bit(kind: str) -> None:
    model, ids = toy.decoder(), toy.tokens(2, 9)
    alone = model.logits(toy.run(model, ids), L)
    heads = heads_for(model, kind=kind)
    h = toy.run(model, ids)
    heads.logits(h, model)
    assert torch.equal(model.logits(h, L), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_heads_from_their_first_step(kind: str) -> None:
    model = toy.decoder()
    heads = heads_for(model, None, kind=kind).requires_grad_(True)
    logits = heads.logits(states(model, 5), model)
    F.cross_entropy(logits.flatten(0, 1), torch.arange(15)).backward()
    matrix = heads.expansion if isinstance(heads, LatentHeads) else heads.unembedding
    assert all(part.any() for part in matrix.weight.grad.chunk(3))


@pytest.mark.parametrize("draft_vocab", [None, 17])
def test_other_towers_read_as_the_decoder_does(draft_vocab: int | None) -> None:
    """One that is traced hides its parts; one whose un-embedding is quantised has no floats."""
    model = toy.decoder()
    heads, h = heads_for(model, draft_vocab=draft_vocab), states(model, 2, 3)
    expected = heads.logits(h, model)
    trace = Trace(L)
    torch.testing.assert_close(heads.logits(h, TracedTower(model, trace)), expected)
    assert trace.head_positions == 18, "each row of each head was read once"
    quantised = QuantizedLinear(D, V, bias=False, bits=8, activations="bfloat16")
    assert model.unembedding is not None
    quantised.codes, quantised.scales = quantize(model.unembedding.weight, bits=8)
    quantised.lay_out()
    model.unembedding = quantised
    torch.testing.assert_close(heads.logits(h, model), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "draft_vocab", "weights"),
    [
        ("latent", None, 3 * D * D),
        ("latent", 17, 3 * D * D),
        ("independent", None, D + 3 * D * V),
        ("independent", 17, D + 3 * D * 17),
    ],
)
def test_sizes(kind: str, draft_vocab: int | None, weights: int) -> None:
    heads = heads_for(toy.decoder(), kind=kind, draft_vocab=draft_vocab)
    assert sum(p.numel() for p in heads.parameters()) == weights
    assert heads.num_future_tokens == 3
