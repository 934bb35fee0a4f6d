"""One stream of speech through a transducer: samples in, text as it comes out.

Features are made, gated and encoded frame by frame of the tower, however the samples come, so
their cutting changes nothing. Where nobody speaks a gate shuts: the encoder rests, and starts
anew with the next words. All that ran is counted, and a stream can be kept and go on elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as bytes_of
from torch import Tensor

from offramp.audio.features import log_mel
from offramp.audio.io import SAMPLE_RATE
from offramp.audio.resampler import Resampler
from offramp.decoding.ctc import Hypothesis, geometric_mean, words
from offramp.decoding.endpoint import read_utterances
from offramp.decoding.search_snapshot import restored_search, search_tensors
from offramp.decoding.stream_plan import StreamPlan
from offramp.energy.trace import StreamTrace
from offramp.energy.transducer_cost import encoder_call
from offramp.errors import AudioError, InputError
from offramp.nn.stream_state import StreamState
from offramp.stream_events import Endpoint, Event, Final, Partial

Samples = Tensor | np.ndarray
Block = Samples | tuple[Samples, int]  # with its rate in Hz

_LOUDEST = 1e6  # beyond it samples are not on a scale of 1, and their power nears float32's end


class Stream:
    """One stream: `push` samples as they come, then `finish`; or `read` an iterator of blocks.

    Its memory does not grow with the stream, save by the tokens of an utterance that no endpoint
    ends. seconds: processing time so far.
    """

    def __init__(self, plan: StreamPlan, sample_rate: int) -> None:
        self._plan = plan
        self._resampler = Resampler(sample_rate)
        self._gate = plan.gate()
        self._search = plan.search.start(plan.model.device)
        self._encoding: StreamState | None = None  # None: the gate is shut
        self._samples = torch.zeros(0)  # at 16 kHz, which coming frames need
        self._received = 0  # samples, at the stream's own rate
        self._blocks = 0  # frames of the tower that the gate was asked about
        self._shift = 0  # number of a frame in the recording, less its number in the search
        self._chunks = self._passed = self._tokens = 0  # passed: feature frames
        self._ended = False
        self._shown = ""  # the last partial text
        self.seconds = 0.0

    # -- in and out --------------------------------------------------------------------------

    def read(self, blocks: Iterable[Block]) -> Iterator[Event]:
        """Push every block and finish. If something breaks, what was said so far comes first."""
        try:
            for block in blocks:
                samples, rate = block if isinstance(block, tuple) else (block, None)
                yield from self.push(samples, rate)
        except (Exception, KeyboardInterrupt):
            yield from self.finish()
            raise
        yield from self.finish()

    def push(self, samples: Samples, sample_rate: int | None = None) -> list[Event]:
        """samples [n], mono, float on a scale of 1 or int16 -> what they bring about.

        sample_rate: of these samples; None: the stream's, which it must equal. AudioError: another
        rate, or samples that are not finite; the stream stays as it was.
        """
        if self._ended:
            raise InputError("the stream has ended; open another")
        samples = self._checked(samples, sample_rate)
        began, found = time.perf_counter(), list[Event]()
        # A resampler's delay is told by what came in before an event, so by pieces of 10 ms.
        resampled = self._resampler.rate != SAMPLE_RATE
        size = self._resampler.rate // 100 if resampled else max(1, len(samples))
        for piece in torch.split(samples, size):
            self._received += len(piece)
            found += self._hear(self._resampler.push(piece))
        self.seconds += time.perf_counter() - began
        return found

    def finish(self) -> list[Event]:
        """No more samples come: what still waits is heard. Nothing, if that was said before."""
        if self._ended:
            return []
        self._ended, began = True, time.perf_counter()
        found = self._hear(self._resampler.finish())
        rest = log_mel(self._samples, self._plan.features)
        if len(rest):
            found += self._block(rest, began)
        if self._encoding is not None:
            found += self._end_span(began, None)
        self.seconds += time.perf_counter() - began
        return found

    @property
    def audio_s(self) -> float:
        """Seconds of audio that came in."""
        return self._received / self._resampler.rate

    @property
    def trace(self) -> StreamTrace:
        """What ran so far."""
        plan, counts = self._plan, self._search.counts
        cost = encoder_call(plan.model.config, plan.chunking)
        per_value = self._chunks * plan.model.dtype.itemsize
        best = plan.search.best(self._search)
        return StreamTrace(
            audio_s=self.audio_s,
            enc_chunks=self._chunks,
            enc_frames=counts.frames,
            right_ctx_frames=self._chunks * plan.chunking.right_context,
            joiner_calls=counts.joiner_calls,
            joiner_positions=counts.joiner_positions,
            joiner_blank_only=counts.joiner_blank_only,
            blank_only_positions=counts.blank_only_positions,
            predictor_calls=counts.predictor_calls,
            predictor_positions=counts.predictor_positions,
            tokens=self._tokens + (len(best[0].tokens) if best else 0),
            kv_bytes_read=per_value * cost.cache_read,
            kv_bytes_written=per_value * cost.cache_written,
            vad_active_s=self._passed * plan.features.hop / SAMPLE_RATE,
        )

    # -- keeping it --------------------------------------------------------------------------

    def save(self) -> bytes:
        """The whole stream, for `StreamingRecognizer.resume`, at any time before it ends."""
        return bytes_of(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything, for `restore`."""
        if self._ended:
            raise InputError("the stream has ended, so there is nothing to go on with")
        parts = {"resampler": self._resampler.tensors(), "search": search_tensors(self._search)}
        if self._gate is not None:
            parts["gate"] = self._gate.tensors()
        if self._encoding is not None:
            parts["encoder"] = self._encoding.tensors()
        found = {f"{part}.{name}": t for part, ts in parts.items() for name, t in ts.items()}
        own = (self._received, self._blocks, self._shift, self._chunks, self._passed, self._tokens)
        found["samples"], found["counts"] = self._samples.clone(), torch.tensor(own)
        found["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        found["options"] = self._options_tensor()
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on where the stream stood from which `tensors` were taken.

        InputError: they are of another model, or of a stream with other options.
        """
        about = tensors.get("options")
        if about is None or not torch.equal(about, self._options_tensor()):
            raise InputError(
                "the saved stream was opened with other options or for another model; give the same"
            )

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

        device = self._plan.model.device
        self._resampler.restore(part("resampler"))
        self._search = restored_search(part("search"), self._plan.scorer, device)
        if self._gate is not None:
            self._gate.restore(part("gate"))
        self._encoding = None
        if encoder := part("encoder"):
            self._encoding = self._plan.encoding()
            self._encoding.restore(encoder)
        self._samples = tensors["samples"].clone()
        own = tensors["counts"].tolist()
        self._received, self._blocks, self._shift, self._chunks, self._passed, self._tokens = own
        self.seconds = float(tensors["seconds"])
        self._shown = self._plan.text(self._plan.search.best(self._search))

    def _options_tensor(self) -> Tensor:
        """Options and the shape of the model as bytes, to be compared."""
        about = [asdict(self._plan.options), asdict(self._plan.model.config), self._resampler.rate]
        return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    # -- from samples to frames --------------------------------------------------------------

    def _checked(self, samples: Samples, sample_rate: int | None) -> Tensor:
        at = f"the block at {self.audio_s:.2f} s"
        if sample_rate is not None and sample_rate != self._resampler.rate:
            raise AudioError(
                f"{at} has a sample rate of {sample_rate} Hz, the stream {self._resampler.rate} "
                "Hz; open another stream for it"
            )
        if isinstance(samples, np.ndarray):
            samples = torch.as_tensor(samples.copy())  # it may be read-only, and it is the caller's
        if samples.dtype == torch.int16:
            samples = samples / 32768.0
        if samples.ndim != 1 or not samples.is_floating_point():
            raise AudioError(
                f"{at} is {samples.dtype} {list(samples.shape)}; push mono samples [n], float on a "
                "scale of 1 or int16"
            )
        samples = samples.detach().to("cpu", torch.float32)
        if len(samples) and not samples.abs().max() <= _LOUDEST:  # so written, it is true of NaN
            raise AudioError(
                f"{at} has samples that are NaN, infinite or beyond {_LOUDEST:g}; push finite "
                "samples in [-1, 1]"
            )
        return samples

    def _hear(self, samples: Tensor) -> list[Event]:
        """Samples at 16 kHz: one frame of the tower after the other, as they are complete."""
        features, found = self._plan.features, list[Event]()
        block = self._plan.model.config.time_reduction
        step, needed = block * features.hop, (block - 1) * features.hop + features.window
        self._samples = torch.cat((self._samples, samples))
        while len(self._samples) >= needed:
            began, window = time.perf_counter(), self._samples[:needed]
            self._samples = self._samples[step:]
            found += self._block(log_mel(window, features), began)
        self._samples = self._samples.clone()  # a view would keep the whole alive
        return found

    def _block(self, features: Tensor, began: float) -> list[Event]:
        """The features of one frame of the tower, or fewer at the very end."""
        self._blocks += 1
        passed = features if self._gate is None else self._gate.push(features)
        if passed is None:
            return [] if self._encoding is None else self._end_span(began, "silence")
        if self._encoding is None:
            self._encoding = self._plan.encoding()
            block = self._plan.model.config.time_reduction
            self._shift = self._blocks - -(-len(passed) // block) - self._search.counts.frames
        self._passed += len(passed)
        before, device = self._encoding.chunks, self._plan.model.device
        encoded, _ = self._plan.model.encoder.push(passed[None].to(device), self._encoding)
        self._chunks += self._encoding.chunks - before
        return self._read(encoded[0], began)

    def _end_span(self, began: float, rule: str | None) -> list[Event]:
        """The gate shuts, or the stream ends (rule None): what waits is heard, and that is all."""
        assert self._encoding is not None
        before = self._encoding.chunks
        encoded, _ = self._plan.model.encoder.finish(self._encoding)
        self._chunks += self._encoding.chunks - before
        self._encoding = None
        found = [e for e in self._read(encoded[0], began) if not isinstance(e, Partial)]
        best, end = self._plan.search.best(self._search), self._search.counts.frames
        self._search = self._plan.search.restart(self._search)
        return found + self._closed(best, end, rule, began)

    # -- from frames to events ---------------------------------------------------------------

    def _read(self, encoded: Tensor, began: float) -> list[Event]:
        """encoded [t, J]: t may be 0."""
        if not len(encoded):
            return []
        plan, frame_s = self._plan, self._plan.frame_s
        self._search, ended = read_utterances(
            plan.search, self._search, encoded, frame_s, plan.endpoint
        )
        found = list[Event]()
        for u in ended:
            found += self._closed(u.hypotheses, u.end_frame, u.rule, began)
        best = plan.search.best(self._search)
        said = plan.text(best)
        if said and said != self._shown:
            found.append(Partial(**self._said(best[0], began)))
        self._shown = said
        return found

    def _closed(
        self, hypotheses: Sequence[Hypothesis], end_frame: int, rule: str | None, began: float
    ) -> list[Event]:
        """Of an utterance without words nothing is told."""
        self._shown = ""
        if not hypotheses:
            return []
        self._tokens += len(hypotheses[0].tokens)
        if not self._plan.text(hypotheses):
            return []
        found: list[Event] = [Final(**self._said(hypotheses[0], began))]
        if rule is not None:
            at_s = (end_frame + self._shift) * self._plan.frame_s
            found.append(Endpoint(rule, at_s, self._latency_ms(at_s, began)))
        return found

    def _said(self, h: Hypothesis, began: float) -> dict[str, Any]:
        """The fields of `Partial` and `Final`."""
        moved = replace(h, frames=tuple(frame + self._shift for frame in h.frames))
        spoken = tuple(words(moved, self._plan.pieces, self._plan.frame_s, self._needed_s()))
        return {
            "text": " ".join(word.text for word in spoken),
            "words": spoken,
            "confidence": geometric_mean([word.confidence for word in spoken]),
            "start_s": spoken[0].start_s,
            "end_s": spoken[-1].end_s,
            "latency_ms": self._latency_ms(spoken[-1].end_s, began),
        }

    def _needed_s(self) -> float:
        """Audio that had to come in for the frames heard so far."""
        if self._ended or self._resampler.rate != SAMPLE_RATE:
            return self.audio_s
        features = self._plan.features
        hops = self._blocks * self._plan.model.config.time_reduction - 1
        return (hops * features.hop + features.window) / SAMPLE_RATE

    def _latency_ms(self, since_s: float, began: float) -> float:
        return 1000 * (self._needed_s() - since_s + time.perf_counter() - began)
