"""Weights as whole numbers, and files that hold them so: half the bytes of float16.

A model read from such a file is like any other: its weights become what the loader is asked for.
A matrix NAME lies as NAME.codes and NAME.scales; vectors, and matrices that would save nothing,
lie as float16. Models that compute with whole numbers are made in `offramp.compress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from offramp.errors import CheckpointError, InputError

INT8 = "int8"  # what config.json calls it
CODES, SCALES = ".codes", ".scales"
_ENTRY = 100  # bytes, about, that one more tensor takes in a file's table of contents


def row_scales(weight: Tensor, bits: int, kind: torch.dtype = torch.float32) -> Tensor:
    """weight [rows, ...] -> what a step of a row's codes is worth, `kind` [rows]."""
    largest = weight.detach().float().flatten(1).abs().amax(1)
    scales = (largest / (2 ** (bits - 1) - 1)).to(kind)
    # Below that, numbers lose digits: such a row is as good as zero.
    return torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0)


def nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """weight [rows, ...], scales [rows] -> int8 codes of its shape, each off by half at most."""
    flat = weight.detach().float().flatten(1)
    return (flat / scales.float()[:, None]).round().to(torch.int8).view(weight.shape)


def quantize(weight: Tensor, bits: int, kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """weight [rows, ...] -> (codes int8 of that shape, scales `kind` [rows]), symmetric.

    Codes lie in [-127, 127] or [-7, 7]; weights are off by half a scale at most, and zero stays
    zero. In float32 the largest weight of a row is exact.
    """
    scales = row_scales(weight, bits, kind)
    return nearest(weight, scales), scales


def encode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, by name -> what a file of 8 bits holds; counts stay what they are.

    Scales are bfloat16: they reach as far as float32, and times a code they are exact in it, so
    what was read from such a file is written to the bit. InputError: numbers that are not finite.
    """
    stored: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if not x.is_floating_point():
            stored[name] = x
            continue
        pays = _pays(x)
        plain = x if pays else x.to(torch.float16)
        if not bool(plain.isfinite().all()):
            raise InputError(
                f"{name} cannot be stored in {INT8}, it holds numbers that are not finite in "
                f"{plain.dtype}; go back to a model without them, or store it in float32"
            )
        if pays:
            stored[name + CODES], stored[name + SCALES] = quantize(x, 8, torch.bfloat16)
        else:
            stored[name] = plain
    return stored


def take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    """Tensor `name` out of those in `folder`; CheckpointError: not there, or of another shape."""
    if name not in tensors:
        raise CheckpointError(
            f"{folder} lacks the tensor {name}; the checkpoint is incomplete, fetch it anew"
        )
    if tensors[name].shape != shape:
        raise CheckpointError(
            f"{folder}: {name} has shape {list(tensors[name].shape)}, config.json says "
            f"{list(shape)}; the files are not of one checkpoint"
        )
    return tensors.pop(name)


def take_weights(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], folder: Path
) -> Tensor:
    """As `take`, whether they lie there as they are or in 8 bits, which become float32."""
    if name + CODES not in tensors:
        return take(tensors, name, shape, folder)
    codes = take(tensors, name + CODES, shape, folder)
    scales = take(tensors, name + SCALES, shape[:1], folder)
    if codes.dtype != torch.int8 or not bool((scales.isfinite() & (scales > 0)).all()):
        raise CheckpointError(
            f"{folder}: {name} must have int8 codes and finite scales above zero; fetch the "
            "checkpoint anew"
        )
    return codes * scales.float().view(-1, *[1] * (codes.ndim - 1))


def _pays(x: Tensor) -> bool:
    """Whether 8 bits and scales take less than float16."""
    return x.ndim >= 2 and x.numel() + 2 * len(x) + _ENTRY < 2 * x.numel()
