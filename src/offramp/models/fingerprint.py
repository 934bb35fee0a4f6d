"""Tells one set of weights from another: what was made with a model is of no use with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from offramp.models.transducer import Transducer


def fingerprint(model: Transducer) -> str:
    """sha256 of the configuration and of every tensor."""
    return tensors_sha256(model.state_dict(), json.dumps(asdict(model.config), sort_keys=True))


def tensors_sha256(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Of `about`, then of every tensor's name, kind, shape and values, in their order."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().to("cpu").contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
