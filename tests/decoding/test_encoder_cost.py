"""Costs that budgets go by: measured ones are milliseconds, as the clock says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from offramp.decoding import encoder_cost
from offramp.decoding.early_exit_ctc import stopwatch
from offramp.decoding.encoder_cost import measured_cost, tower_cost
from offramp.models.ctc import CTCEncoder
from toy_encoder import encoder

FIXED_MS, MS_PER_MEGAMAC = 6.0, 0.5


def test_measured_costs_are_the_clocks_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run takes a fixed time and each MAC the same, both are found."""
    model, heard = encoder(), list[int]()
    config, macs, embed = model.config, tower_cost(model.config), CTCEncoder.embed

    def listen(self: CTCEncoder, features: Tensor, lengths: Tensor) -> Any:
        heard.append(features.shape[1])
        return embed(self, features, lengths)

    def clock() -> Callable[[], float]:
        def elapsed() -> float:
            frames = config.output_frames(heard[-1])
            return FIXED_MS + MS_PER_MEGAMAC * macs(0, config.num_layers, frames) / 1e6

        return elapsed

    monkeypatch.setattr(CTCEncoder, "embed", listen)
    monkeypatch.setattr(encoder_cost, "stopwatch", clock)
    cost = measured_cost(model)
    assert set(heard) == {100, 800}  # a second and eight
    last = config.num_layers
    for start, stop, frames in ((0, 2, 10), (2, last, 10), (0, last, 400)):
        layers = FIXED_MS * (stop - start) / last
        expected = layers + MS_PER_MEGAMAC * macs(start, stop, frames) / 1e6
        assert cost(start, stop, frames) == pytest.approx(expected)


def test_the_stopwatch_shows_milliseconds() -> None:
    elapsed, began = stopwatch(), time.perf_counter()
    time.sleep(0.02)
    shown, taken = elapsed(), 1000 * (time.perf_counter() - began)
    assert 20 <= shown <= taken + 1
