"""What a call of each part costs, by its shape: equal to what hooks see it read and multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offramp.config import Chunking
from offramp.energy.transducer_cost import (
    blank_call,
    encoder_call,
    joiner_call,
    predictor_call,
)
from offramp.models.transducer import emformer_rnnt_base
from toy_transducer import CHUNKINGS, ENCODERS, PREDICTORS, transducer

pytestmark = pytest.mark.slow  # the default suite is to stay short


@pytest.fixture(autouse=True)
def convolutions_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few rows they are products and sums, as many, which neither hook nor counter sees."""
    monkeypatch.setattr("offramp.nn.emformer._FEW_ROWS", 0)


def seen(part: nn.Module, call: Callable[[], Any]) -> tuple[int, int]:
    """(weights that the modules of `part` read, MACs that PyTorch counts) in one call.

    A module reads all that it holds each time it runs, an embedding a row per token. The counter
    sees no fused attention on a CPU, hence the plain one.
    """
    weights = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal weights
        lookup = isinstance(module, nn.Embedding)
        weights += (
            output.numel() if lookup else sum(t.numel() for t in module.state_dict().values())
        )

    hooks = [m.register_forward_hook(count) for m in part.modules() if not list(m.children())]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    for hook in hooks:
        hook.remove()
    return weights, counter.get_total_flops() // 2


@pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("chunking", CHUNKINGS.values(), ids=CHUNKINGS)
def test_an_encoder_costs_per_chunk_what_it_is_seen_to_run(
    changes: Any, chunking: Chunking
) -> None:
    """The first chunk and one in the middle alike: the past is kept at full size."""
    model = transducer(**changes)
    features = torch.zeros(1, chunking.frames * model.config.time_reduction, 8)
    step = chunking.chunk * model.config.time_reduction
    cost = encoder_call(model.config, chunking)
    with model.streaming(1, chunking) as state:
        for chunk in (features, features[:, :step], features[:, :step]):
            ran = seen(model.encoder, lambda x=chunk: model.encoder.push(x, state))
            assert ran == (cost.weights, cost.macs)
        assert state.chunks == 3
        past = state.keys[:, 0].numel() + state.values[:, 0].numel() + state.frames[:, 0].numel()
        assert cost.cache_read == past
    assert (
        cost.stored == cost.weights == sum(t.numel() for t in model.encoder.state_dict().values())
    )


@pytest.mark.parametrize("changes", PREDICTORS.values(), ids=PREDICTORS)
def test_a_predictor_costs_per_token_what_it_is_seen_to_run(changes: Any) -> None:
    predictor, cost = (model := transducer(**changes)).predictor, predictor_call(model.config)
    state = predictor.initial_state(1)
    ran = seen(predictor, lambda: predictor.step(torch.tensor([3]), state))
    assert ran == (cost.weights, cost.macs)
    assert cost.stored == sum(p.numel() for p in predictor.parameters())
    assert cost.cache_read == cost.cache_written == sum(part.numel() for part in state.parts)


@pytest.mark.parametrize("factorised", [False, True])
def test_a_joiner_costs_per_call_what_it_is_seen_to_run(factorised: bool) -> None:
    model = transducer(factorised_blank=factorised)
    joiner, e, p = model.joiner, torch.zeros(1, 20), torch.zeros(1, 20)
    cost = joiner_call(model.config)
    weights, macs = cost.weights, cost.macs
    if factorised:
        blank = blank_call(model.config)
        assert seen(joiner, lambda: joiner.blank_logit(e, p)) == (blank.weights, blank.macs)
        weights, macs = weights + blank.weights, macs + blank.macs
    assert seen(joiner, lambda: joiner.log_probs(e, p)) == (weights, macs)
    assert weights == sum(p.numel() for p in joiner.parameters())


def test_the_public_reference_costs_what_its_sizes_say() -> None:
    config = emformer_rnnt_base()
    encoder, predictor, joiner = encoder_call(config), predictor_call(config), joiner_call(config)
    assert (encoder.weights - 2 * 80, joiner.weights) == (63_605_760, 4_199_425)
    assert predictor.stored == 8_932_864
    assert predictor.weights == 8_932_864 - 4096 * 512  # one row of the embedding
    assert encoder.cache_read == 20 * 2 * 30 * 512
    assert encoder.cache_written == 20 * 2 * 4 * 512
    rows, D = 5, 512
    layer = rows * (4 * D * D + 2 * 35 * D + 2 * D * 2048)
    assert encoder.macs == 4 * rows * 80 * 128 + 20 * layer + 4 * D * 1024
