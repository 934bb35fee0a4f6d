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
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
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
from offramp.errors import AudioError, CheckpointError, InputError
from offramp.models.fingerprint import tensors_sha256
from offramp.nn.stream_state import StreamState
from offramp.stream_events import Alternative, Endpoint, Event, Final, Partial

Samples = Tensor | np.ndarray
Block = Samples | tuple[Samples, int]  # with its rate in Hz

_DIGEST = "digest"  # name of what tells a saved stream that was damaged
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
        self._found: list[Event] = []  # not given out yet
        self.seconds = 0.0

    # -- in and out --------------------------------------------------------------------------

    def read(self, blocks: Iterable[Block]) -> Iterator[Event]:
        """Push every block and finish. If something breaks, what was said so far comes first.

        If it breaks where the events go, `finish` gives all that was not given out.
        """
        try:
            for block in blocks:
                samples, rate = block if isinstance(block, tuple) else (block, None)
                self._take_in(samples, rate)
                yield from self._one_by_one()
            self._end()
            yield from self._one_by_one()
        except (Exception, KeyboardInterrupt):
            self._end()
            yield from self._one_by_one()
            raise

    def push(self, samples: Samples, sample_rate: int | None = None) -> list[Event]:
        """samples [n], mono, float on a scale of 1 or int16 -> what they bring about.

        sample_rate: of these samples; None: the stream's, which it must equal. AudioError: another
        rate, or samples that are not finite; the stream stays as it was. CheckpointError: weights
        that give no finite numbers; the stream has ended, and `finish` gives what was said.
        """
        self._take_in(samples, sample_rate)
        return list(self._one_by_one())

    def finish(self) -> list[Event]:
        """No more samples come: what still waits is heard. Nothing, if that was said before."""
        self._end()
        return list(self._one_by_one())

    def _take_in(self, samples: Samples, sample_rate: int | None) -> None:
        if self._ended:
            raise InputError("the stream has ended; open another")
        samples = self._checked(samples, sample_rate)
        began = time.perf_counter()
        # A resampler's delay is told by what came in before an event, so by pieces of 10 ms.
        resampled = self._resampler.rate != SAMPLE_RATE
        size = self._resampler.rate // 100 if resampled else max(1, len(samples))
        for piece in torch.split(samples, size):
            self._received += len(piece)
            self._hear(self._resampler.push(piece))
        self.seconds += time.perf_counter() - began

    def _end(self) -> None:
        if self._ended:
            return
        self._ended, began = True, time.perf_counter()
        self._hear(self._resampler.finish())
        rest = log_mel(self._samples, self._plan.features)
        if len(rest):
            self._found += self._block(rest, began)
        if self._encoding is not None:
            self._found += self._end_span(began, None)
        self.seconds += time.perf_counter() - began

    def _one_by_one(self) -> Iterator[Event]:
        """What was found. Where a call breaks, the next one gives out what is left."""
        while self._found:
            yield self._found.pop(0)

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
        tensors = self.tensors()
        return bytes_of(tensors | {_DIGEST: _digest(tensors)})

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
        """Options and what tells the model, as bytes, to be compared."""
        about = [asdict(self._plan.options), self._plan.identity, self._resampler.rate]
        return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    # -- from samples to frames --------------------------------------------------------------

    def _checked(self, samples: Samples, sample_rate: int | None) -> Tensor:
        at = f"the block at {self.audio_s:.2f} s"
        if sample_rate is not None and sample_rate != self._resampler.rate:
            raise AudioError(
                f"{at} has a sample rate of {sample_rate} Hz, the stream {self._resampler.rate} "
                "Hz; open another stream for it"
            )
        if isinstance(samples, np.ndarray) and _is_plain(samples.dtype):
            native = samples.astype(samples.dtype.newbyteorder("="))  # a copy: it is the caller's
            samples = torch.as_tensor(native)
        if not isinstance(samples, Tensor):
            kind = getattr(samples, "dtype", type(samples).__name__)
            raise AudioError(
                f"{at} is {kind}; push a tensor or an array of mono samples [n], float on a scale "
                "of 1 or int16"
            )
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

    def _hear(self, samples: Tensor) -> None:
        """Samples at 16 kHz: one frame of the tower after the other, as they are complete."""
        features = self._plan.features
        block = self._plan.model.config.time_reduction
        step, needed = block * features.hop, (block - 1) * features.hop + features.window
        self._samples = torch.cat((self._samples, samples))
        while len(self._samples) >= needed:
            began, window = time.perf_counter(), self._samples[:needed]
            self._samples = self._samples[step:]
            self._found += self._block(log_mel(window, features), began)
        self._samples = self._samples.clone()  # a view would keep the whole alive

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
        found = [e for e in self._read(encoded[0], began) if not isinstance(e, Partial)]
        return found + self._end_utterance(began, rule)

    def _end_utterance(self, began: float, rule: str | None) -> list[Event]:
        self._encoding = None
        best, end = self._plan.search.best(self._search), self._search.counts.frames
        self._search = self._plan.search.restart(self._search)
        return self._closed(best, end, rule, began)

    # -- from frames to events ---------------------------------------------------------------

    def _read(self, encoded: Tensor, began: float) -> list[Event]:
        """encoded [t, J]: t may be 0."""
        if not len(encoded):
            return []
        plan, frame_s = self._plan, self._plan.frame_s
        try:
            plan.check_encoded(encoded)
        except CheckpointError:
            self._found += self._end_utterance(began, None)
            self._ended = True
            raise
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
        said, others = self._said(hypotheses[0], began), self._alternatives(hypotheses)
        found: list[Event] = [Final(**said, alternatives=others)]
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

    def _alternatives(self, hypotheses: Sequence[Hypothesis]) -> tuple[Alternative, ...]:
        """Each text once: different tokens may write the same."""
        texts: dict[str, float] = {}
        for h in hypotheses:
            texts.setdefault(self._plan.text([h]), h.score - hypotheses[0].score)
        (_, *others) = texts.items()
        return tuple(Alternative(text, score) for text, score in others)

    def _needed_s(self) -> float:
        """Audio that had to come in for the frames heard so far."""
        if self._ended or self._resampler.rate != SAMPLE_RATE:
            return self.audio_s
        features = self._plan.features
        hops = self._blocks * self._plan.model.config.time_reduction - 1
        return (hops * features.hop + features.window) / SAMPLE_RATE

    def _latency_ms(self, since_s: float, began: float) -> float:
        return 1000 * (self._needed_s() - since_s + time.perf_counter() - began)


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether torch has it, but for the order of its bytes."""
    return dtype.kind in "fiu" and dtype.itemsize <= 8


def saved_tensors(saved: bytes) -> dict[str, Tensor]:
    """What `Stream.save` kept, for `Stream.restore`. InputError: it is damaged."""
    try:
        tensors = tensors_of(saved)
    except (SafetensorError, TypeError) as error:
        raise InputError(
            f"the saved stream cannot be read ({error}); give what Stream.save returned"
        ) from error
    digest = tensors.pop(_DIGEST, None)
    if digest is None or not torch.equal(digest, _digest(tensors)):
        raise InputError("the saved stream is damaged; give what Stream.save returned")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    """uint8 [32]."""
    digest = tensors_sha256(dict(sorted(tensors.items())))
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
