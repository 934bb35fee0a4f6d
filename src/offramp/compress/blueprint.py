"""How a compressed model is built differently from the one its configuration describes, as JSON.

Only what differs is written down: layers that are smaller, factorised or quantised, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from offramp.compress.layers import LowRankLinear, SubsetLinear
from offramp.compress.quantized import QuantizedConv1d, QuantizedEmbedding, QuantizedLinear
from offramp.errors import ConfigError, InputError

Plan = dict[str, Any]


def differences(model: nn.Module, plain: nn.Module) -> dict[str, Plan]:
    """Plans of the modules of `model` that `plain`, of the same configuration, has otherwise.

    InputError: a module of a kind that cannot be stored.
    """
    return dict(_differences(model, plain, ""))


def _differences(model: nn.Module, plain: nn.Module, prefix: str) -> list[tuple[str, Plan]]:
    found = []
    for name, theirs in plain.named_children():
        ours, full = model.get_submodule(name), prefix + name
        same = type(ours) is type(theirs)
        if same and not (isinstance(theirs, nn.Linear) and plan_of(ours) != plan_of(theirs)):
            found += _differences(ours, theirs, f"{full}.")
        else:
            found.append((full, plan_of(ours)))
    return found


def rebuild(plain: nn.Module, plans: Mapping[str, Plan]) -> None:
    """Turn `plain` into the model whose `differences` are `plans`; its tensors are yet to come.

    ConfigError: no such module, or a plan that cannot be built.
    """
    for name, plan in plans.items():
        parent, _, child = name.rpartition(".")
        try:
            owner = plain.get_submodule(parent)
            owner.get_submodule(child)
            setattr(owner, child, build(plan))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot build the module {name!r} from {plan!r} ({error})"
            ) from error


def plan_of(module: nn.Module) -> Plan:
    """`build` makes a module of the same kind and shape from it."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, LowRankLinear):
        return {"kind": "low_rank", "down": plan_of(module.down), "up": plan_of(module.up)}
    if isinstance(module, QuantizedEmbedding):
        sizes = {"num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim}
        return {"kind": "quantized_embedding", **sizes, "bits": module.bits}
    if isinstance(module, QuantizedConv1d):
        how = {"stride": module.stride[0], "padding": module.padding[0], "groups": module.groups}
        shape = [*module.codes.shape]
        return {"kind": "quantized_conv", "shape": shape, "bias": bias, "bits": module.bits, **how}
    if not isinstance(module, nn.Linear | QuantizedLinear | SubsetLinear):
        raise InputError(f"cannot store a {type(module).__name__}; compress with offramp's methods")
    sizes = {"in_features": module.in_features, "out_features": module.out_features, "bias": bias}
    if isinstance(module, SubsetLinear):
        return {"kind": "subset", **sizes, "linear": plan_of(module.linear)}
    if isinstance(module, QuantizedLinear):
        how_ = {"bits": module.bits, "activations": module.activations}
        return {"kind": "quantized_linear", **sizes, **how_}
    return {"kind": "linear", **sizes}


_MAKERS: dict[str, Any] = {
    "linear": nn.Linear,
    "subset": SubsetLinear,
    "low_rank": LowRankLinear,
    "quantized_linear": QuantizedLinear,
    "quantized_embedding": QuantizedEmbedding,
    "quantized_conv": QuantizedConv1d,
}


def build(plan: Plan) -> nn.Module:
    """ConfigError, KeyError, TypeError, ValueError or RuntimeError: not what `plan_of` wrote."""
    values = {k: build(v) if isinstance(v, dict) else v for k, v in plan.items() if k != "kind"}
    module: nn.Module = _MAKERS[plan["kind"]](**values)
    return module
