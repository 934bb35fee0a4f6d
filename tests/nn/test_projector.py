"""Projectors equal frame by frame by hand, and what lies behind an utterance counts for nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.config_speech_lm import ProjectorConfig
from offramp.nn.projector import CTCProjector, Projector, build_projector, run_means, token_runs
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


# -- by the tokens of CTC ------------------------------------------------------------------------


def runs_by_hand(labels: list[int], blank: int) -> list[int]:
    begins, before = [0], labels[0]
    for t, label in enumerate(labels[1:], 1):
        if label not in (blank, before):
            begins.append(t)
        before = label
    return begins


@pytest.mark.parametrize(
    ("labels", "begins"),
    [
        ([9, 9, 3, 3, 9, 3, 4, 4, 9], [0, 2, 5, 6]),
        ([3, 3, 9], [0]),
        ([3, 4, 3], [0, 1, 2]),
        ([9, 9], [0]),
        ([9], [0]),
        ([4], [0]),
    ],
)
def test_a_run_begins_where_ctc_writes_a_token(labels: list[int], begins: list[int]) -> None:
    assert token_runs(torch.tensor(labels), 9).tolist() == begins == runs_by_hand(labels, 9)


def test_runs_and_their_means_equal_those_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    for length in range(1, 30):
        labels = torch.randint(4, (length,), generator=generator)
        frames = torch.randn(length, 5, dtype=torch.double, generator=generator)
        begins = token_runs(labels, 3)
        assert begins.tolist() == runs_by_hand(labels.tolist(), 3)
        ends = [*begins.tolist()[1:], length]
        spans = zip(begins.tolist(), ends, strict=True)
        wanted = torch.stack([frames[start:stop].mean(0) for start, stop in spans])
        torch.testing.assert_close(run_means(frames, begins), wanted)


def test_a_row_of_runs_equals_it_alone_and_by_hand() -> None:
    made = build_projector(ProjectorConfig(1, 20, "ctc"), 8, 12).double()
    assert isinstance(made, CTCProjector)
    randomize(made, seed=1)
    h = torch.randn(3, 11, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    begins = [torch.tensor(at) for at in ([0, 2, 3, 9], [0], [0, 5])]
    for row, n in zip(h, LENGTHS, strict=True):
        row[n:] = torch.nan
    found = made(h, torch.tensor(LENGTHS), begins)
    for row, n, at, ours in zip(h, LENGTHS, begins, found, strict=True):
        normed, ends = made.norm(row[:n]), [*at.tolist()[1:], n]
        spans = zip(at.tolist(), ends, strict=True)
        read = [torch.cat((normed[a], normed[a:b].mean(0))) for a, b in spans]
        torch.testing.assert_close(ours, made.down(F.silu(made.up(torch.stack(read)))))
        assert made.output_frames(n) >= len(ours)
        torch.testing.assert_close(made(row[None, :n], torch.tensor([n]), [at])[0], ours)
