"""Compressed models in and out: a folder with config.json and the packed weights.

model.safetensors holds exactly the bytes that `stored_size` counts, after the table of contents
that says where each tensor lies. config.json describes the model it was, what is built otherwise,
and how each tensor that is not stored plainly is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.compress.blueprint import differences, rebuild
from offramp.compress.layers import SubsetLinear
from offramp.compress.packing import LAYOUTS, Packed, pack_model, unpack
from offramp.compress.quantized import QuantizedLinear
from offramp.config import (
    DecoderConfig,
    EncoderConfig,
    TransducerConfig,
    check_choice,
    check_counts,
    strict,
)
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.models.ctc import CTCEncoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hub import (
    check_target,
    read_json,
    read_tensors,
    refuse_unexplained,
    write_checkpoint,
)
from offramp.models.transducer import Transducer

COMPRESSED_TYPE = "offramp-compressed"  # model_type in config.json

Model = DecoderLM | CTCEncoder | Transducer
_CONFIGS: dict[str, type[DecoderConfig | EncoderConfig | TransducerConfig]] = {
    "decoder": DecoderConfig,
    "ctc": EncoderConfig,
    "transducer": TransducerConfig,
}
_MODELS: dict[str, type[Model]] = {
    "decoder": DecoderLM,
    "ctc": CTCEncoder,
    "transducer": Transducer,
}


@dataclass(frozen=True)
class _Packing:
    """How a tensor that is not stored plainly lies in `name`.values and `name`.index."""

    layout: str
    bits: int

    def __post_init__(self) -> None:
        check_choice(layout=(self.layout, LAYOUTS))
        check_counts(1, bits=self.bits)


def save_compressed(model: Model, folder: Path, files: Mapping[str, str] | None = None) -> None:
    """Write a folder that `load_compressed` reads; whole or not at all.

    files: name -> text of further files, such as the tokenizer's.
    """
    check_target(folder)
    kind = next((kind for kind, cls in _MODELS.items() if type(model) is cls), None)
    if kind is None:
        raise InputError(
            f"cannot store a compressed {type(model).__name__}; allowed: {', '.join(_MODELS)}"
        )
    tensors: dict[str, Tensor] = {}
    packings: dict[str, Any] = {}
    for name, packed in pack_model(model).items():
        if packed.is_plain:
            tensors[name] = packed.values.clone()
            continue
        packings[name] = asdict(_Packing(packed.layout, packed.bits))
        tensors[f"{name}.values"] = packed.values
        if packed.index is not None:
            tensors[f"{name}.index"] = packed.index
    config = {
        "model_type": COMPRESSED_TYPE,
        "kind": kind,
        "config": asdict(model.config),
        "modules": differences(model, _plain(kind, model.config)),
        "packed": packings,
    }
    write_checkpoint(folder, tensors, config, files or {})


def load_compressed(folder: Path, device: torch.device | str = "cpu") -> Model:
    """The model in `folder`, every tensor checked by name, kind and shape; frozen, in eval mode.

    CheckpointError: not a compressed model, incomplete, or its files contradict each other.
    """
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") != COMPRESSED_TYPE:
        raise CheckpointError(
            f"{path} describes a model of type {values.get('model_type')!r}, not "
            f"{COMPRESSED_TYPE!r}; choose a folder that offramp compress wrote"
        )
    try:
        model, packings = _described(values)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}; fetch the checkpoint anew") from error
    stored = dict(read_tensors(folder))
    state = {}
    for name, wanted in model.state_dict().items():
        packing = packings.pop(name, None)
        tensor = _read(stored, name, wanted, packing, folder)
        # A copy lies as torch likes it; where the file has it, sums may round otherwise.
        state[name] = tensor.to(device, copy=True)
    refuse_unexplained(folder, sorted([*stored, *packings]))
    model.load_state_dict(state, assign=True)
    _finish(model, folder)
    model.requires_grad_(False)
    return model.eval()


def _plain(kind: str, config: Any) -> Model:
    with torch.device("meta"):
        return _MODELS[kind](config)


def _described(values: Mapping[str, Any]) -> tuple[Model, dict[str, _Packing]]:
    kind = values["kind"]
    check_choice(kind=(kind, tuple(_MODELS)))
    model = _plain(kind, _CONFIGS[kind].from_dict(values["config"]))
    with torch.device("meta"):
        rebuild(model, values["modules"])
    return model, {name: strict(_Packing, p) for name, p in values["packed"].items()}


def _read(
    stored: dict[str, Tensor], name: str, wanted: Tensor, packing: _Packing | None, folder: Path
) -> Tensor:
    key = name if packing is None else f"{name}.values"
    if key not in stored:
        raise CheckpointError(
            f"{folder} lacks the tensor {key}; the checkpoint is incomplete, fetch it anew"
        )
    tensor = stored.pop(key)
    if packing is not None:
        index = stored.pop(f"{name}.index", None)
        shape = tuple(wanted.shape)
        try:
            tensor = unpack(Packed(packing.layout, packing.bits, shape, tensor, index))
        except ValueError as error:
            raise CheckpointError(
                f"{folder}: {name} cannot be unpacked, {error}; fetch the checkpoint anew"
            ) from error
    kinds = (tensor.dtype.is_floating_point, wanted.dtype.is_floating_point)
    if tensor.shape != wanted.shape or (tensor.dtype != wanted.dtype and not all(kinds)):
        raise CheckpointError(
            f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)}, config.json says "
            f"{wanted.dtype} {list(wanted.shape)}; the files are not of one checkpoint"
        )
    return tensor


def _finish(model: nn.Module, folder: Path) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.lay_out()
        if isinstance(module, SubsetLinear):
            for kept, size in (
                (module.inputs, module.in_features),
                (module.outputs, module.out_features),
            ):
                if kept is not None and not (int(kept.min()) >= 0 and int(kept.max()) < size):
                    raise CheckpointError(
                        f"{folder}: {name} keeps channels that are not among its {size}; fetch "
                        "the checkpoint anew"
                    )
