"""CTC output to text: the greedy path, where each token was emitted, and words with their times.

A CTC head (Graves et al., 2006) writes one distribution per frame; runs of one token count once
and blanks vanish. A token's frame is the first of its run on the best path, so times come for
free; `align` finds that path for any text. Confidences are posteriors, not calibrated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.errors import InputError
from offramp.results import Word


@dataclass(frozen=True)
class Hypothesis:
    """What one utterance was decoded to.

    frames: the frame at which each token was emitted, strictly increasing. score: natural log;
    of the best path if decoded greedily, of all paths (and language model) if by beam search.
    confidences: per token, its largest posterior from its own frame to the next token's.
    """

    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    score: float
    confidences: tuple[float, ...]


def greedy(log_probs: Tensor, lengths: Tensor, blank_id: int = 0) -> list[Hypothesis]:
    """The most probable token of each frame, runs merged, blanks dropped; one result per row.

    log_probs: [B, T, V], log-softmax. lengths: int64 [B], true frames; what stands beyond them
    has no effect.
    """
    B, T, _ = log_probs.shape
    assert lengths.shape == (B,), "one length per row"
    if T == 0:
        return [Hypothesis((), (), 0.0, ()) for _ in range(B)]
    time = torch.arange(T, device=log_probs.device)
    valid = time < lengths.to(log_probs.device)[:, None]
    best, ids = log_probs.max(dim=-1)
    ids = ids.masked_fill(~valid, blank_id)
    scores = best.masked_fill(~valid, 0.0).sum(dim=1)
    before = torch.cat((torch.full_like(ids[:, :1], blank_id), ids[:, :-1]), dim=1)
    emits = (ids != blank_id) & (ids != before)
    rows, frames = emits.nonzero(as_tuple=True)
    peaks = _peaks(log_probs, ids, emits, valid)
    # One transfer each, then plain Python.
    tokens, at, confidences = ids[rows, frames].tolist(), frames.tolist(), peaks.tolist()
    found, start = [], 0
    for count, score in zip(emits.sum(dim=1).tolist(), scores.tolist(), strict=True):
        own = slice(start, start + count)
        found.append(Hypothesis(tuple(tokens[own]), tuple(at[own]), score, tuple(confidences[own])))
        start += count
    return found


def _peaks(log_probs: Tensor, ids: Tensor, emits: Tensor, valid: Tensor) -> Tensor:
    """Largest posterior of each emitted token up to the next emission, row by row: [sum of U]."""
    number = emits.flatten().cumsum(0).view_as(ids) - 1  # of the newest token, over all rows
    time = torch.arange(ids.shape[1], device=ids.device)
    newest = torch.where(emits, time, -1).cummax(dim=1).values
    belongs = valid & (newest >= 0)
    token = ids.gather(1, newest.clamp(min=0))
    posterior = log_probs.gather(2, token[..., None])[..., 0].exp()
    peaks = posterior.new_zeros(int(emits.sum()))
    return peaks.scatter_reduce(0, number[belongs], posterior[belongs], "amax").clamp(max=1.0)


def align(log_probs: Tensor, tokens: Sequence[int], blank_id: int = 0) -> tuple[int, ...]:
    """The frame that emits each of `tokens` on the most probable path that writes them.

    log_probs: [T, V] of one utterance, without padding. InputError: no path of T frames writes
    the tokens.
    """
    if not tokens:
        return ()
    grid = log_probs.detach().cpu().double().numpy()
    states = np.full(2 * len(tokens) + 1, blank_id)  # blank, token, blank, ..., token, blank
    states[1::2] = tokens
    may_skip = np.zeros(len(states), bool)  # a blank between two different tokens is optional
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    came_from = np.zeros((len(grid), len(states)), np.int8)  # how many states further left
    score = np.full(len(states), -np.inf)
    for t, row in enumerate(grid):
        options = np.full((3, len(states)), -np.inf)
        if t == 0:
            options[0, :2] = 0.0
        else:
            options[0] = score
            options[1, 1:] = score[:-1]
            options[2, 2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        came_from[t] = options.argmax(axis=0)
        score = options.max(axis=0) + row[states]
    at = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    if not len(grid) or score[at] == -np.inf:
        repeats = sum(a == b for a, b in itertools.pairwise(tokens))
        raise InputError(
            f"{len(tokens)} tokens do not fit {len(grid)} frames; they need at least "
            f"{len(tokens) + repeats} frames, and tokens that the model can write"
        )
    frames = [0] * len(tokens)
    for t in range(len(grid) - 1, -1, -1):
        if at % 2:
            frames[at // 2] = t  # the last one written is the first of the run
        at -= int(came_from[t, at])
    return tuple(frames)


def aligned(
    log_probs: Tensor, tokens: Sequence[int], score: float, blank_id: int = 0
) -> Hypothesis:
    """`tokens` with the frames of their best path and their confidences; log_probs: [T, V]."""
    frames = align(log_probs, tokens, blank_id)
    ends = (*frames, log_probs.shape[0])[1:]
    peaks = [
        float(log_probs[start:end, token].max())
        for token, start, end in zip(tokens, frames, ends, strict=True)
    ]
    return Hypothesis(tuple(tokens), frames, score, tuple(min(1.0, math.exp(p)) for p in peaks))


def piece_text(piece: str) -> str:
    """What a tokenizer's piece writes: SentencePiece marks a leading space as U+2581."""
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def text(tokens: Sequence[int], pieces: Sequence[str]) -> str:
    """The text of `tokens` with single spaces; pieces: what each token id writes."""
    return " ".join("".join(piece_text(pieces[t]) for t in tokens).split())


def words(
    hypothesis: Hypothesis,
    pieces: Sequence[str],
    frame_s: float,
    duration_s: float = math.inf,
) -> list[Word]:
    """Group tokens into words at the spaces in their pieces.

    pieces: what each token id writes (" the", "th", or single characters and " "). frame_s:
    seconds per output frame. duration_s: no time lies beyond it; the last frame may, since it
    stands for more samples than are left.
    """
    spelled: list[tuple[str, list[int]]] = [("", [])]
    for i, token in enumerate(hypothesis.tokens):
        for nth, part in enumerate(piece_text(pieces[token]).split(" ")):
            if nth:
                spelled.append(("", []))
            if part:
                spelled[-1] = (spelled[-1][0] + part, [*spelled[-1][1], i])
    found: list[Word] = []
    for spelling, members in spelled:
        if not spelling:
            continue
        frames = [hypothesis.frames[i] for i in members]
        # A token with a space inside it belongs to two words; its frame counts to the first.
        earliest = found[-1].end_s if found else 0.0
        start_s = max(earliest, min(frames[0] * frame_s, duration_s))
        end_s = max(start_s, min((frames[-1] + 1) * frame_s, duration_s))
        confidence = geometric_mean([hypothesis.confidences[i] for i in members])
        found.append(Word(spelling, start_s, end_s, confidence))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of confidences in [0, 1], at least one; 0 where one of them is."""
    if min(values) <= 0.0:
        return 0.0
    return min(1.0, math.exp(sum(map(math.log, values)) / len(values)))
