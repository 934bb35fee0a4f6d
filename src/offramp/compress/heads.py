"""Head pruning: whole attention heads go, out of all matrices around them (arXiv 1905.10650).

The attention itself still runs over the places of heads that are gone, which read zeros: its
caches keep their shape, and its cost is small beside that of the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.compress.layers import SubsetLinear
from offramp.compress.method import Component, M, modules_of, replace_module, trainable_copy
from offramp.compress.scores import check_level, keep_best
from offramp.errors import InputError
from offramp.nn.conformer import SelfAttention
from offramp.nn.emformer import SegmentAttention
from offramp.nn.layers import Attention

AnyAttention = Attention | SelfAttention | SegmentAttention
KINDS = (Attention, SelfAttention, SegmentAttention)


@dataclass(frozen=True)
class HeadPruning:
    """Of each attention, the heads of least weight in its output matrix go.

    level: the share of heads, rounded; one at least remains. Query heads that share a key go
    together.
    """

    level: float

    def __post_init__(self) -> None:
        check_level(self.level)

    @torch.no_grad()
    def apply(self, model: M, components: Component = None) -> M:
        model = trainable_copy(model, components)
        found: dict[str, AnyAttention] = modules_of(model, KINDS, components)
        for name, attention in found.items():
            output = attention.output
            if not all(type(part) is nn.Linear for part in _matrices(attention).values()):
                raise InputError(f"{name} is pruned or factorised already; prune its heads first")
            groups = getattr(attention, "num_kv_heads", attention.num_heads)
            per_group = output.weight.square().sum(0).view(groups, -1).sum(1)
            kept = keep_best(per_group, self.level)
            if not bool(kept.all()):
                _narrow(model, name, attention, kept)
        return model


def _narrow(model: nn.Module, name: str, attention: AnyAttention, kept: Tensor) -> None:
    """kept: bool [groups of heads]."""
    queries = kept.repeat_interleave(attention.output.in_features // len(kept))
    keys = kept.repeat_interleave(attention.head_dim)
    rows = {
        "query": queries,
        "key_value": torch.cat((keys, keys)),
        "qkv": torch.cat((queries, keys, keys)),
        "output": None,
    }
    for child, linear in _matrices(attention).items():
        columns = queries if child == "output" else None
        small = SubsetLinear.of(linear, columns, rows[child])
        replace_module(model, f"{name}.{child}", small)


def _matrices(attention: AnyAttention) -> dict[str, nn.Linear]:
    """Those around the heads, by name."""
    into = ("query", "key_value") if isinstance(attention, SegmentAttention) else ("qkv",)
    return {child: getattr(attention, child) for child in (*into, "output")}
