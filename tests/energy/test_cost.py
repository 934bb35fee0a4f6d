"""Counted MACs: the published closed form, and what PyTorch's own counter sees run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import toy_encoder
from offramp.config import EncoderConfig
from offramp.energy.cost import EncoderMacs, encoder_mac_parts, encoder_macs, mac_cost, trail_macs
from offramp.errors import InputError
from offramp.models.ctc import CTCEncoder, early_exit_baseline, splitformer
from offramp.nn.subsampling import Downsample


def published_form(n: int, k: int, b: int) -> int:
    """The closed form of the reference: n mel frames, k layers, b branches."""
    a = (n - 3) // 2 + 1
    T = (a - 3) // 2 + 1
    h, w = -(-T // 2), 2_563_840
    layers = k * (T * w + 2 * T * T * 256) + b * (h * w + 2 * h * h * 256)
    return a * 80 * 256 * 3 + T * 256 * 256 * 3 + layers + T * 256 * 256


@pytest.mark.parametrize("num_frames", [7, 8, 100, 101, 1500, 3000, 6001])
@pytest.mark.parametrize("exit_layer", [2, 4, 6, 8, 10, 12])
def test_published_models_cost_what_the_closed_form_says(num_frames: int, exit_layer: int) -> None:
    branches = 2 if exit_layer == 12 else 1
    plain, split = early_exit_baseline(), splitformer()
    assert encoder_macs(plain, num_frames, exit_layer) == published_form(num_frames, exit_layer, 0)
    assert encoder_macs(split, num_frames, exit_layer) == published_form(
        num_frames, exit_layer, branches
    )


def test_fifteen_seconds_cost_the_published_giga_macs() -> None:
    def table(config: EncoderConfig) -> list[float]:
        return [round(encoder_macs(config, 1500, e) / 1e9, 2) for e in config.exits]

    assert table(early_exit_baseline()) == [2.21, 4.27, 6.33, 8.39, 10.45, 12.51]
    assert table(splitformer()) == [2.70, 4.76, 6.82, 8.89, 10.95, 13.50]
    assert encoder_macs(splitformer(), 3000, 12) / 1e9 == pytest.approx(28.85, abs=0.005)


def counted(model: CTCEncoder, num_frames: int, exit_layer: int) -> int:
    """Products and convolutions as PyTorch counts them, pools by a hook: what really ran.

    It sees no fused attention on a CPU, hence the plain one.
    """
    pooled = 0

    def pool(module: nn.Module, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        nonlocal pooled
        assert isinstance(module, Downsample)
        pooled += output.numel() * module.factor if module.scores is not None else 0

    hooks = [m.register_forward_hook(pool) for m in model.modules() if isinstance(m, Downsample)]
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        x, n = toy_encoder.features([num_frames])
        state = model.run(model.embed(x, n), 0, exit_layer)
        model.log_probs(state, exit_layer)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2 + pooled


@pytest.mark.slow
@pytest.mark.parametrize("changes", toy_encoder.VARIANTS.values(), ids=toy_encoder.VARIANTS)
def test_every_model_costs_what_its_modules_are_seen_to_run(changes: Any) -> None:
    model = toy_encoder.encoder(**changes)
    for num_frames in (15, 61):  # odd and even at 4 per frame
        for exit_layer in model.config.exits:
            seen = counted(model, num_frames, exit_layer)
            assert encoder_macs(model.config, num_frames, exit_layer) == seen


def test_parts_name_what_an_option_adds() -> None:
    def parts(exit_layer: int, **changes: Any) -> EncoderMacs:
        return encoder_mac_parts(toy_encoder.config(**changes), 61, exit_layer)

    options = toy_encoder.OURS | {"pad_edges": False}  # which adds a frame
    plain, ours = parts(5), parts(5, **options)
    T, D, V = 14, 16, 11
    assert (plain.branches, plain.pooling, plain.feedback) == (0, 0, 0)
    assert plain.heads == T * D * V
    assert ours.heads == 3 * T * D * V  # two of them for the feedback on the way
    assert ours.feedback == 2 * T * D * V
    assert ours.pooling == 2 * T * D
    assert 0 < ours.branches < 2 * plain.layers // 5
    assert (ours.layers, ours.subsampling) == (plain.layers, plain.subsampling)
    assert parts(2, **options).feedback == 0
    full = parts(5, branches=(2, 5), branch_factor=1)
    assert full.branches == 2 * plain.layers // 5
    assert plain.total == encoder_macs(toy_encoder.config(), 61, 5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="exit layer is 4; allowed: 2, 3, 5"):
        encoder_macs(toy_encoder.config(), 61, 4)
    with pytest.raises(InputError, match=r"6 feature frames are too few; .* at least 7"):
        encoder_macs(toy_encoder.config(), 6, 5)


@pytest.mark.parametrize("changes", toy_encoder.VARIANTS.values(), ids=toy_encoder.VARIANTS)
def test_segments_add_up_to_what_was_tested(changes: dict[str, Any]) -> None:
    """From the frames of the tower the cost is exact for the longest input, never too low."""
    config = toy_encoder.config(**changes)
    cost = mac_cost(config)
    for tested in ((2,), (5,), (2, 3), (2, 5), (2, 3, 5)):
        added: dict[int, list[int]] = {}
        for num_frames in range(config.least_frames, 90):
            T = config.output_frames(num_frames)
            added.setdefault(T, []).append(trail_macs(config, num_frames, tested))
        for T, exact in added.items():
            segments = zip((0, *tested), tested, strict=False)
            total = sum(cost(start, stop, T) for start, stop in segments)
            assert total >= max(exact)
            if max(added) > T:  # all inputs of so many frames were tried
                assert total == max(exact)


@pytest.mark.parametrize("feedback", [False, True])
def test_tested_heads_count_unless_feedback_read_them_anyway(feedback: bool) -> None:
    config = toy_encoder.config(**{**toy_encoder.OURS, "feedback": feedback})
    alone, all_three = (trail_macs(config, 100, tested) for tested in ((5,), (2, 3, 5)))
    head = config.output_frames(100) * config.d_model * config.vocab_size
    assert alone == encoder_macs(config, 100, 5)
    assert all_three - alone == (0 if feedback else 2 * head)
