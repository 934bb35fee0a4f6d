"""Predictors of a transducer: from the tokens so far to what the joiner adds to the encoder.

An LSTM with layer norm that remembers all tokens, or one without a state of its own that reads
the last few (arXiv 2002.03130). Both start from the blank, take a step per token, and give in
one call over known tokens what their steps give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import TransducerConfig
from offramp.nn.conformer import Dropout

_GROUP = 4  # channels of the stateless predictor that are convolved together


@dataclass(frozen=True)
class PredictorState:
    """What a predictor remembers of B hypotheses: tensors whose first dimension is B."""

    parts: tuple[Tensor, ...]

    def select(self, rows: Tensor | Sequence[int]) -> PredictorState:
        """The hypotheses `rows` [K], in that order; one may come several times."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.parts[0].device)
        return PredictorState(tuple(part.index_select(0, index) for part in self.parts))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class NormLSTM(nn.Module):
    """One LSTM layer with layer norm on its gates and its cell (arXiv 1607.06450)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(size, 4 * size, bias=False)
        self.recurrent = nn.Linear(size, 4 * size, bias=False)
        self.gate_norm = nn.LayerNorm(4 * size)
        self.cell_norm = nn.LayerNorm(size)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, U, P] after hidden and cell [B, P] -> (outputs [B, U, P], both at the end)."""
        outputs = []
        # Rows by unbind: a slice per step would cost a gradient of full size per step.
        for driven in self.inputs(x).unbind(1):
            gates = self.gate_norm(driven + self.recurrent(hidden))
            write, forget, value, read = gates.chunk(4, dim=-1)
            cell = self.cell_norm(forget.sigmoid() * cell + write.sigmoid() * value.tanh())
            hidden = read.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs, dim=1), hidden, cell


class LSTMPredictor(nn.Module):
    """Embedding, norm, `predictor_layers` layers of `NormLSTM`, a matrix, a norm."""

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        P = config.d_predictor
        self.blank_id, self.size = config.blank_id, P
        self.embedding = nn.Embedding(config.vocab_size, P)
        self.input_norm = nn.LayerNorm(P)
        self.layers = nn.ModuleList(NormLSTM(P) for _ in range(config.predictor_layers))
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(P, config.d_joint)
        self.output_norm = nn.LayerNorm(config.d_joint)

    def initial_state(self, batch_size: int) -> PredictorState:
        """Before the first step, which takes the blank."""
        like = self.output_norm.weight  # a norm: compression puts other modules for matrices
        zeros = like.new_zeros(batch_size, len(self.layers), self.size)
        return PredictorState((zeros, zeros))

    def step(self, tokens: Tensor, state: PredictorState) -> tuple[Tensor, PredictorState]:
        """tokens [B], the newest of each hypothesis -> (output [B, J], the state after it)."""
        output, state = self._run(tokens[:, None], state)
        return output[:, 0], state

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, U] -> [B, U + 1, J]: output u follows the blank and u tokens."""
        started = F.pad(tokens, (1, 0), value=self.blank_id)
        return self._run(started, self.initial_state(len(tokens)))[0]

    def _run(self, tokens: Tensor, state: PredictorState) -> tuple[Tensor, PredictorState]:
        x = self.input_norm(self.embedding(tokens))
        after = []
        for layer, hidden, cell in zip(
            self.layers, *(part.unbind(1) for part in state.parts), strict=True
        ):
            x, *ends = layer(x, hidden, cell)
            x = self.dropout(x)
            after.append(ends)
        hidden, cell = (torch.stack(ends, dim=1) for ends in zip(*after, strict=True))
        return self.output_norm(self.output(x)), PredictorState((hidden, cell))


class StatelessPredictor(nn.Module):
    """Embedding, a convolution over the last k tokens, ReLU, a matrix, a norm.

    Its state are the k - 1 tokens before the newest, so equal contexts give equal outputs.
    """

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        P, k = config.d_predictor, config.predictor_context
        self.blank_id, self.context = config.blank_id, k
        self.embedding = nn.Embedding(config.vocab_size, P)
        self.convolution = nn.Conv1d(P, P, k, groups=P // _GROUP, bias=False)
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(P, config.d_joint)
        self.output_norm = nn.LayerNorm(config.d_joint)

    def initial_state(self, batch_size: int) -> PredictorState:
        """Before the first step, which takes the blank."""
        shape, device = (batch_size, self.context - 1), self.output_norm.weight.device
        return PredictorState((torch.full(shape, self.blank_id, device=device),))

    def step(self, tokens: Tensor, state: PredictorState) -> tuple[Tensor, PredictorState]:
        """tokens [B], the newest of each hypothesis -> (output [B, J], the state after it)."""
        window = torch.cat((state.parts[0], tokens[:, None]), dim=1)
        return self._read(window)[:, 0], PredictorState((window[:, 1:],))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, U] -> [B, U + 1, J]: output u follows the blank and u tokens."""
        return self._read(F.pad(tokens, (self.context, 0), value=self.blank_id))

    def _read(self, tokens: Tensor) -> Tensor:
        """tokens [B, k - 1 + n] -> [B, n, J]."""
        x = self.convolution(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        output: Tensor = self.output_norm(self.output(self.dropout(F.relu(x))))
        return output
