"""Where to leave the decoder's tower, and how far to draft before looking up again.

`ExitSelector` follows DEL (arXiv 2504.05598): keep a running acceptance rate of every exit,
expect 1 + a + a^2 + ... + a^d tokens from a round of d drafts, divide by what the round costs,
take the best (exit, d). Plain decoding is the candidate with d = 0, so drafting stops where it
does not pay. Unlike DEL, costs are measured rather than counted in layers, and exits are compared
every few rounds rather than in each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offramp.config import DecoderConfig
from offramp.nn.cache import KVCache
from offramp.nn.tower import Tower


@dataclass(frozen=True)
class RoundCosts:
    """What a round takes, in any one unit: seconds if measured, layers if estimated.

    layer, head: one token through one layer, through the un-embedding. extra: share of that
    which each further token of the same call adds.
    """

    layer: float
    head: float
    extra: float

    @classmethod
    def estimate(cls, config: DecoderConfig) -> RoundCosts:
        """By weights read, in layers: exact where memory bandwidth is the limit."""
        d = config.d_model
        attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * d
        return cls(1.0, config.vocab_size * d / (attention + 3 * d * config.d_ff), 0.02)

    @classmethod
    @torch.inference_mode()
    def measure(cls, tower: Tower, repeats: int = 5) -> RoundCosts:
        """In seconds, on this machine now: about 25 tokens' time."""
        L, device = tower.config.num_layers, tower.device
        cache = KVCache(tower.config, 1, 64, device, tower.dtype)

        def run(count: int) -> None:
            cache.truncate([32])
            tower.run(
                tower.embed(torch.zeros(1, count, dtype=torch.long, device=device)), 0, L, cache
            )

        h = torch.zeros(1, 1, tower.config.d_model, device=device, dtype=tower.dtype)
        run(32)
        one, eight = _interleaved([lambda: run(1), lambda: run(8)], repeats, device)
        (head,) = _interleaved([lambda: tower.logits(h, L)], repeats, device)
        return cls(one / L, head, max(0.0, (eight / one - 1) / 7))

    def round(self, num_layers: int, exit_layer: int, num_draft_tokens: int) -> float:
        """Drafting, then the rest of the tower for all positions; plain decoding for 0 drafts."""
        n = num_draft_tokens
        draft = n * (exit_layer * self.layer + self.head)
        many = 1 + self.extra * n
        rest = (num_layers - exit_layer) * self.layer * many
        return draft + exit_layer * self.layer + rest + self.head * many


def _interleaved(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[float]:
    """Median seconds of each of `calls`, run in turns, after one unmeasured turn."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


class ExitSelector:
    """Chooses (exit_layer, num_draft_tokens) for the next round from what past rounds showed."""

    def __init__(
        self,
        num_layers: int,
        exits: Sequence[int],
        costs: RoundCosts,
        decay: float = 0.9,
        margin: float = 1.05,
    ) -> None:
        """decay: weight of older evidence per round. margin: how much better than plain decoding
        a drafting round must look, since its own book-keeping is not in the cost."""
        self._num_layers, self._costs = num_layers, costs
        self._decay, self._margin = decay, margin
        # A fifth of a match in one: too little to draft on, and overruled by the first match.
        self._matches = dict.fromkeys(exits, 0.2)
        self._trials = dict.fromkeys(exits, 1.0)
        self._plans: dict[int, tuple[int, int]] = {}  # by limit, until there is new evidence

    def acceptance(self, exit_layer: int) -> float:
        """Estimated probability that a token drafted at `exit_layer` is accepted."""
        return self._matches[exit_layer] / self._trials[exit_layer]

    def record(self, exit_layer: int, matches: float, trials: float) -> None:
        """`matches` of `trials` tokens of this exit agreed with the whole tower."""
        self._plans.clear()
        self._matches[exit_layer] = self._decay * self._matches[exit_layer] + matches
        self._trials[exit_layer] = self._decay * self._trials[exit_layer] + trials

    def most_promising(self) -> int:
        """The exit from which one draft looks best: the one to learn more about."""
        L = self._num_layers
        return max(
            self._matches,
            key=lambda e: (1.0 + self.acceptance(e)) / self._costs.round(L, e, 1),
        )

    def plan(self, limit: int) -> tuple[int, int]:
        """The best (exit_layer, drafts) with at most `limit` drafts; (0, 0): decode plainly."""
        if limit not in self._plans:
            self._plans[limit] = self._best(limit)
        return self._plans[limit]

    def _best(self, limit: int) -> tuple[int, int]:
        L = self._num_layers
        best, best_rate = (0, 0), self._margin / self._costs.round(L, 0, 0)
        for exit_layer in self._matches:
            a, expected, power, last = self.acceptance(exit_layer), 1.0, 1.0, 0.0
            for n in range(1, limit + 1):
                power *= a
                expected += power
                rate = expected / self._costs.round(L, exit_layer, n)
                if rate < last:
                    break  # a concave gain over a linear cost: past its peak it only falls
                last = rate
                if rate > best_rate:
                    best, best_rate = (exit_layer, n), rate
        return best
