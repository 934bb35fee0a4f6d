"""As many weights go as was asked, the right ones; what is cut out computes as if it were zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy_encoder
import toy_transducer
from offramp.compress.adam_saliency import AdamPruning
from offramp.compress.blocks import BlockPruning
from offramp.compress.feed_forward import FeedForwardPruning
from offramp.compress.heads import HeadPruning
from offramp.compress.layers import LowRankLinear, SubsetLinear
from offramp.compress.low_rank import LowRank
from offramp.compress.magnitude import MagnitudePruning
from offramp.compress.method import free_linears, modules_of
from offramp.compress.prune import WITH_WEIGHT
from offramp.compress.rows import RowPruning
from offramp.errors import InputError
from toy_compress import MODELS, Moments, outputs

pytestmark = pytest.mark.slow  # the default suite is to stay short


def matrices(model: nn.Module) -> dict[str, Tensor]:
    found = modules_of(model, WITH_WEIGHT)
    return {f"{name}.weight": module.weight.detach() for name, module in found.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("level", [0.1, 0.5, 0.97])
def test_sparsity_is_what_was_asked_for(kind: str, level: float) -> None:
    model = MODELS[kind]()
    for pruned in (
        MagnitudePruning(level).apply(model),
        AdamPruning(level, Moments(model)).apply(model),
    ):
        for name, weight in matrices(pruned).items():
            assert int((weight == 0).sum()) == round(level * weight.numel()), name
    everywhere = matrices(MagnitudePruning(level, "global").apply(model)).values()
    zeros, count = (sum(f(w) for w in everywhere) for f in (lambda w: (w == 0).sum(), Tensor.numel))
    assert int(zeros) == round(level * count)
    shares = {round(float((w == 0).float().mean()), 2) for w in everywhere}
    assert len(shares) > 1, "one threshold finds more in some matrices than in others"
    for name, weight in matrices(BlockPruning(level).apply(model)).items():
        blocks = [(part == 0).all(0) for part in weight.flatten(1).split(8)]
        assert int(torch.stack(blocks).sum()) == round(level * torch.stack(blocks).numel()), name
        assert not any(
            bool(((part == 0).any(0) & ~gone).any())
            for part, gone in zip(weight.flatten(1).split(8), blocks, strict=True)
        )


def test_the_least_goes() -> None:
    model = MODELS["ctc, ours"]()
    for name, pruned in matrices(MagnitudePruning(0.4).apply(model)).items():
        was = matrices(model)[name]
        assert was[pruned == 0].abs().max() <= pruned[pruned != 0].abs().min()
        assert torch.equal(pruned[pruned != 0], was[pruned != 0])
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
    # w^2 sqrt v: 8, 4, 27, 16; w^2 v: 64, 4, 81, 16
    moments = {"0.weight": torch.tensor([[64.0, 1.0, 9.0, 1.0]])}
    for saliency, left in (("w2_sqrt_v", [0, 0, 3, 4]), ("w2_v", [1, 0, 3, 0])):
        pruned = AdamPruning(0.5, moments, saliency).apply(layer)
        assert pruned[0].weight[0].tolist() == left


def test_moments_of_another_model_are_refused() -> None:
    model = MODELS["ctc, ours"]()
    moments = Moments(model)
    del moments["heads.0.weight"]
    with pytest.raises(InputError, match=r"moment of heads.0.weight \[11, 16\] is missing"):
        AdamPruning(0.5, moments).apply(model)
    moments["heads.0.weight"] = torch.ones(3)
    with pytest.raises(InputError, match=r"is of shape \[3\]; gather"):
        AdamPruning(0.5, moments).apply(model)
    assert AdamPruning(0.5, moments).apply(model, ["layers"]) is not model


# -- structure ----------------------------------------------------------------------------------


def masked(model: Any, smaller: nn.Module) -> Any:
    """`model` with the full matrices that `smaller` stands for: zero where it has nothing."""
    for name, linear in free_linears(model, None).items():
        linear.weight.copy_(smaller.get_submodule(name).weight)
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [HeadPruning(0.5), RowPruning(0.3), RowPruning(0.999)])
def test_what_is_cut_out_computes_as_zeros(kind: str, method: Any) -> None:
    model = MODELS[kind]()
    smaller = method.apply(model)
    assert modules_of(smaller, SubsetLinear)
    dense = masked(MODELS[kind](), smaller)
    assert not torch.equal(outputs(dense), outputs(model))
    torch.testing.assert_close(outputs(smaller), outputs(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_units_cut_out_compute_as_zeros(kind: str) -> None:
    model, dense = MODELS[kind](), MODELS[kind]()
    smaller = FeedForwardPruning(0.4).apply(model)
    narrower = 0
    for name, linear in free_linears(dense, None).items():
        ours = smaller.get_submodule(name)
        assert isinstance(ours, nn.Linear)
        if ours.weight.shape == linear.weight.shape:
            continue
        narrower += 1
        dim = 0 if ours.out_features != linear.out_features else 1
        assert ours.weight.shape[dim] == linear.weight.shape[dim] * 0.6 // 1 + (
            0 if linear.weight.shape[dim] * 0.6 % 1 < 0.5 else 1
        )
        theirs, kept = linear.weight.unbind(dim), ours.weight.unbind(dim)
        for at, row in enumerate(theirs):
            if not any(torch.equal(row, k) for k in kept):
                linear.weight.select(dim, at).zero_()
                if dim == 0 and linear.bias is not None:
                    linear.bias[at] = 0.0
    assert narrower >= 2 * model.config.num_layers
    assert not torch.equal(outputs(dense), outputs(model))
    torch.testing.assert_close(outputs(smaller), outputs(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["decoder, grouped heads", "ctc, ours", "transducer, published"])
def test_a_head_goes_out_of_every_matrix_around_it(kind: str) -> None:
    smaller = HeadPruning(0.5).apply(MODELS[kind]())
    attention = (
        smaller.encoder.layers[0].attention if "trans" in kind else smaller.layers[0].attention
    )
    Dh, groups = attention.head_dim, 2  # one of two groups stays
    used = attention.output.weight.abs().sum(0).view(groups, -1).sum(1) > 0
    assert used.sum() == 1
    joined = (
        torch.cat((attention.query.weight, attention.key_value.weight))
        if "trans" in kind
        else attention.qkv.weight
    )
    per_group = attention.output.in_features // groups
    queries, keys, values = joined.split([groups * per_group, groups * Dh, groups * Dh])
    for part in (queries, keys, values):
        assert torch.equal(part.abs().sum(1).view(groups, -1).sum(1) > 0, used)
    weights = sum(p.numel() for p in attention.parameters() if p.ndim == 2)
    full = MODELS[kind]()
    full = full.encoder.layers[0].attention if "trans" in kind else full.layers[0].attention
    assert weights == sum(p.numel() for p in full.parameters() if p.ndim == 2) // 2


def test_one_unit_remains_whatever_the_level() -> None:
    model = MODELS["ctc, ours"]()
    for method in (HeadPruning(0.99), FeedForwardPruning(0.99), RowPruning(0.99)):
        smaller = method.apply(model)
        assert outputs(smaller).isfinite().all()
    assert FeedForwardPruning(0.99).apply(model).layers[0].first_feed_forward.up.out_features == 1


def test_structure_is_cut_once() -> None:
    model = MODELS["ctc, ours"]()
    with pytest.raises(InputError, match="attention is pruned or factorised already"):
        HeadPruning(0.5).apply(HeadPruning(0.5).apply(model))
    with pytest.raises(InputError, match="feed_forward is pruned or factorised already"):
        FeedForwardPruning(0.5).apply(LowRank(0.5).apply(model))


def test_low_rank_is_the_best_of_its_rank() -> None:
    model = MODELS["decoder, biases, q/k norm"]()
    smaller = LowRank(0.5).apply(model)
    layers = modules_of(smaller, LowRankLinear)
    assert len(layers) > 4 * model.config.num_layers - 1
    for name, layer in layers.items():
        weight = model.get_submodule(name).weight
        rank, saved = layer.down.out_features, layer.up.weight.numel() + layer.down.weight.numel()
        assert saved <= 0.5 * weight.numel() < saved + sum(weight.shape)
        rest = torch.linalg.svdvals(weight)[rank:]
        error = (layer.weight - weight).norm()
        torch.testing.assert_close(error, rest.norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_every_method_keeps_a_stream_equal_to_the_whole(level: float) -> None:
    full = toy_transducer.transducer(**toy_transducer.VARIANTS["all together"])
    x, n = toy_encoder.features([61, 40])
    for method in (
        MagnitudePruning(level),
        RowPruning(level),
        HeadPruning(level + 0.2),
        FeedForwardPruning(level),
        LowRank(level),
    ):
        model = method.apply(full)
        whole, lengths = model.encoder(x, n)
        streamed, counts = toy_transducer.streamed(model, x, n, [7, 1])
        assert torch.equal(counts, lengths)
        for row, count in enumerate(lengths):
            torch.testing.assert_close(streamed[row, :count], whole[row, :count])
