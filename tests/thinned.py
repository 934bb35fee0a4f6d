"""Large matrices of cases in two depths: `make test` runs a few, `make test-all` all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def thinned(cases: Mapping[str, Any] | Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """`cases` as `pytest.mark.parametrize` takes them, slow all but those that `keep` names.

    A mapping gives its values, which `keep` and the reports name by their keys; other cases go by
    themselves. `keep` may name no case that does not exist: a typing error would drop one silently.
    """
    named = list(cases.items()) if isinstance(cases, Mapping) else [(c, c) for c in cases]
    unknown = [name for name in keep if name not in [known for known, _ in named]]
    assert not unknown, f"{unknown} to be kept of {[name for name, _ in named]}"
    return [
        pytest.param(
            case,
            id=name if isinstance(cases, Mapping) else None,
            marks=() if name in keep else pytest.mark.slow,
        )
        for name, case in named
    ]
