"""Toy predictors and joiners for transducer search; a wrapper that counts what they are asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.nn.predictors import PredictorState

J, V, BLANK = 6, 5, 2


class ToyPredictor:
    """A recurrent one: its output depends on all tokens so far, in float64."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(8, J, generator=g, dtype=torch.float64)
        self.recurrent = torch.randn(J, J, generator=g, dtype=torch.float64) / J**0.5

    def initial_state(self, batch_size: int) -> PredictorState:
        return PredictorState((torch.zeros(batch_size, J, dtype=torch.float64),))

    def step(self, tokens: Tensor, state: PredictorState) -> tuple[Tensor, PredictorState]:
        h = (state.parts[0] @ self.recurrent + self.embedding[tokens]).tanh()
        return h.flip(-1), PredictorState((h,))

    def after(self, tokens: tuple[int, ...]) -> Tensor:
        """Its output [J] after the blank and `tokens`, from the very beginning."""
        state = self.initial_state(1)
        for token in (BLANK, *tokens):
            output, state = self.step(torch.tensor([token]), state)
        return output[0]


class ToyJoiner:
    """tanh of the sum, then a matrix; the blank is scored apart, p = sigmoid(blank_logit)."""

    def __init__(self, seed: int = 0, blank_bias: float = 0.0) -> None:
        g = torch.Generator().manual_seed(100 + seed)
        self.weight = 2.0 * torch.randn(J, V, generator=g, dtype=torch.float64)
        self.blank_bias = blank_bias

    def blank_logit(self, enc: Tensor, pred: Tensor) -> Tensor:
        return (enc + pred).tanh() @ self.weight[:, BLANK] + self.blank_bias

    def log_probs(self, enc: Tensor, pred: Tensor, blank_logit: Tensor | None = None) -> Tensor:
        blank = self.blank_logit(enc, pred) if blank_logit is None else blank_logit
        logits = (enc + pred).tanh() @ self.weight
        logits[..., BLANK] = -torch.inf
        log_probs = logits.log_softmax(-1) + F.logsigmoid(-blank)[..., None]
        log_probs[..., BLANK] = F.logsigmoid(blank)
        return log_probs


class TableJoiner:
    """The encoder's output already is log probabilities [V]; the predictor has no say."""

    def log_probs(self, enc: Tensor, pred: Tensor, blank_logit: Tensor | None = None) -> Tensor:
        return enc

    def blank_logit(self, enc: Tensor, pred: Tensor) -> Tensor:
        raise AssertionError("nobody asked to skip blanks")


class Counted:
    """Both parts in one; remembers how many rows each call had. steps also keeps the tokens."""

    def __init__(self, predictor: ToyPredictor, joiner: ToyJoiner | TableJoiner) -> None:
        self.predictor, self.joiner = predictor, joiner
        self.steps: list[list[int]] = []
        self.joins: list[int] = []
        self.blanks: list[int] = []

    def initial_state(self, batch_size: int) -> PredictorState:
        return self.predictor.initial_state(batch_size)

    def step(self, tokens: Tensor, state: PredictorState) -> tuple[Tensor, PredictorState]:
        self.steps.append(tokens.tolist())
        return self.predictor.step(tokens, state)

    def log_probs(self, enc: Tensor, pred: Tensor, blank_logit: Tensor | None = None) -> Tensor:
        self.joins.append(len(enc))
        return self.joiner.log_probs(enc, pred, blank_logit)

    def blank_logit(self, enc: Tensor, pred: Tensor) -> Tensor:
        self.blanks.append(len(enc))
        return self.joiner.blank_logit(enc, pred)


def encoded(T: int, seed: int = 0) -> Tensor:
    """An encoder's output [T, J]."""
    g = torch.Generator().manual_seed(1000 + seed)
    return 1.5 * torch.randn(T, J, generator=g, dtype=torch.float64)
