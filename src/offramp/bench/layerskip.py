"""The claim of LayerSkip (arXiv 2404.16710) side by side, in one process on one checkpoint.

Our plain loop, our self-speculative decoding (fixed and adaptive) and transformers' `generate`
(greedy and with `assistant_early_exit` at our exit and draft length) decode the same prompts:
100 utterances of TOP dev and 20 windows of a novel, both from the packaged samples. Further
measured: what adaptive decoding costs where every draft is wrong.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import offramp
from offramp.api import DraftOptions, Model, load
from offramp.bench import prompts as source
from offramp.bench.arms import (
    ArmResult,
    Progress,
    drafted,
    greedy_stop,
    halves,
    interleave,
    plain,
)
from offramp.bench.peers import Transformers
from offramp.bench.prompts import Prompt
from offramp.config import DecoderConfig
from offramp.data import corpora
from offramp.decoding.drafts import EarlyExitDraft, NoDraft
from offramp.errors import InputError
from offramp.models import hub
from offramp.models.hf_checkpoint import quiet
from offramp.nn.cache import KVCache
from offramp.nn.tower import Tower
from offramp.results import ratio

OURS = ("autoregressive", "self_speculative", "adaptive")
PEERS = ("transformers_greedy", "transformers_early_exit")


@dataclass(frozen=True)
class LayerSkipOptions:
    """exit_layer, num_draft_tokens: of the fixed arm and of transformers'; None: the
    checkpoint's own (offramp.json). peers: whether to compare with transformers at all."""

    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    rounds: int = 3
    top_prompts: int = 100
    book_prompts: int = 20
    peers: bool = True
    max_tokens: int = 64
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("rounds", "book_prompts", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.top_prompts <= 100:
            raise InputError(f"top_prompts (--prompts) is {self.top_prompts}; allowed: 1 to 100")


@dataclass(frozen=True)
class Figures:
    """All arms on one set of prompts; arms that did not run are missing from `arms`."""

    prompt_tokens: int
    arms: Mapping[str, ArmResult]

    @property
    def identical(self) -> bool:
        """Whether all our arms wrote the same text for every prompt, in every round."""
        plain_text = self.arms["autoregressive"]
        return all(all(self.arms[name].agrees(plain_text)) for name in OURS)

    @property
    def identical_to_transformers(self) -> float | None:
        """Share of the prompts for which both arms of transformers wrote our text."""
        if any(name not in self.arms for name in PEERS):
            return None
        ours = self.arms["autoregressive"]
        same = [*zip(*(self.arms[name].agrees(ours) for name in PEERS), strict=True)]
        return sum(map(all, same)) / len(same)

    def tokens_per_s(self, arm: str) -> float | None:
        return self.arms[arm].tokens_per_s if arm in self.arms else None

    def speedup(self, arm: str, over: str) -> float | None:
        fast, slow = self.tokens_per_s(arm), self.tokens_per_s(over)
        return None if fast is None or slow is None else ratio(fast, slow)

    def to_dict(self) -> dict[str, Any]:
        drafting, ours = self.arms["self_speculative"], "self_speculative"
        return {
            "prompts": len(drafting.decoded),
            "identical": self.identical,
            "identical_to_transformers": self.identical_to_transformers,
            "tokens_per_s": {name: self.tokens_per_s(name) for name in (*OURS, *PEERS)},
            "speedup_vs_autoregressive": self.speedup(ours, "autoregressive"),
            "speedup_vs_transformers_greedy": self.speedup(ours, "transformers_greedy"),
            "speedup_vs_transformers_early_exit": self.speedup(ours, "transformers_early_exit"),
            "adaptive_over_autoregressive": self.speedup("adaptive", "autoregressive"),
            "acceptance_rate": drafting.acceptance_rate,
            "mean_accepted_length": drafting.mean_accepted_length,
            "first_layer_positions": drafting.total("first_layer_positions"),
            "last_layer_positions": drafting.total("last_layer_positions"),
            "generated_tokens": drafting.num_tokens,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True)
class FallbackRatio:
    """Speed of adaptive decoding where every draft is wrong: over our plain loop, and over the
    draft-verify loop without a draft."""

    vs_autoregressive: float
    vs_no_draft: float
    identical: bool


@dataclass(frozen=True)
class LayerSkipReport:
    model: str
    device: str
    dtype: str
    exit_layer: int
    num_draft_tokens: int
    min_confidence: float
    rounds: int
    threads: int
    overall: Figures
    by_prompt_set: Mapping[str, Figures]
    fallback: FallbackRatio
    versions: Mapping[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "suite": "layerskip",
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "exit_layer": self.exit_layer,
            "num_draft_tokens": self.num_draft_tokens,
            "min_confidence": self.min_confidence,
            "rounds": self.rounds,
            "threads": self.threads,
            **self.overall.to_dict(),
            "adaptive_when_drafts_fail": self.fallback.vs_autoregressive,
            "adaptive_when_drafts_fail_vs_no_draft": self.fallback.vs_no_draft,
            "by_prompt_set": {name: f.to_dict() for name, f in self.by_prompt_set.items()},
            "versions": dict(self.versions),
        }


def run(
    model_name: str,
    options: LayerSkipOptions = LayerSkipOptions(),
    on_progress: Progress | None = None,
) -> LayerSkipReport:
    """Decode all prompts with all arms; on_progress hears of each round of a prompt."""
    model = load(model_name, device=options.device, dtype=options.dtype)
    sets = _prompt_sets(model, options)
    prompts = [p for some in sets.values() for p in some]
    stop = greedy_stop(model, prompts, options.max_tokens)
    fixed, k = model.make_draft(DraftOptions("exit", options.exit_layer, options.num_draft_tokens))
    if not isinstance(fixed, EarlyExitDraft):
        raise InputError(f"{model_name} has one layer: there is no exit to draft from")
    tower = model.tower
    arms = {
        "autoregressive": plain(tower, stop),
        "self_speculative": drafted(tower, stop, fixed, k),
        "adaptive": drafted(tower, stop, *model.make_draft(DraftOptions("adaptive"))),
    }
    peer_version = None
    if options.peers:
        peer = Transformers(hub.resolve(model_name), tower.device, tower.dtype, stop, fixed, k)
        arms |= dict(zip(PEERS, (peer.greedy(), peer.early_exit()), strict=True))
        peer_version = peer.version
    first, second = halves(on_progress)
    with quiet() if options.peers else nullcontext():
        results = interleave(arms, prompts, options.rounds, tower.device, first)
    return LayerSkipReport(
        model=model_name,
        device=options.device,
        dtype=options.dtype,
        exit_layer=fixed.exit_layer,
        num_draft_tokens=k,
        min_confidence=fixed.min_confidence,
        rounds=options.rounds,
        threads=torch.get_num_threads(),
        overall=_figures(prompts, results, slice(None)),
        by_prompt_set=_by_set(sets, prompts, results),
        fallback=fallback_ratio(model, prompts, options.max_tokens, options.rounds, second),
        versions={
            "offramp": offramp.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": peer_version,
        },
    )


def fallback_ratio(
    model: Model,
    prompts: Sequence[Prompt],
    max_tokens: int = 64,
    rounds: int = 3,
    on_progress: Progress | None = None,
) -> FallbackRatio:
    """How fast adaptive decoding is where no draft is ever right: `model` with useless exits."""
    stop = greedy_stop(model, prompts, max_tokens)
    useless = UselessExits(model.tower)
    arms = {
        "autoregressive": plain(useless, stop),
        "no_draft": drafted(useless, stop, NoDraft(), 1),
        "adaptive": drafted(useless, stop, *model.make_draft(DraftOptions("adaptive"))),
    }
    made = interleave(arms, prompts, rounds, model.tower.device, on_progress)
    slow = made["adaptive"]
    return FallbackRatio(
        vs_autoregressive=slow.tokens_per_s / made["autoregressive"].tokens_per_s,
        vs_no_draft=slow.tokens_per_s / made["no_draft"].tokens_per_s,
        identical=all(all(arm.agrees(made["autoregressive"])) for arm in made.values()),
    )


class UselessExits:
    """A tower whose exits below the top name tokens at random: their vocabulary is permuted."""

    def __init__(self, tower: Tower, seed: int = 0) -> None:
        self._tower = tower
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(tower.config.vocab_size, generator=generator)
        self._order = order.to(tower.device)

    @property
    def config(self) -> DecoderConfig:
        return self._tower.config

    @property
    def device(self) -> torch.device:
        return self._tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self._tower.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        return self._tower.embed(tokens)

    def run(self, h: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        return self._tower.run(h, start, stop, cache)

    def logits(self, h: Tensor, exit_layer: int) -> Tensor:
        logits = self._tower.logits(h, exit_layer)
        return logits if exit_layer == self.config.num_layers else logits[..., self._order]


def _prompt_sets(model: Model, options: LayerSkipOptions) -> dict[str, list[Prompt]]:
    assert model.tokenizer is not None, "load() gave it one"
    items = corpora.parses(source.TOP_SAMPLE)
    text = corpora.novel(source.BOOK_SAMPLE)
    return {
        "top": source.from_parses(model.tokenizer, items, options.top_prompts),
        "books": source.from_text(model.tokenizer, text, options.book_prompts),
    }


def _by_set(
    sets: Mapping[str, Sequence[Prompt]],
    prompts: Sequence[Prompt],
    results: Mapping[str, ArmResult],
) -> dict[str, Figures]:
    found, at = {}, 0
    for name, some in sets.items():
        found[name] = _figures(prompts, results, slice(at, at + len(some)))
        at += len(some)
    return found


def _figures(prompts: Sequence[Prompt], results: Mapping[str, ArmResult], part: slice) -> Figures:
    arms = {name: result.of(part) for name, result in results.items()}
    return Figures(sum(map(len, prompts[part])), arms)
