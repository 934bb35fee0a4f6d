"""Ways of decoding one prompt, timed against each other: the arms of every speed comparison.

Whatever else the machine does should hit all arms alike: they take turns at every prompt, in an
order that rotates, and a prompt's time is the median over rounds. The time covers all of the
decoding, prefill included, and no detokenising.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from offramp.api import Model
from offramp.bench.prompts import Prompt
from offramp.decoding.autoregressive import autoregress
from offramp.decoding.drafts import Draft
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import RowEnd, Stop
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.nn.tower import Tower, TracedTower
from offramp.results import DraftCounts, Step, ratio

Progress = Callable[[int, int], None]  # (decodings done, decodings in all)


@dataclass(frozen=True)
class Decoded:
    """What an arm wrote for one prompt, and the counts behind it (0 for what it cannot count)."""

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    verify_calls: int = 0
    first_layer_positions: int = 0
    last_layer_positions: int = 0


Arm = Callable[[Prompt], Decoded]


@dataclass(frozen=True)
class ArmResult:
    """Per prompt: what was written, the median seconds. steady: every round wrote the same."""

    decoded: tuple[Decoded, ...]
    seconds: tuple[float, ...]
    steady: tuple[bool, ...]

    def of(self, prompts: slice) -> ArmResult:
        """The result on some of the prompts alone."""
        return ArmResult(self.decoded[prompts], self.seconds[prompts], self.steady[prompts])

    def total(self, count: str) -> int:
        """The sum of one of the counts of `Decoded`."""
        return sum(getattr(d, count) for d in self.decoded)

    @property
    def num_tokens(self) -> int:
        return sum(len(d.tokens) for d in self.decoded)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / sum(self.seconds)

    @property
    def acceptance_rate(self) -> float | None:
        return ratio(self.total("accepted"), self.total("drafted"))

    @property
    def mean_accepted_length(self) -> float | None:
        return ratio(self.num_tokens, self.total("verify_calls"))

    def agrees(self, other: ArmResult) -> list[bool]:
        """Per prompt: whether both wrote the same tokens in every round."""
        both = zip(self.decoded, other.decoded, self.steady, other.steady, strict=True)
        return [a.tokens == b.tokens and s and t for a, b, s, t in both]


def greedy_stop(model: Model, prompts: Sequence[Prompt], max_tokens: int) -> Stop:
    """`max_tokens` or the checkpoint's end of text; InputError if that overruns its context."""
    longest, limit = max(map(len, prompts)), model.config.max_positions
    if longest + max_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and max_tokens is {max_tokens}, more than "
            f"the model's context of {limit}; at most {limit - longest} new tokens fit"
        )
    return Stop(max_tokens, frozenset(model.config.eos_ids))


def plain(tower: Tower, stop: Stop) -> Arm:
    """Our autoregressive loop, the reference."""

    def decode(prompt: Prompt) -> Decoded:
        traced, chooser = _prepare(tower, prompt)
        return _decoded(autoregress(traced, prompt, chooser, RowEnd(stop, None)), traced.trace)

    return decode


def drafted(tower: Tower, stop: Stop, draft: Draft, num_draft_tokens: int) -> Arm:
    """Our draft-verify loop with `draft`."""

    def decode(prompt: Prompt) -> Decoded:
        traced, chooser = _prepare(tower, prompt)
        ends = [RowEnd(stop, None)]
        steps = speculate(traced, [prompt], draft, num_draft_tokens, chooser, ends)
        return _decoded(steps, traced.trace)

    return decode


def _prepare(tower: Tower, prompt: Prompt) -> tuple[TracedTower, Chooser]:
    c = tower.config
    chooser = Chooser(Sampling(), [prompt], [0], c.vocab_size, tower.device)
    return TracedTower(tower, Trace(c.num_layers)), chooser


def _decoded(steps: Iterable[Step], trace: Trace) -> Decoded:
    made = list(steps)
    drafts = [DraftCounts.of(step) for step in made]
    return Decoded(
        tokens=tuple(t for step in made for t in step.tokens),
        drafted=sum(counts.drafted for counts in drafts),
        accepted=sum(counts.accepted for counts in drafts),
        verify_calls=len(made),
        first_layer_positions=trace.layer_positions[0],
        last_layer_positions=trace.layer_positions[-1],
    )


def interleave(
    arms: Mapping[str, Arm],
    prompts: Sequence[Prompt],
    rounds: int,
    device: torch.device,
    on_progress: Progress | None = None,
) -> dict[str, ArmResult]:
    """Every arm on every prompt, `rounds` times, in turns; one unmeasured turn comes first."""
    names = list(arms)
    written: dict[str, list[list[Decoded]]] = {n: [[] for _ in prompts] for n in names}
    seconds: dict[str, list[list[float]]] = {n: [[] for _ in prompts] for n in names}
    for name in names:
        arms[name](prompts[0])
    total, done = rounds * len(prompts), 0
    for turn in range(rounds):
        for i, prompt in enumerate(prompts):
            first = (turn + i) % len(names)
            for name in names[first:] + names[:first]:
                _wait_for(device)
                began = time.perf_counter()
                decoded = arms[name](prompt)
                _wait_for(device)
                seconds[name][i].append(time.perf_counter() - began)
                written[name][i].append(decoded)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    return {
        name: ArmResult(
            decoded=tuple(each[0] for each in written[name]),
            seconds=tuple(map(statistics.median, seconds[name])),
            steady=tuple(all(d.tokens == each[0].tokens for d in each) for each in written[name]),
        )
        for name in names
    }


def halves(on_progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """The progress of two measurements of equal length as that of one."""
    if on_progress is None:
        return None, None
    tell = on_progress
    return (lambda done, total: tell(done, 2 * total)), (
        lambda done, total: tell(total + done, 2 * total)
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
