"""Lossy decoding: as plain decoding where no head is trusted, fewer calls the more are."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import toy_decoding as run
from offramp.config_speech_lm import HeadsConfig
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.stopping import Stop
from offramp.decoding.threshold import Trust, decode_unverified
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.nn.heads import Heads
from offramp.nn.tower import Tower, TracedTower
from offramp.results import Step
from thinned import thinned
from toy_decoding import LAYERS
from toy_listening import MAX_TOKENS, VOCAB, KnowingHeads, Scene, scene

SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(0.9, top_k=20, repetition_penalty=1.2, seed=5),
}


@cache
def listening(num_rows: int = 8, setting: str = "greedy") -> Scene:
    return scene(num_rows, seed=8, sampling=SETTINGS[setting])


class FadingHeads(Heads):
    """Head k says token k, the surer the nearer it is: with probability 0.9, 0.6, 0.3."""

    def __init__(self) -> None:
        super().__init__(HeadsConfig(4))

    def logits(self, h: Tensor, tower: Tower) -> Tensor:
        p = torch.full((3, VOCAB), 1e-9, dtype=h.dtype)
        for head, sure in enumerate((0.9, 0.6, 0.3)):
            p[head] = (1 - sure) / (VOCAB - 1)
            p[head, head + 2] = sure
        return p.log().expand(*h.shape[:-1], 3, VOCAB)

    def head_logits(self, future: int, h: Tensor, tower: Tower) -> Tensor:
        return self.logits(h, tower)[..., future, :]


def decode(
    s: Scene, heads: Heads, min_confidence: float, stop: Stop | None = None
) -> tuple[run.Run, int]:
    """(the run, its decoder calls)"""
    numbers, tower = range(len(s.prompts)), TracedTower(s.model, Trace(LAYERS))
    chooser = Chooser(s.sampling, s.prompts, numbers, VOCAB, s.model.device)
    ends = run.make_ends(len(s.prompts), stop or s.stop)
    trust = Trust(heads, min_confidence)
    steps: list[Step] = list(decode_unverified(tower, s.prompts, trust, chooser, ends, s.prefixes))
    rows = [run.Row.of([step for step in steps if step.row == row]) for row in numbers]
    (calls,) = set(tower.trace.layer_calls)
    return run.Run(rows, steps), calls


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("num_rows", thinned([1, 8], keep=[8]))
def test_trusting_no_head_is_plain_decoding(num_rows: int, setting: str) -> None:
    s = listening(num_rows, setting)
    got, calls = decode(s, run.random_heads(s.model), 1.1)
    assert got.rows == s.written
    assert calls == max(len(row.tokens) for row in s.written)
    assert all(step.unverified == 0 for step in got.steps)


@pytest.mark.parametrize(
    ("min_confidence", "kept"),
    [
        pytest.param(1.1, 1, marks=pytest.mark.slow),
        (0.95, 1),
        (0.89, 2),
        pytest.param(0.5, 3, marks=pytest.mark.slow),
        (0.31, 3),
        (0.29, 4),
        pytest.param(0, 4, marks=pytest.mark.slow),
    ],
)
def test_heads_are_kept_up_to_the_first_that_is_unsure(min_confidence: float, kept: int) -> None:
    """So calls never rise as the threshold falls, for texts of one length."""
    s = listening()
    got, calls = decode(s, FadingHeads(), min_confidence, Stop(21))
    assert calls == -(-21 // kept)
    for step in got.steps[:8]:
        assert step.tokens[1:] == (2, 3, 4)[: kept - 1]
        assert (step.drafted, step.accepted, step.unverified) == ((), 0, kept - 1)


def test_a_sure_head_behind_an_unsure_one_is_not_kept() -> None:
    class Reversed(FadingHeads):
        def logits(self, h: Tensor, tower: Tower) -> Tensor:
            return super().logits(h, tower).flip(-2)

    got, _ = decode(listening(1), Reversed(), 0.8, Stop(5))
    assert [len(step.tokens) for step in got.steps] == [1] * 5


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("count", thinned([2, 4, 6], keep=[4]))
def test_heads_that_know_write_the_plain_text(count: int, num_rows: int) -> None:
    """In U / K calls, one less than with verification; cut where plain decoding stops."""
    s = listening(num_rows)
    got, calls = decode(s, KnowingHeads(s, count), 0.5)
    assert got.rows == s.written
    assert calls == max(-(-len(row.tokens) // count) for row in s.written)
    for row, written in enumerate(s.written):
        mine = [step for step in got.steps if step.row == row]
        assert sum(step.unverified for step in mine) == len(written.tokens) - len(mine)


@pytest.mark.parametrize("min_confidence", [0.02, 0.05, 0.1])
def test_a_batch_writes_what_its_rows_write_alone(min_confidence: float) -> None:
    """Rows read different numbers of tokens at once, and leave at different times."""
    s = listening()
    heads = run.random_heads(s.model)
    together, _ = decode(s, heads, min_confidence)
    assert len({len(step.tokens) for step in together.steps}) > 1
    for b in range(8):
        one = Scene(s.model, s.prefixes[b : b + 1], s.stop, s.sampling, s.written[b : b + 1])
        alone, _ = decode(one, heads, min_confidence)
        assert alone.rows == together.rows[b : b + 1]


def test_what_is_kept_is_read_by_the_next_call() -> None:
    """After tokens that nobody verified, head 1 says what the tower says after them."""
    s = listening(1)
    got, _ = decode(s, FadingHeads(), 0.5, Stop(MAX_TOKENS))
    text: list[int] = []
    for step in got.steps:
        end = run.make_ends(1, Stop(1))[0]
        chooser = Chooser(Sampling(), [[1]], [0], VOCAB, s.model.device)
        (plain,) = run.autoregress(s.model, [1, *text], chooser, end, s.prefixes[0])
        assert step.tokens[0] == plain.tokens[0]
        text += step.tokens


@pytest.mark.parametrize("min_confidence", [-0.1, float("nan")])
def test_a_threshold_is_a_number_from_0_on(min_confidence: float) -> None:
    with pytest.raises(InputError, match=f"min_confidence is {min_confidence}") as error:
        Trust(FadingHeads(), min_confidence)
    assert "\n" not in str(error.value)


def test_prefixes_that_do_not_fit_are_refused() -> None:
    s = listening()
    short = Scene(s.model, s.prefixes[:1], s.stop, s.sampling, [])
    chooser = Chooser(Sampling(), [[1]] * 2, [0, 1], VOCAB, s.model.device)
    ends = run.make_ends(2, s.stop)
    with pytest.raises(InputError, match="1 prefixes for 2 prompts"):
        list(
            decode_unverified(
                s.model, [[1]] * 2, Trust(FadingHeads(), 0.5), chooser, ends, short.prefixes
            )
        )
