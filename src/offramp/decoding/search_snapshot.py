"""The state of a transducer search as tensors, and back: to keep a stream, or move it elsewhere.

What a scorer remembers follows from the tokens, so it is not kept: the tokens are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from offramp.decoding.beam import Scorer
from offramp.decoding.transducer_state import OpenHypothesis, SearchCounts, SearchState
from offramp.nn.predictors import PredictorState

_PREDICTOR = "predictor."  # of names of its parts, at most ten


def search_tensors(state: SearchState) -> dict[str, Tensor]:
    """All of `state` for `restored_search`; floats as they are, or as float64."""
    held = (*state.hypotheses, state.empty)
    found = {
        "counts": torch.tensor([*astuple(state.counts), state.first_frame]),
        "lengths": torch.tensor([len(h.tokens) for h in held]),
        "tokens": torch.tensor([t for h in held for t in h.tokens], dtype=torch.int64),
        "frames": torch.tensor([f for h in held for f in h.frames], dtype=torch.int64),
        "confidences": torch.tensor([c for h in held for c in h.confidences], dtype=torch.float64),
        "scores": torch.tensor([(h.score, h.extra) for h in held], dtype=torch.float64),
        "outputs": torch.stack([h.output for h in held]),
    }
    for at, parts in enumerate(zip(*(h.predictor.parts for h in held), strict=True)):
        found[f"{_PREDICTOR}{at}"] = torch.cat(parts)
    return found


def restored_search(
    tensors: dict[str, Tensor], scorer: Scorer | None, device: torch.device
) -> SearchState:
    """The state that `search_tensors` was given; scorer: the one that it was searched with."""
    *counts, first_frame = tensors["counts"].tolist()
    ends = tensors["lengths"].cumsum(0).tolist()
    parts = [tensors[name].to(device) for name in sorted(tensors) if name.startswith(_PREDICTOR)]
    outputs = tensors["outputs"].to(device)
    held = []
    for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        tokens, frames, confidences = (
            tuple(tensors[name][start:end].tolist()) for name in ("tokens", "frames", "confidences")
        )
        score, extra = tensors["scores"][row].tolist()
        predictor = PredictorState(tuple(part[row : row + 1].clone() for part in parts))
        after = _read_again(scorer, tokens)
        output = outputs[row].clone()
        held.append(
            OpenHypothesis(tokens, frames, confidences, score, extra, after, output, predictor)
        )
    return SearchState(tuple(held[:-1]), SearchCounts(*counts), first_frame, held[-1])


def _read_again(scorer: Scorer | None, tokens: Sequence[int]) -> Any:
    if scorer is None:
        return None
    state = scorer.start()
    for token in tokens:
        state, _ = scorer.extend(state, token)
    return state
