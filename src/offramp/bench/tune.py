"""Which exit layer and draft length are fastest on this machine, for these prompts.

Greedy drafting is predictable: where an exit's choice in the true context is the tower's, its
draft would have been accepted. One pass over the decoded texts therefore tells how many rounds
every (exit, length) takes, if no draft stops early; measured costs turn that into time. The best
few are then really timed in turns with plain decoding, early stops included, and only that decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.api import DraftOptions, Model, load
from offramp.bench.arms import ArmResult, Progress, drafted, greedy_stop, interleave, plain
from offramp.bench.prompts import Prompt, data_files, from_file
from offramp.decoding.drafts import check_exit_layer
from offramp.decoding.exits import RoundCosts
from offramp.decoding.stopping import Stop
from offramp.errors import InputError
from offramp.files import replacing
from offramp.models.hub import DraftDefaults
from offramp.nn.cache import KVCache

_PER_EXIT = 2  # candidates of one exit on the short list, lest a wrong cost fill it with one


@dataclass(frozen=True)
class TuneOptions:
    """data: a .txt or .tsv file that prompts are taken from; None: the shipped model's own.
    exits: compare only these; None: all. shortlist: (exit, length) pairs that are timed."""

    data: Path | None = None
    prompts: int = 30
    max_tokens: int = 64
    exits: tuple[int, ...] | None = None
    max_draft_tokens: int = 12
    shortlist: int = 6
    rounds: int = 3
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("prompts", "max_tokens", "max_draft_tokens", "shortlist", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Candidate:
    """One exit layer and draft length: what was predicted and what was measured."""

    exit_layer: int
    num_draft_tokens: int
    predicted_speedup: float
    acceptance_rate: float | None
    mean_accepted_length: float | None
    tokens_per_s: float
    speedup: float
    identical: bool


@dataclass(frozen=True)
class TuneReport:
    """exit_agreement: exit -> share of tokens that it would have chosen too. best: the fastest
    candidate, None where none beats plain decoding."""

    model: str
    device: str
    threads: int
    prompts: int
    generated_tokens: int
    plain_tokens_per_s: float
    exit_agreement: dict[int, float]
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        fastest = max(self.candidates, key=lambda c: c.speedup)
        return fastest if fastest.speedup > 1.0 else None

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return asdict(self) | {"best": None if self.best is None else asdict(self.best)}

    def save(self, folder: Path) -> None:
        """Write the best into the checkpoint's offramp.json, whole or not at all. Where plain
        decoding won nothing is recommended there, and drafting is adaptive."""
        best = self.best
        defaults = DraftDefaults()
        if best is not None:
            defaults = DraftDefaults(best.exit_layer, best.num_draft_tokens)
        with replacing(folder / "offramp.json") as temporary:
            temporary.write_text(json.dumps(asdict(defaults), indent=2) + "\n")


@dataclass(frozen=True)
class _Text:
    """One prompt and its greedy answer; agreed[e]: where exit e would have chosen alike."""

    prompt: Prompt
    answer: tuple[int, ...]
    agreed: dict[int, list[bool]]


def run(
    model_name: str, options: TuneOptions = TuneOptions(), on_progress: Progress | None = None
) -> TuneReport:
    """Load `model_name`, take prompts from its data and tune; on_progress hears of each round."""
    files = data_files(model_name, options.data)
    model = load(model_name, device=options.device, dtype=options.dtype)
    assert model.tokenizer is not None, "load() gave it one"
    prompts = from_file(model.tokenizer, files[0], options.prompts)
    return tune(model, prompts, options, model_name, on_progress)


def tune(
    model: Model,
    prompts: Sequence[Prompt],
    options: TuneOptions = TuneOptions(),
    name: str = "",
    on_progress: Progress | None = None,
) -> TuneReport:
    """Time the most promising exits and draft lengths of `model` on `prompts` (token ids)."""
    if not prompts:
        raise InputError("there is no prompt to tune on; give at least one")
    L, device = model.config.num_layers, model.tower.device
    for exit_layer in options.exits or ():
        check_exit_layer(exit_layer, L)
    exits = sorted(set(options.exits or range(1, L)))
    if not exits:
        raise InputError("the model has one layer: there is no exit to tune")
    stop = greedy_stop(model, prompts, options.max_tokens)
    decode = plain(model.tower, stop)
    texts = [_read(model, p, decode(p).tokens, exits) for p in prompts]
    short = _shortlist(texts, exits, model.costs(), stop, L, options)
    arms = {"plain": decode}
    for e, d in short:
        draft, _ = model.make_draft(DraftOptions("exit", e, d))
        arms[f"{e},{d}"] = drafted(model.tower, stop, draft, d)
    results = interleave(arms, prompts, options.rounds, device, on_progress)
    base = results["plain"]
    found = [_candidate(e, d, p, results[f"{e},{d}"], base) for (e, d), p in short.items()]
    return TuneReport(
        model=name,
        device=options.device,
        threads=torch.get_num_threads(),
        prompts=len(prompts),
        generated_tokens=base.num_tokens,
        plain_tokens_per_s=base.tokens_per_s,
        exit_agreement={e: _agreement(texts, e) for e in exits},
        candidates=tuple(sorted(found, key=lambda c: -c.speedup)),
    )


def _candidate(
    exit_layer: int, num_draft_tokens: int, predicted: float, made: ArmResult, base: ArmResult
) -> Candidate:
    return Candidate(
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
        predicted_speedup=predicted,
        acceptance_rate=made.acceptance_rate,
        mean_accepted_length=made.mean_accepted_length,
        tokens_per_s=made.tokens_per_s,
        speedup=made.tokens_per_s / base.tokens_per_s,
        identical=all(made.agrees(base)),
    )


@torch.inference_mode()
def _read(model: Model, prompt: Prompt, answer: tuple[int, ...], exits: Sequence[int]) -> _Text:
    """Run the tower once over prompt and answer and compare what `exits` choose with the answer."""
    tower, n = model.tower, len(answer)
    text = torch.tensor([[*prompt, *answer[:-1]]], device=tower.device)
    cache = KVCache(tower.config, 1, text.shape[1], tower.device, tower.dtype)
    target = torch.tensor(answer, device=tower.device)
    h, start = tower.embed(text), 0
    agreed: dict[int, Tensor] = {}
    for e in exits:
        h, start = tower.run(h, start, e, cache), e
        agreed[e] = tower.logits(h[:, -n:], e).argmax(-1)[0] == target
    return _Text(prompt, answer, {e: a.tolist() for e, a in agreed.items()})


def _agreement(texts: Sequence[_Text], exit_layer: int) -> float:
    matches = [match for text in texts for match in text.agreed[exit_layer]]
    return sum(matches) / len(matches)


def _shortlist(
    texts: Sequence[_Text],
    exits: Sequence[int],
    costs: RoundCosts,
    stop: Stop,
    num_layers: int,
    options: TuneOptions,
) -> dict[tuple[int, int], float]:
    """The best (exit, draft length) pairs by predicted speed-up over plain decoding."""
    plain_cost = sum(len(t.answer) for t in texts) * costs.round(num_layers, 0, 0)
    predicted: dict[tuple[int, int], float] = {}
    for e in exits:
        per_length = {}
        for d in range(1, options.max_draft_tokens + 1):
            rounds = [n for text in texts for n in drafts_per_round(text.agreed[e], d, stop)]
            cost = sum(costs.round(num_layers, e if n else 0, n) for n in rounds)
            per_length[e, d] = plain_cost / cost
        predicted |= dict(_best(per_length, _PER_EXIT))
    return dict(_best(predicted, options.shortlist))


def _best(scores: dict[tuple[int, int], float], count: int) -> list[tuple[tuple[int, int], float]]:
    return sorted(scores.items(), key=lambda item: -item[1])[:count]


def drafts_per_round(agreed: Sequence[bool], num_draft_tokens: int, stop: Stop) -> list[int]:
    """Tokens drafted in every round of a greedy text whose exit agrees at `agreed`."""
    rounds, at = [], 0
    while at < len(agreed):
        count = min(num_draft_tokens, stop.max_tokens - at - 1)
        taken = 0
        while taken < count and at + taken < len(agreed) and agreed[at + taken]:
            taken += 1
        # A draft that reaches the end of the text has drafted its last token, and stops.
        rounds.append(taken if at + taken == len(agreed) else count)
        at += taken + 1
    return rounds
