"""What a transducer search remembers of one stream: values, which a caller may keep and copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp.nn.predictors import PredictorState


@dataclass
class SearchCounts:
    """What the search of one stream ran, as if no other stream shared its calls.

    A call is one invocation, which reads the weights once; a position is one hypothesis in it.
    frames: read so far; skipped_frames: of these, passed over for the CTC head's blank.
    joiner_calls, joiner_positions: all tokens scored. joiner_blank_only, blank_only_positions:
    only the blank's own scorer ran; where `blank_skip` is set it runs in every joiner call too.
    symbols: tokens written, by hypotheses that stayed in the beam.
    """

    frames: int = 0
    skipped_frames: int = 0
    joiner_calls: int = 0
    joiner_positions: int = 0
    joiner_blank_only: int = 0
    blank_only_positions: int = 0
    predictor_calls: int = 0
    symbols: int = 0

    @property
    def predictor_positions(self) -> int:
        """One for each symbol, and one for the start of the stream."""
        return self.symbols + 1


@dataclass(frozen=True)
class OpenHypothesis:
    """A text on its way. frames, counted from the start of the stream, and confidences are those
    of its tokens, of the likelier alignment wherever two met.

    score: log P(tokens | audio) over all alignments that were kept, in nats. extra: what the
    scorer added, and its state. output [J]: the predictor's, after the last token; predictor:
    its state, one row.
    """

    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    confidences: tuple[float, ...]
    score: float
    extra: float
    scorer_state: Any
    output: Tensor
    predictor: PredictorState


@dataclass(frozen=True)
class SearchState:
    """One stream between two frames. hypotheses: of the present utterance, best first.

    first_frame: where that utterance began. empty: the hypothesis that each utterance starts
    with. Nothing here grows with the stream but the tokens of the utterance.
    """

    hypotheses: tuple[OpenHypothesis, ...]
    counts: SearchCounts
    first_frame: int
    empty: OpenHypothesis

    @property
    def utterance_frames(self) -> int:
        """How many frames of the utterance were read."""
        return self.counts.frames - self.first_frame

    @property
    def silent_frames(self) -> int:
        """Frames since the best hypothesis wrote a token, or all where it wrote none."""
        frames = self.hypotheses[0].frames
        return self.counts.frames - (frames[-1] + 1 if frames else self.first_frame)
