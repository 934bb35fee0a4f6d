"""What the transformers families of `hf_ctc.py` differ in, below and around their layers.

Each class knows one family's front end, what its layers want to be told of padding and of
positions, and its last head. All arithmetic is done by the checkpoint's own modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Family(Protocol):
    def frames(self, lengths: Tensor) -> Tensor:
        """True output frames [B] of true input lengths [B]."""
        ...

    def embed(self, x: Tensor, lengths: Tensor, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """(h [B, T', D], positions) of inputs that are 0 beyond lengths."""
        ...

    def run(
        self, h: Tensor, lengths: Tensor, positions: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """Layers start ... stop-1 over h [B, T', D] of true frames `lengths` [B]."""
        ...

    def last_head(self) -> tuple[nn.LayerNorm | None, Tensor, Tensor]:
        """(norm if the layers need one behind them, weight [V, D], bias [V])."""
        ...

    def last_logits(self, h: Tensor) -> Tensor: ...


def _valid(lengths: Tensor, T: int) -> Tensor:
    """bool [B, T], True for true frames."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


class Waveform:
    """Wav2Vec2 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900): samples in."""

    def __init__(self, base: Any, family: str) -> None:
        self._base, self._model = base, getattr(base, family)
        self._encoder, self._config = self._model.encoder, base.config
        self._is_wavlm = family == "wavlm"
        # Layer-norm-first layers: the one norm stands behind the layers, not before them.
        self._norm_last = self._config.do_stable_layer_norm
        self._by_row = self._config.feat_extract_norm == "group" or getattr(
            self._config, "conv_pos_batch_norm", False
        )

    def frames(self, lengths: Tensor) -> Tensor:
        for kernel, stride in zip(self._config.conv_kernel, self._config.conv_stride, strict=True):
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return lengths

    def embed(self, x: Tensor, lengths: Tensor, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._by_row:
            rows = [self._front(row[None, :n], None)[0] for row, n in zip(x, lengths, strict=True)]
            h = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        else:
            h = self._front(x[:, : int(lengths.max())], frames)
        if not self._is_wavlm:
            return h, None
        # The first layer would make it, repeat it for every row, and hand it on.
        bias: Tensor = self._encoder.layers[0].attention.compute_bias(h.shape[1], h.shape[1])
        return h, bias

    def _front(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """Samples [B, N] to the input of the first layer; frames: [B], or None if all are true."""
        found = self._model.feature_projection(self._model.feature_extractor(x).transpose(1, 2))
        h: Tensor = found[0] if isinstance(found, tuple) else found  # HuBERT returns h alone
        if frames is not None:
            h = h.masked_fill(~_valid(frames, h.shape[1])[..., None], 0.0)
        h = h + self._encoder.pos_conv_embed(h)
        if not self._norm_last:
            h = self._encoder.layer_norm(h)
        h = self._encoder.dropout(h)
        return h

    def run(
        self, h: Tensor, lengths: Tensor, positions: Tensor | None, start: int, stop: int
    ) -> Tensor:
        T = h.shape[1]
        valid = None if bool((lengths == T).all()) else _valid(lengths, T)
        if not self._is_wavlm:
            from transformers.masking_utils import create_bidirectional_mask

            mask = create_bidirectional_mask(
                config=self._config, inputs_embeds=h, attention_mask=valid
            )
            for layer in self._encoder.layers[start:stop]:
                h = layer(h, attention_mask=mask)
            return h
        assert positions is not None
        bias = positions.repeat(len(h), 1, 1)
        with _mixed_masks():
            for layer in self._encoder.layers[start:stop]:
                h, _ = layer(h, attention_mask=valid, position_bias=bias)
        return h

    def last_head(self) -> tuple[nn.LayerNorm | None, Tensor, Tensor]:
        head = self._base.lm_head
        return self._encoder.layer_norm if self._norm_last else None, head.weight, head.bias

    def last_logits(self, h: Tensor) -> Tensor:
        if self._norm_last:
            h = self._encoder.layer_norm(h)
        logits: Tensor = self._base.lm_head(self._base.dropout(h))
        return logits


@contextmanager
def _mixed_masks() -> Iterator[None]:
    """WavLM gives torch a bool mask with a float bias, against which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask", UserWarning)
        yield


class Parakeet:
    """FastConformer (arXiv 2305.05084): features in, relative positions (1901.02860)."""

    def __init__(self, base: Any) -> None:
        self._base, self._encoder, self._config = base, base.encoder, base.config.encoder_config

    def frames(self, lengths: Tensor) -> Tensor:
        kernel, stride = (
            self._config.subsampling_conv_kernel_size,
            self._config.subsampling_conv_stride,
        )
        for _ in range(self._config.subsampling_factor.bit_length() - 1):
            padded = lengths + 2 * ((kernel - 1) // 2)
            lengths = torch.div(padded - kernel, stride, rounding_mode="floor") + 1
        return lengths

    def embed(self, x: Tensor, lengths: Tensor, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        encoder, training = self._encoder, self._encoder.training
        x = x[:, : int(lengths.max())]
        h = encoder.subsampling(x, _valid(lengths, x.shape[1])) * encoder.input_scale
        positions: Tensor = encoder.encode_positions(h[:1])[0]
        h = nn.functional.dropout(h, encoder.dropout, training)
        return h, nn.functional.dropout(positions, encoder.dropout_positions, training)

    def run(
        self, h: Tensor, lengths: Tensor, positions: Tensor | None, start: int, stop: int
    ) -> Tensor:
        T = h.shape[1]
        mask = None
        if not bool((lengths == T).all()):
            valid = _valid(lengths, T)
            mask = (valid[:, None, :] & valid[:, :, None])[:, None]
        assert positions is not None
        positions = positions.expand(len(h), -1, -1)
        for layer in self._encoder.layers[start:stop]:
            h = layer(h, attention_mask=mask, position_embeddings=positions)
        return h

    def last_head(self) -> tuple[nn.LayerNorm | None, Tensor, Tensor]:
        head = self._base.ctc_head  # a convolution over one frame
        return None, head.weight.squeeze(-1), head.bias

    def last_logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self._base.ctc_head(h)
        return logits
