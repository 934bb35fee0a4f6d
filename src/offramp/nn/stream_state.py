"""What an Emformer encoder remembers of B streams: a plain object of tensors, bounded in size.

Nothing grows with the length of a stream. All of it can be taken out as a dict of tensors, kept
anywhere, and put back: the stream then goes on as if nothing had happened.
"""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor

from offramp.config import Chunking, TransducerConfig
from offramp.errors import InputError
from offramp.nn.emformer import LayerCache


class StreamState:
    """The tensors of B streams that advance together, chunk by chunk.

    keys, values: [layers, B, M + L, D], of summaries and left context. frames: [layers, B, K - 1,
    D], for the convolution. pending: [B, P, F], features that wait for their chunk to be full,
    after the history that subsampling reads before them. received: int64 [B], feature frames so
    far. ended: bool [B], rows that get no more. chunks: how many were heard.
    """

    def __init__(
        self,
        config: TransducerConfig,
        chunking: Chunking,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; a stream state needs at least 1 row")
        layers, D = config.num_layers, config.d_model
        past = chunking.memory + chunking.left_context
        before = max(0, config.kernel_size - 1)
        self.chunking = chunking
        self.closed = False
        self.keys = torch.zeros(layers, batch_size, past, D, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.frames = torch.zeros(layers, batch_size, before, D, device=device, dtype=dtype)
        waiting = (batch_size, config.history, config.num_mels)
        self.pending = torch.zeros(waiting, device=device, dtype=dtype)
        self.received = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.chunks = 0

    @property
    def batch_size(self) -> int:
        return len(self.received)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def layer(self, index: int) -> LayerCache:
        """The part of layer `index`, counted from 0; what is written there is written here."""
        return LayerCache(self.keys[index], self.values[index], self.frames[index])

    def tensors(self) -> dict[str, Tensor]:
        """A copy of everything, for `restore`."""
        self.check_open()
        counts = torch.tensor([*astuple(self.chunking), self.chunks])
        copies = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return {**copies, "counts": counts}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on where the stream stood from which `tensors` were taken.

        InputError: they are of another model, another chunking or another number of rows.
        """
        self.check_open()
        own = self.tensors()
        if sorted(tensors) != sorted(own):
            raise InputError(
                f"the saved stream holds {', '.join(sorted(tensors))}; a stream of this model "
                f"holds {', '.join(sorted(own))}"
            )
        for name, wanted in own.items():
            free = 1 if name == "pending" else None  # its number of frames varies
            theirs, ours = (
                [n for at, n in enumerate(t.shape) if at != free] for t in (tensors[name], wanted)
            )
            if theirs != ours or tensors[name].dtype != wanted.dtype:
                raise InputError(
                    f"{name} of the saved stream is {tensors[name].dtype} "
                    f"{list(tensors[name].shape)}, here it is {wanted.dtype} "
                    f"{list(wanted.shape)}; it is of another model or batch"
                )
        *chunking, chunks = tensors["counts"].tolist()
        if Chunking(*chunking) != self.chunking:
            raise InputError(
                f"the saved stream has {Chunking(*chunking)}, this one {self.chunking}; open it "
                "with the same"
            )
        for name, tensor in self._tensors().items():
            setattr(self, name, tensors[name].to(tensor.device, copy=True))
        self.chunks = chunks

    def close(self) -> None:
        """Let the tensors go; the state is of no more use."""
        self.closed = True
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor.new_zeros(0))

    def check_open(self) -> None:
        if self.closed:
            raise InputError("the stream is closed; use it inside its `with`, or open another")

    def _tensors(self) -> dict[str, Tensor]:
        names = ("keys", "values", "frames", "pending", "received", "ended")
        return {name: getattr(self, name) for name in names}
