"""Rows of uneven length as one tensor: tokens, and embeddings such as audio that stand before them.

Shorter rows are padded on the right: padding stands after all that could see it, and the keys it
leaves in a cache are forgotten at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from offramp.errors import InputError
from offramp.nn.device import upload
from offramp.nn.tower import Tower


def upload_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, T], the shorter rows filled up with 0."""
    width = max(map(len, rows))
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return upload(padded, device).view(len(rows), width)


def embed_rows(
    tower: Tower, ids: Tensor, lengths: Sequence[int], prefixes: Sequence[Tensor]
) -> Tensor:
    """[B, T', D]: per row its prefix, if there are any, and its first `lengths[b]` ids [B, T]."""
    h = tower.embed(ids[:, : max(lengths)])
    if not prefixes:
        return h
    rows = [torch.cat((p, x[:n])) for p, x, n in zip(prefixes, h, lengths, strict=True)]
    return pad_sequence(rows, batch_first=True)


def at_columns(h: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """h [B, T, D] -> [B, n, D]: of row b the states at `columns[b]`."""
    index = upload(columns, h.device)
    return h[torch.arange(len(columns), device=h.device)[:, None], index]


def check_prefixes(tower: Tower, prefixes: Sequence[Tensor], num_rows: int) -> None:
    """InputError unless there is one prefix per row, each [m, D] of this tower's D."""
    if len(prefixes) != num_rows:
        raise InputError(
            f"there are {len(prefixes)} prefixes for {num_rows} prompts; give one each, which may "
            "have no rows"
        )
    d_model = tower.config.d_model
    if bad := [p for p in prefixes if p.ndim != 2 or p.shape[1] != d_model]:
        raise InputError(
            f"a prefix has shape {list(bad[0].shape)}; the model needs [m, {d_model}], "
            "one embedding per position"
        )
