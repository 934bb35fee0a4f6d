"""Rotary position embedding (RoFormer, arXiv 2104.09864), with Llama 3.1's frequency scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offramp.config import DecoderConfig, RopeScaling


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """Angular speed of each pair of channels, float32 [head_dim / 2]."""
    exponent = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    speeds = 1.0 / (config.rope_theta**exponent)
    return speeds if config.rope_scaling is None else _scale_llama3(speeds, config.rope_scaling)


def _scale_llama3(speeds: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow channels are slowed by `factor`, fast ones kept, those between blended linearly."""
    wavelength = 2 * math.pi / speeds
    turns = scaling.original_max_positions / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * speeds / scaling.factor + blend * speeds


class RotaryTable:
    """Cosines and sines up to the longest position asked for so far, on one device."""

    def __init__(self, config: DecoderConfig) -> None:
        self._speeds = inverse_frequencies(config)
        empty = torch.empty(0, config.head_dim, device="cpu")
        self._table = (empty, empty)  # swapped whole, so that threads never see half a change

    def upto(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each [length, head_dim], in the dtype and on the device of `like`."""
        cos, sin = self._table
        if len(cos) < length or cos.device != like.device or cos.dtype != like.dtype:
            # Not an inference tensor, whoever asks first: training may use the table next.
            with torch.inference_mode(False):
                size = max(256, 1 << (length - 1).bit_length())
                angles = torch.outer(
                    torch.arange(size, dtype=torch.float32, device="cpu"), self._speeds
                )
                sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
                cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
                cos, sin = cos.to(like), sin.to(like)
            self._table = (cos, sin)
        return cos[:length], sin[:length]


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn each channel pair (i, i + Dh/2) of x [B, T, H, Dh]; cos and sin [B or 1, T, 1, Dh].

    The sign of the usual rotate-half, (-x2, x1), is folded into the sine: rolling by half swaps
    the halves in one operation.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)
