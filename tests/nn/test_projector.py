"""The projector equals stacking by hand, and its padding counts as zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.config_speech_lm import ProjectorConfig
from offramp.nn.projector import Projector
from toy_encoder import randomize

LENGTHS = [11, 1, 6]


def projector(stack: int) -> Projector:
    made = Projector(ProjectorConfig(stack, 20), 8, 12).double()
    randomize(made, seed=1)
    return made.requires_grad_(False)


def by_hand(made: Projector, h: Tensor) -> Tensor:
    """[T, d_in] -> [N, d_out], group by group."""
    found = []
    for at in range(0, len(h), made.config.stack):
        frames = [made.norm(frame) for frame in h[at : at + made.config.stack]]
        frames += [torch.zeros_like(h[0])] * (made.config.stack - len(frames))
        found.append(made.down(F.silu(made.up(torch.cat(frames)))))
    return torch.stack(found)


@pytest.mark.parametrize("stack", [1, 2, 5, 11, 40])
def test_it_equals_stacking_by_hand(stack: int) -> None:
    made = projector(stack)
    h = torch.randn(3, 11, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for row, n in zip(h, LENGTHS, strict=True):
        row[n:] = torch.nan
    embeddings = made(h, torch.tensor(LENGTHS))
    assert embeddings.shape == (3, -(-11 // stack), 12)
    for row, found, n in zip(h, embeddings, LENGTHS, strict=True):
        torch.testing.assert_close(found[: made.output_frames(n)], by_hand(made, row[:n]))


@pytest.mark.parametrize(("num_frames", "wanted"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_the_last_group_is_filled_up(num_frames: int, wanted: int) -> None:
    assert projector(4).output_frames(num_frames) == wanted


def test_new_weights_are_a_function_of_the_seed() -> None:
    one, same, other = projector(2), projector(2), projector(2)
    one.init_weights(3)
    same.init_weights(3)
    other.init_weights(4)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not torch.equal(one.up.weight, other.up.weight)
    assert not torch.equal(one.down.weight, other.down.weight)
    assert torch.equal(one.norm.weight, torch.ones(8).double())
    for bias in (one.norm.bias, one.up.bias, one.down.bias):
        assert not bias.any()
