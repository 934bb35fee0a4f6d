"""What a stream of speech is opened with: a model, what its tokens write, and options.

The same plan reads a whole recording at once, which is how a stream is checked: both write the
same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from offramp.audio.features import FeatureConfig, log_mel
from offramp.audio.gate import GateOptions, SpeechGate
from offramp.audio.io import SAMPLE_RATE
from offramp.config import Chunking, check_counts, check_positive
from offramp.decoding.ctc import Hypothesis, text
from offramp.decoding.endpoint import EndpointOptions, read_utterances
from offramp.decoding.lm import WordScorer, hotword_spelling
from offramp.decoding.transducer import TransducerOptions, TransducerSearch
from offramp.errors import CheckpointError, InputError
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer
from offramp.nn.stream_state import StreamState

_FRAME_PER_TOKEN_S = 0.04  # 25 tokens a second: nobody speaks nearly as many
_NO_ENDPOINTS = EndpointOptions(None, None, None)


@dataclass(frozen=True)
class StreamOptions:
    """chunk_ms: audio that is heard at once; None: the model's. beam_size None: greedy search.

    hotwords: phrases to expect. blank_skip: where the blank's own scorer gives it this
    probability, the labels are not scored (a model with a factorised blank only); None: the
    model's. endpoint: when an utterance ends; None: with the stream. gate: where the encoder
    rests; a gate that shuts ends the utterance. None: nowhere.

    max_symbols: tokens that a frame may have in greedy search; None: one for every 40 ms of it. In
    a beam it is 1. n_best: texts of a beam that a final event has at most, the best one included.
    """

    chunk_ms: float | None = None
    beam_size: int | None = None
    hotwords: tuple[str, ...] = ()
    blank_skip: float | None = None
    endpoint: EndpointOptions | None = field(default_factory=EndpointOptions)
    gate: GateOptions | None = field(default_factory=GateOptions)
    max_symbols: int | None = None
    n_best: int = 1

    def __post_init__(self) -> None:
        if self.chunk_ms is not None:
            check_positive(chunk_ms=self.chunk_ms)
        if self.max_symbols is not None:
            check_counts(1, max_symbols=self.max_symbols)
        if isinstance(self.hotwords, str) or not all(isinstance(h, str) for h in self.hotwords):
            raise InputError(
                f"hotwords are {self.hotwords!r}; give a tuple of phrases, such as ('obeyed',)"
            )
        self.search_options(_FRAME_PER_TOKEN_S)  # its faults show here

    def search_options(self, frame_s: float) -> TransducerOptions:
        """frame_s: seconds per frame of the tower."""
        most = self.max_symbols
        if most is None:
            most = max(1, round(frame_s / _FRAME_PER_TOKEN_S)) if self.beam_size is None else 1
        return TransducerOptions(
            self.beam_size, n_best=self.n_best, max_symbols=most, blank_skip=self.blank_skip
        )


class StreamPlan:
    """A model, what each token id of it writes, and what options mean for them.

    frame_s: seconds from one frame of the tower to the next. model_id: gives the `fingerprint` of
    the model, by which a saved stream knows it; None: it is computed. InputError: options that this
    model cannot meet.
    """

    def __init__(
        self,
        model: Transducer,
        pieces: Sequence[str],
        options: StreamOptions,
        model_id: Callable[[], str] | None = None,
    ) -> None:
        config = model.config
        self._model_id = model_id
        self.model, self.pieces, self.options = model, tuple(pieces), options
        self.features = FeatureConfig(num_mels=config.num_mels)
        self.frame_s = config.time_reduction * self.features.hop / SAMPLE_RATE
        self.chunking = _chunking(config.chunking, self.frame_s, options.chunk_ms)
        self.endpoint = options.endpoint or _NO_ENDPOINTS
        if options.blank_skip is not None and not config.factorised_blank:
            raise InputError(
                f"blank_skip is {options.blank_skip}, and this model scores the blank among the "
                "labels; leave it out, or choose a model with a factorised blank"
            )
        self.scorer = None
        if options.hotwords:
            spelled = [hotword_spelling(phrase, pieces) for phrase in options.hotwords]
            self.scorer = WordScorer(pieces, hotwords=spelled)
        search = options.search_options(self.frame_s)
        if search.blank_skip is None:
            search = replace(search, blank_skip=config.blank_skip)
        self.search = TransducerSearch(
            model.predictor, model.joiner, config.blank_id, search, self.scorer
        )

    @cached_property
    def identity(self) -> str:
        """sha256 of the model and of what its tokens write: a saved stream goes on with these."""
        model = fingerprint(self.model) if self._model_id is None else self._model_id()
        return hashlib.sha256(json.dumps([model, self.pieces]).encode()).hexdigest()

    def gate(self) -> SpeechGate | None:
        """A new one; None: all passes."""
        if self.options.gate is None:
            return None
        return SpeechGate(self.options.gate, self.features, self.model.config.time_reduction)

    def encoding(self) -> StreamState:
        """A new one."""
        model = self.model
        return StreamState(model.config, self.chunking, 1, model.device, model.dtype)

    def text(self, hypotheses: Sequence[Hypothesis]) -> str:
        """Of the best one; "" where there is none."""
        return text(hypotheses[0].tokens, self.pieces) if hypotheses else ""

    def check_encoded(self, encoded: Tensor) -> None:
        """CheckpointError: what the encoder made of finite features is not finite."""
        if not bool(encoded.isfinite().all()):
            raise CheckpointError(
                "the encoder's output is not finite: its weights are damaged, or too large for "
                f"{self.model.dtype}; fetch the checkpoint anew, or choose another"
            )

    @torch.no_grad()
    def read_whole(self, samples: Tensor) -> str:
        """The text of samples [N] at 16 kHz, heard at once: what a stream of them writes."""
        state, found = self.search.start(self.model.device), []
        for span in self._spans(log_mel(samples, self.features)):
            features, length = span[None].to(self.model.device), torch.tensor([len(span)])
            encoded, _ = self.model.encoder(features, length, self.chunking)
            self.check_encoded(encoded)
            state, ended = read_utterances(
                self.search, state, encoded[0], self.frame_s, self.endpoint
            )
            found += [self.text(u.hypotheses) for u in ended]
            found.append(self.text(self.search.best(state)))
            state = self.search.restart(state)
        return " ".join(said for said in found if said)

    def _spans(self, features: Tensor) -> Iterator[Tensor]:
        """What the gate lets through each time that it opens, [T, F]."""
        gate, span = self.gate(), list[Tensor]()
        if not len(features):
            return  # to split nothing would give a block of nothing
        for block in torch.split(features, self.model.config.time_reduction):
            passed = block if gate is None else gate.push(block)
            if passed is not None:
                span.append(passed)
            elif span:
                yield torch.cat(span)
                span = []
        if span:
            yield torch.cat(span)


def _chunking(chunking: Chunking, frame_s: float, chunk_ms: float | None) -> Chunking:
    if chunk_ms is None:
        return chunking
    frame_ms = 1000 * frame_s
    frames = round(chunk_ms / frame_ms)
    if frames < 1 or abs(frames * frame_ms - chunk_ms) > 1e-6:
        raise InputError(
            f"chunk_ms is {chunk_ms:g}; this model hears whole frames of {frame_ms:g} ms: give a "
            f"multiple, such as {max(1, frames) * frame_ms:g}"
        )
    return replace(chunking, chunk=frames)
