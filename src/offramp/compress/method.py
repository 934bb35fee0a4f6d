"""What every compression method is: settings that turn a model into a smaller copy of it.

One method is one frozen dataclass in one file. Which weights it may touch is said by component:
the dotted name of a sub-module, such as `joiner` or `encoder.layers.3`, with all that is inside.

    smaller = MagnitudePruning(level=0.5).apply(model, ["encoder"])
    ... fine-tune inside `zeros_held(smaller)` ...
    smaller = WeightQuantization(bits=8).apply(smaller)
    save_compressed(smaller, folder)

Pruning and factorising come first, then fine-tuning, then quantisation, which ends training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from torch import nn

from offramp.compress.layers import LowRankLinear
from offramp.compress.quantized import QuantizedWeight
from offramp.errors import InputError

Component = Sequence[str] | None
M = TypeVar("M", bound=nn.Module)
N = TypeVar("N", bound=nn.Module)


class CompressionMethod(Protocol):
    """Frozen settings; `level` 0 of those that have one changes nothing."""

    def apply(self, model: M, components: Component = None) -> M:
        """A compressed copy; `model` stays as it is. components None: the whole model.

        InputError: no such component, or weights that this method cannot compress any more.
        """
        ...


def modules_of(
    model: nn.Module, kinds: type[N] | tuple[type[N], ...], components: Component = None
) -> dict[str, N]:
    """Modules of `kinds` inside `components` by dotted name; of nested ones all.

    InputError: a component that the model does not have.
    """
    names = {name for name, _ in model.named_modules()}
    for component in components or ():
        if component not in names or not component:
            children = ", ".join(name for name, _ in model.named_children())
            raise InputError(
                f"{type(model).__name__} has no component {component!r}; name a sub-module: one "
                f"of {children}, or what is inside them"
            )
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and (components is None or is_inside(name, components))
    }


def is_inside(name: str, components: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `components` or in one of them."""
    return any(name == c or name.startswith(f"{c}.") for c in components)


def trainable_copy(model: M, components: Component) -> M:
    """A copy of `model` for a method that changes float weights of `components`.

    InputError: some of them are quantised already.
    """
    if done := modules_of(model, QuantizedWeight, components):
        raise InputError(
            f"{next(iter(done))} is quantised; prune and factorise first, quantise last"
        )
    return copy.deepcopy(model)


def free_linears(model: nn.Module, components: Component) -> dict[str, nn.Linear]:
    """Linears inside `components`, but for the factors of one."""
    factors = modules_of(model, LowRankLinear)
    linears = modules_of(model, nn.Linear, components)
    return {name: linear for name, linear in linears.items() if not is_inside(name, factors)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the sub-module `name`, in the same mode."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    new.train(old.training)
    setattr(model.get_submodule(parent), child, new)
