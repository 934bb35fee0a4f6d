"""What the weights of a transducer take as they really are: packed bytes, and MACs by dtype.

A plain model gives what its shape says; a compressed one the bytes of the file that holds it and
the products that its own layers compute. Zeros save bytes where their packing does, never MACs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from offramp.compress.layers import LowRankLinear, SubsetLinear
from offramp.compress.method import is_inside
from offramp.compress.packing import stored_size
from offramp.compress.quantized import QuantizedLinear
from offramp.config import Chunking, TransducerConfig
from offramp.energy.trace import StreamTrace
from offramp.energy.transducer_components import StoredWeights, call_costs, transducer_components
from offramp.energy.transducer_cost import TABLE, part_of
from offramp.energy.uncertainty import Plan
from offramp.models.transducer import Transducer
from offramp.nn.unfilled import unfilled

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MODULES = {"joiner": "joiner.tokens", "blank_head": "joiner.blank"}  # others have their own name


def stored_weights(model: Transducer, chunking: Chunking | None = None) -> dict[str, StoredWeights]:
    """Of each component by name; see `transducer_components`. Runs every component once."""
    chunking = chunking or model.config.chunking
    return stored_by_chunking(model, [chunking])[chunking]


def stored_by_chunking(
    model: Transducer, chunkings: Iterable[Chunking]
) -> dict[Chunking, dict[str, StoredWeights]]:
    """`stored_weights` for each; the weights are packed once."""
    parts, plain = _parts(model), _plain_linears(model.config)
    return {chunking: _stored(model, chunking, parts, plain) for chunking in chunkings}


@torch.no_grad()
def _stored(
    model: Transducer,
    chunking: Chunking,
    parts: Mapping[str, Mapping[str, int]],
    plain: Mapping[str, int],
) -> dict[str, StoredWeights]:
    """parts: stored bytes. plain: see `_plain_linears`."""
    dtype = _DTYPES.get(model.dtype, "fp32")
    found, calls = {}, _calls(model, chunking)
    for name, cost in call_costs(model.config, chunking).items():
        # A row of a table takes its share of all that is stored of it.
        row = parts[name].get(TABLE, 0) * cost.table_read / cost.parts.get(TABLE, 1)
        macs = {dtype: cost.macs}
        inside = [_MODULES.get(name, name)]
        linears = {n: count for n, count in plain.items() if is_inside(n, inside)}
        for kind, count in _corrections(model, linears, calls[name], dtype):
            macs[kind] = macs.get(kind, 0) + count
        found[name] = StoredWeights(parts[name], row, {k: n for k, n in macs.items() if n})
    return found


def as_run(model: Transducer, trace: StreamTrace, chunking: Chunking | None = None) -> Plan:
    """`model` as it ran in streams that `trace` counted: what modelled energy follows from."""
    blank_head, chunking = model.config.factorised_blank, chunking or model.config.chunking
    components = transducer_components(
        model.config,
        stored_weights(model, chunking),
        trace.positions_per_call(blank_head),
        chunking,
        cache_bits=8 * model.dtype.itemsize,
    )
    return Plan(components, trace.rates(blank_head), trace.per_s()["tokens"])


def _parts(model: Transducer) -> dict[str, dict[str, int]]:
    """Stored bytes by component and part; a head for training is in none."""
    modules = {_MODULES.get(name, name): name for name in call_costs(model.config)}
    found: dict[str, dict[str, int]] = {name: {} for name in modules.values()}
    for tensor in stored_size(model).tensors:
        for module, name in modules.items():
            if is_inside(tensor.name, [module]):
                part = part_of(name, tensor.name.removeprefix(f"{module}."))
                found[name][part] = found[name].get(part, 0) + tensor.nbytes
    return found


def _calls(model: Transducer, chunking: Chunking) -> dict[str, Callable[[], Any]]:
    """One call of each component at one position."""
    config, like = model.config, model.encoder.output_norm.weight
    features = like.new_zeros(1, chunking.frames * config.time_reduction, config.num_mels)
    sides = like.new_zeros(1, config.d_joint)

    def encode() -> None:
        with model.streaming(1, chunking) as state:
            model.encoder.push(features, state)

    def predict() -> None:
        tokens = torch.tensor([config.blank_id], device=model.device)
        model.predictor.step(tokens, model.predictor.initial_state(1))

    return {
        "encoder": encode,
        "predictor": predict,
        "joiner": lambda: model.joiner.tokens(sides),
        "blank_head": lambda: model.joiner.blank_logit(sides, sides),
    }


@lru_cache(maxsize=4)
def _plain_linears(config: TransducerConfig) -> Mapping[str, int]:
    """MACs per row of the linear layers that a plain model of this shape has, by name."""
    with unfilled():
        plain = Transducer(config)
    return {
        name: layer.weight.numel()
        for name, layer in plain.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _corrections(
    model: Transducer, plain: Mapping[str, int], call: Callable[[], Any], dtype: str
) -> Iterator[tuple[str, int]]:
    """By dtype, MACs of a call to take from those by shape, and to add: of each of `plain`."""
    modules = {name: model.get_submodule(name) for name in plain}
    with _rows_seen(modules) as rows:
        call()
    for name, macs in plain.items():
        yield dtype, -rows[name] * macs
        yield from _macs(modules[name], rows[name])


@contextmanager
def _rows_seen(modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    """Counts the rows that go through each of `modules`, by name."""
    rows: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def count(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            rows[name] += inputs[0].shape[:-1].numel()

        return count

    hooks = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _macs(module: nn.Module, rows: int) -> Iterator[tuple[str, int]]:
    """By dtype, what `rows` rows take in a module that stands for a linear layer."""
    if isinstance(module, SubsetLinear):
        yield from _macs(module.linear, rows)
    elif isinstance(module, LowRankLinear):
        yield from _macs(module.down, rows)
        yield from _macs(module.up, rows)
    elif isinstance(module, QuantizedLinear):
        # Codes of 4 bits are widened: activations have no fewer than 8.
        dtype = {"int8": "int8", "bfloat16": "bf16"}[module.activations]
        yield dtype, rows * module.in_features * module.out_features
    else:
        assert isinstance(module, nn.Linear), type(module)
        yield _DTYPES.get(module.weight.dtype, "fp32"), rows * module.weight.numel()
