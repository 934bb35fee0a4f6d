"""A streaming recogniser: a transducer from its folder, and the streams that it serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.compress.checkpoint import load_model
from offramp.config import TransducerConfig
from offramp.decoding.speech_stream import Block, Stream
from offramp.decoding.stream_plan import StreamOptions, StreamPlan
from offramp.errors import InputError
from offramp.models import hub
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
        return Stream(StreamPlan(self.model, self.pieces, options or StreamOptions()), sample_rate)

    def resume(self, saved: bytes, options: StreamOptions | None = None) -> Stream:
        """The stream of which `Stream.save` made `saved`, opened with the same options.

        InputError: `saved` is damaged, or of another model or other options.
        """
        try:
            tensors = tensors_of(saved)
            rate = int(tensors["resampler.counts"][0])
        except (SafetensorError, KeyError) as error:
            raise InputError(
                f"the saved stream cannot be read ({error}); give what Stream.save returned"
            ) from error
        stream = self.open(options, rate)
        stream.restore(tensors)
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
        return StreamPlan(self.model, self.pieces, options or StreamOptions()).read_whole(samples)
