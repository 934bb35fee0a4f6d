"""Where an utterance ends in a stream: three rules of silence and length, as Kaldi has them.

Silence means frames in which the search wrote nothing, so no voice detector is needed. Rules
are asked after every frame: chunks come in all sizes, and endpoints must not depend on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offramp.config import check_positive
from offramp.decoding.ctc import Hypothesis
from offramp.decoding.transducer import TransducerSearch
from offramp.decoding.transducer_state import SearchState

EndpointRule = Literal["silence", "trailing_silence", "length"]


@dataclass(frozen=True)
class EndpointOptions:
    """Seconds; None switches a rule off. Defaults are sherpa-onnx's.

    silence_s: of silence at the end, whatever was said before. trailing_silence_s: of silence at
    the end, where something was said. max_utterance_s: of the utterance, in the midst of speech
    too.
    """

    silence_s: float | None = 2.4
    trailing_silence_s: float | None = 1.2
    max_utterance_s: float | None = 20.0

    def __post_init__(self) -> None:
        for name in ("silence_s", "trailing_silence_s", "max_utterance_s"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})

    def reached(self, state: SearchState, frame_s: float) -> EndpointRule | None:
        """The first rule that ends the utterance here, after the frames that `state` has read."""
        silence = state.silent_frames
        if _lasts(silence, frame_s, self.silence_s):
            return "silence"
        if state.hypotheses[0].tokens and _lasts(silence, frame_s, self.trailing_silence_s):
            return "trailing_silence"
        if _lasts(state.utterance_frames, frame_s, self.max_utterance_s):
            return "length"
        return None


def _lasts(frames: int, frame_s: float, least_s: float | None) -> bool:
    """Whether `frames` take at least so long; in whole frames, since 3 * 0.04 > 0.12."""
    return least_s is not None and frames >= math.ceil(least_s / frame_s - 1e-6)


@dataclass(frozen=True)
class Utterance:
    """What was said up to an endpoint: best first, perhaps nothing but empty texts.

    It takes the frames from first_frame on, up to but not including end_frame; these, and those
    of the tokens, count from the start of the stream.
    """

    hypotheses: tuple[Hypothesis, ...]
    first_frame: int
    end_frame: int
    rule: EndpointRule


def read_utterances(
    search: TransducerSearch,
    state: SearchState,
    encoded: Tensor,
    frame_s: float,
    options: EndpointOptions,
    ctc_blank: Tensor | None = None,
) -> tuple[SearchState, list[Utterance]]:
    """Read a chunk of one stream; the search starts anew after each endpoint.

    encoded: [T, J]; ctc_blank: [T], see `TransducerSearch.step`. frame_s: seconds per frame.
    Returns the state after the chunk, and the utterances that ended in it; what the state holds
    of the next one is `search.best(state)`.
    """
    check_positive(frame_s=frame_s)
    found, one = [], torch.ones(1, dtype=torch.long)
    for t in range(len(encoded)):
        blank = None if ctc_blank is None else ctc_blank[None, t : t + 1]
        (state,) = search.step([state], encoded[None, t : t + 1], one, blank)
        rule = options.reached(state, frame_s)
        if rule is not None:
            texts = tuple(search.best(state))
            found.append(Utterance(texts, state.first_frame, state.counts.frames, rule))
            state = search.restart(state)
    return state, found
