"""Counting changes nothing and misses nothing."""

from __future__ import annotations

import torch

import toy
from offramp.energy.trace import Trace
from offramp.nn.cache import KVCache
from offramp.nn.tower import TracedTower


def test_a_traced_tower_computes_the_same_and_counts_it() -> None:
    model, ids = toy.decoder(), toy.tokens(2, 6)
    tower = TracedTower(model, Trace(num_layers=5))
    cache = KVCache(tower.config, 2, 9, tower.device, tower.dtype)
    h = tower.run(tower.embed(ids), 0, 2, cache)
    h = tower.run(h, 2, 5, cache)
    assert torch.equal(h, toy.run(model, ids))
    assert torch.equal(tower.logits(h, 5), model.logits(h, 5))
    tower.run(tower.embed(ids[:, :1]), 0, 2, cache)
    assert tower.trace.layer_calls == [2, 2, 1, 1, 1]
    assert tower.trace.layer_positions == [14, 14, 12, 12, 12]
    assert (tower.trace.head_calls, tower.trace.head_positions) == (1, 12)


def test_an_empty_range_of_layers_costs_nothing() -> None:
    model = toy.decoder()
    tower, h = TracedTower(model, Trace(num_layers=5)), torch.ones(1, 1, 32)
    assert tower.run(h, 3, 3, KVCache(model.config, 1, 1)) is h
    assert tower.trace.layer_calls == [0] * 5
