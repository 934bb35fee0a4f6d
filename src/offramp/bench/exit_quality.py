"""Quality at every exit: what leaving early would cost, and which exits could draft.

On text: bits per byte, and how often an exit's first choice is the last layer's (what drafting
there would have accepted). On utterances with their parses: exact match of what decoding with
that exit alone writes; items that TOP's paper leaves out (intent UNSUPPORTED) are counted both
ways. Peers score early exits by their last layer only (facebookresearch/LayerSkip issue 15).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.api import Model, load
from offramp.bench.arms import Progress
from offramp.bench.prompts import data_files
from offramp.data import corpora
from offramp.data.batching import TokenBatch, windows
from offramp.decoding.stopping import Stop
from offramp.errors import DataError, InputError
from offramp.models.decoder_lm import DecoderLM
from offramp.results import ratio
from offramp.train.evaluation import exit_scores

_WINDOW, _BATCH, _MAX_PARSE = 256, 64, 128


@dataclass(frozen=True)
class ExitQualityOptions:
    """data: a .txt or .tsv file; None: what the shipped model is judged by. limit: characters
    of each text, or utterances, read at most. exits: only these; None: every one."""

    data: Path | None = None
    limit: int | None = None
    exits: tuple[int, ...] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}; it must be at least 1")


@dataclass(frozen=True)
class TextExit:
    """top1_agreement: share of the tokens for which exit and last layer choose alike."""

    exit_layer: int
    bits_per_byte: float
    top1_agreement: float


@dataclass(frozen=True)
class ParseExit:
    """Share of the parses that are exactly right; None where there are no such items."""

    exit_layer: int
    exact_match: float
    exact_match_supported: float | None


@dataclass(frozen=True)
class ExitQuality:
    """kind `text`: `items` are tokens; kind `parse`: utterances, `supported_items` of which the
    paper counts."""

    model: str
    data: tuple[str, ...]
    kind: str
    items: int
    supported_items: int | None
    exits: tuple[TextExit, ...] | tuple[ParseExit, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return asdict(self)


def run(
    model_name: str,
    options: ExitQualityOptions = ExitQualityOptions(),
    on_progress: Progress | None = None,
) -> ExitQuality:
    """Load `model_name` and evaluate its exits; on_progress hears of each batch."""
    files = data_files(model_name, options.data)
    model = load(model_name, device=options.device)
    return exit_quality(model, files, options, model_name, on_progress)


def exit_quality(
    model: Model,
    files: Sequence[Path],
    options: ExitQualityOptions = ExitQualityOptions(),
    name: str = "",
    on_progress: Progress | None = None,
) -> ExitQuality:
    """Quality of `model` at its exits on `files`, all .txt or one .tsv."""
    exits, paths = _exits(model, options.exits), tuple(map(str, files))
    if files[0].suffix == ".tsv":
        items = corpora.parses(files[0])[: options.limit]
        if not items:
            raise DataError(f"{files[0]} has no utterances; give a file with some")
        supported = sum(p.supported for p in items)
        found = _parse_exits(model, items, exits, on_progress)
        return ExitQuality(name, paths, "parse", len(items), supported, found)
    texts = [corpora.novel(f)[: options.limit] for f in files]
    scored, count = _text_exits(model, texts, exits, on_progress)
    return ExitQuality(name, paths, "text", count, None, scored)


def _exits(model: Model, wanted: Sequence[int] | None) -> list[int]:
    L = model.config.num_layers
    if wanted is None:
        return list(range(1, L + 1))
    if not wanted or min(wanted) < 1 or max(wanted) > L:
        raise InputError(
            f"exits are {', '.join(map(str, wanted)) or 'none'}; each must lie between 1 and {L}"
        )
    return sorted(set(wanted))


def _text_exits(
    model: Model, texts: Sequence[str], exits: Sequence[int], on_progress: Progress | None
) -> tuple[tuple[TextExit, ...], int]:
    """(the exits, tokens scored). The first tokens of a window see nothing before it."""
    if model.tokenizer is None or not isinstance(model.tower, DecoderLM):
        raise InputError("to score text, load a decoder checkpoint with its tokenizer")
    if not any(text.strip() for text in texts):
        raise DataError("the text is empty; give a file with some")
    lead, num_bytes = model.tokenizer.encode(""), sum(len(text.encode()) for text in texts)
    bodies = model.tokenizer.encode_batch(texts, special=False)
    tokens = np.array([token for body in bodies for token in (*lead, *body)], np.int64)
    if len(tokens) < 2:
        raise DataError("the text has fewer than two tokens; give more")
    batches = windows(tokens, min(_WINDOW, model.config.max_positions), 16)
    scores = exit_scores(model.tower, _told(batches, on_progress), exits)
    bits = {e: nats / math.log(2) / num_bytes for e, nats in scores.nll.items()}
    n = scores.count
    return tuple(TextExit(e, bits[e], scores.agreed[e] / n) for e in exits), n


def _told(batches: Sequence[TokenBatch], on_progress: Progress | None) -> Iterator[TokenBatch]:
    for done, batch in enumerate(batches):
        if on_progress is not None:
            on_progress(done, len(batches))
        yield batch
    if on_progress is not None:
        on_progress(len(batches), len(batches))


def _parse_exits(
    model: Model,
    items: Sequence[corpora.Parse],
    exits: Sequence[int],
    on_progress: Progress | None,
) -> tuple[ParseExit, ...]:
    # Batches of like length waste little on padding, and their rows end at about the same time.
    prompts = [model.encode(corpora.parse_prompt(p.utterance)) for p in items]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    batches = [order[at : at + _BATCH] for at in range(0, len(order), _BATCH)]
    supported = sum(p.supported for p in items)
    found, done = [], 0
    for exit_layer in exits:
        right: list[corpora.Parse] = []
        for rows in batches:
            texts = _decode(model, [prompts[i] for i in rows], exit_layer)
            right += [items[i] for i, t in zip(rows, texts, strict=True) if t == items[i].parse]
            done += 1
            if on_progress is not None:
                on_progress(done, len(exits) * len(batches))
        match = len(right) / len(items)
        found.append(
            ParseExit(exit_layer, match, ratio(sum(p.supported for p in right), supported))
        )
    return tuple(found)


def _decode(model: Model, prompts: list[list[int]], exit_layer: int) -> list[str]:
    """What one batch writes, leaving the tower at `exit_layer`; with single spaces."""
    made = model.generate(prompts, stop=Stop(_MAX_PARSE), early_exit=exit_layer)
    return [" ".join(g.text.split()) for g in made]
