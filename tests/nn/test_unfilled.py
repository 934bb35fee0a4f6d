"""Modules without values are made without a draw, and only in their scope."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import toy
import toy_transducer
from offramp.models.decoder_lm import DecoderLM
from offramp.models.transducer import Transducer
from offramp.nn.unfilled import unfilled


def test_nothing_is_drawn_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[torch.device] = []

    def draw(weight: torch.Tensor, *_: object) -> torch.Tensor:
        draws.append(weight.device)
        return weight

    monkeypatch.setattr(nn.init, "_no_grad_normal_", draw)
    with unfilled():
        models = DecoderLM(toy.config()), Transducer(toy_transducer.config())
    assert not draws
    assert all(p.is_meta for model in models for p in model.parameters())
    assert [p.shape for p in models[0].parameters()] == [
        p.shape for p in toy.decoder().parameters()
    ]
    assert not nn.Embedding(3, 4).weight.is_meta
    assert draws
