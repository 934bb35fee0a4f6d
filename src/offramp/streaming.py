"""A streaming recogniser: a transducer from its folder, and the streams that it serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.compress.checkpoint import load_model
from offramp.config import TransducerConfig
from offramp.decoding.speech_stream import Block, Stream, saved_tensors
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.errors import InputError
from offramp.models import hub
from offramp.models.fingerprint import fingerprint
from offramp.models.transducer import Transducer
from offramp.nn.device import choose_device
from offramp.stream_events import Event


class StreamingRecognizer:
    """A transducer with its pieces: what each token id writes. Serves any number of streams."""

    def __init__(self, model: Transducer, pieces: Sequence[str]) -> None:
        self.model, self.pieces = model, tuple(pieces)

    @classmethod
    def load(cls, model: str | Path = "stream-tiny", *, device: str = "cpu") -> StreamingRecognizer:
        """A shipped name, a folder or a hub id, compressed or not.

        CheckpointError: no streaming recogniser is there.
        """
        folder = hub.resolve(str(model))
        loaded = load_model(Transducer, folder, choose_device(device))
        config = loaded.config
        return cls(loaded, hub.load_pieces(folder, config.vocab_size, config.blank_id))

    @property
    def config(self) -> TransducerConfig:
        return self.model.config

    def open(self, options: StreamOptions | None = None, sample_rate: int = SAMPLE_RATE) -> Stream:
        """A new stream of samples at `sample_rate`. InputError: options the model cannot meet."""
        return Stream(self._plan(options), sample_rate)

    def resume(self, saved: bytes, options: StreamOptions | None = None) -> Stream:
        """The stream of which `Stream.save` made `saved`, opened with the same options.

        InputError: `saved` is damaged, or of another model or other options.
        """
        tensors = saved_tensors(saved)
        try:
            stream = self.open(options, int(tensors["resampler.counts"][0]))
            stream.restore(tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the saved stream is of another version of offramp ({type(error).__name__}); go "
                "on with that one"
            ) from error
        return stream

    def stream(
        self,
        blocks: Iterable[Block],
        options: StreamOptions | None = None,
        sample_rate: int = SAMPLE_RATE,
    ) -> Iterator[Event]:
        """What is said in `blocks`, as it comes; see `Stream.read`."""
        return self.open(options, sample_rate).read(blocks)

    def transcribe(self, samples: Tensor, options: StreamOptions | None = None) -> str:
        """The text of samples [N] at 16 kHz, heard at once: what a stream writes, but sooner.

        Memory grows with the recording.
        """
        return self._plan(options).read_whole(samples)

    def _plan(self, options: StreamOptions | None) -> StreamPlan:
        options = options or StreamOptions()
        return StreamPlan(self.model, self.pieces, options, lambda: self._fingerprint)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model)
