"""Compressed models in and out: a folder with config.json and the packed weights.

model.safetensors holds exactly the bytes that `stored_size` counts, after the table of contents
that says where each tensor lies. config.json describes the model it was, what is built otherwise,
and how each tensor that is not stored plainly is packed. Whoever uses a model need not know
whether it is compressed: `load_model` reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from offramp.compress.blueprint import differences, rebuild
from offramp.compress.layers import SubsetLinear
from offramp.compress.packing import LAYOUTS, Packed, pack_model, unpack
from offramp.compress.quantized import QuantizedMatrix, QuantizedWeight
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
from offramp.models.ctc_checkpoint import load_encoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hub import (
    COMPRESSED_TYPE,
    DECODER_KIND,
    ENCODER_TYPE,
    TRANSDUCER_TYPE,
    check_finite,
    check_target,
    described,
    is_compressed,
    lay_out,
    load_decoder,
    read_tensors,
    refuse_unexplained,
    write_checkpoint,
)
from offramp.models.transducer import Transducer
from offramp.models.transducer_checkpoint import load_transducer
from offramp.nn.unfilled import unfilled

Model = DecoderLM | CTCEncoder | Transducer
M = TypeVar("M", DecoderLM, CTCEncoder, Transducer)


class _Kind(NamedTuple):
    """load: from a folder that is not compressed. command: what uses such a model."""

    model: type[Model]
    config: type[DecoderConfig | EncoderConfig | TransducerConfig]
    load: Callable[[Path, torch.device | str, torch.dtype], Model]
    command: str


_KINDS = {
    DECODER_KIND: _Kind(DecoderLM, DecoderConfig, load_decoder, "offramp generate"),
    ENCODER_TYPE: _Kind(CTCEncoder, EncoderConfig, load_encoder, "offramp transcribe"),
    TRANSDUCER_TYPE: _Kind(Transducer, TransducerConfig, load_transducer, "offramp stream"),
}
# Beside the weights, and as true of a compressed model. A calibration is not: its thresholds are
# certified for the weights that it was made with.
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "offramp.json")


@dataclass(frozen=True)
class _Packing:
    """How a tensor that is not stored plainly lies in `name`.values and `name`.index."""

    layout: str
    bits: int

    def __post_init__(self) -> None:
        check_choice(layout=(self.layout, LAYOUTS))
        check_counts(1, bits=self.bits)


def save_compressed(model: Model, folder: Path, files: Mapping[str, str] | None = None) -> None:
    """Write a folder that `load_model` reads; whole or not at all.

    files: name -> text of further files, such as `companions` of the folder that `model` is from.
    """
    check_target(folder)
    kind = next((kind for kind, known in _KINDS.items() if type(model) is known.model), None)
    if kind is None:
        known = ", ".join(known.model.__name__ for known in _KINDS.values())
        raise InputError(f"cannot store a compressed {type(model).__name__}; allowed: {known}")
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


def companions(folder: Path) -> dict[str, str]:
    """Name -> text of the files in `folder` that go with a compressed copy of its model."""
    found = (folder / name for name in _COMPANIONS)
    return {path.name: path.read_text(encoding="utf-8") for path in found if path.exists()}


def load_model(
    wanted: type[M],
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> M:
    """The model of class `wanted` in `folder`, compressed or not; frozen, in eval mode.

    CheckpointError: there is none, or it has weights that are not finite. InputError: whole
    numbers do not multiply in `dtype`.
    """
    if not is_compressed(folder):
        load = next(kind.load for kind in _KINDS.values() if kind.model is wanted)
        model = load(folder, device, dtype)
        assert isinstance(model, wanted)
        check_finite(model, folder)
        return model
    model = load_compressed(folder, device)
    if not isinstance(model, wanted):
        command = next(kind.command for kind in _KINDS.values() if kind.model is type(model))
        raise CheckpointError(
            f"{folder} holds a compressed {type(model).__name__}, not a {wanted.__name__}; give it "
            f"to {command}, or choose another folder"
        )
    if dtype != model.dtype and any(isinstance(m, QuantizedWeight) for m in model.modules()):
        raise InputError(
            f"dtype is {dtype}, and {folder} is quantised: it computes in {model.dtype}; leave "
            "dtype out"
        )
    if isinstance(model, DecoderLM):
        for p in model.parameters():
            p.data = lay_out(p.data)
    model = model.to(dtype)
    check_finite(model, folder)
    return model


def load_compressed(folder: Path, device: torch.device | str = "cpu") -> Model:
    """The compressed model in `folder`, every tensor checked by name, kind and shape.

    It is frozen and in eval mode. CheckpointError: not a compressed model, incomplete, or its files
    contradict each other.
    """
    wanted = "a folder that offramp compress wrote"
    model, packings = described(folder, COMPRESSED_TYPE, _described, wanted)
    stored = dict(read_tensors(folder))
    state = {}
    for name, expected in model.state_dict().items():
        packing = packings.pop(name, None)
        tensor = _read(stored, name, expected, packing, folder)
        # A copy lies as torch likes it; where the file has it, sums may round otherwise.
        state[name] = tensor.to(device, copy=True)
    refuse_unexplained(folder, sorted([*stored, *packings]))
    model.load_state_dict(state, assign=True)
    _finish(model, folder)
    model.requires_grad_(False)
    return model.eval()


def _plain(kind: str, config: Any) -> Model:
    with unfilled():
        return _KINDS[kind].model(config)


def _described(values: Mapping[str, Any]) -> tuple[Model, dict[str, _Packing]]:
    """The model on the meta device, and how its tensors are packed. ConfigError: malformed."""
    try:
        kind = values["kind"]
        check_choice(kind=(kind, tuple(_KINDS)))
        model = _plain(kind, _KINDS[kind].config.from_dict(values["config"]))
        with unfilled():
            rebuild(model, values["modules"])
        return model, {name: strict(_Packing, p) for name, p in values["packed"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{type(error).__name__}, {error}") from error


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
        if isinstance(module, QuantizedMatrix):
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
