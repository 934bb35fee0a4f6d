"""Plain decoding, one token at a time: the slow, obvious reference that all else must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from offramp.decoding.ragged import check_prefixes
from offramp.decoding.sampling import Chooser
from offramp.decoding.stopping import RowEnd
from offramp.nn.cache import KVCache
from offramp.nn.device import upload
from offramp.nn.tower import Tower
from offramp.results import Step


@torch.inference_mode()
def autoregress(
    tower: Tower,
    prompt: Sequence[int],
    chooser: Chooser,
    end: RowEnd,
    prefix: Tensor | None = None,
) -> Iterator[Step]:
    """Yields one `Step` per token after `prompt`, until `end`.

    prefix: embeddings [m, D] that stand before the prompt, such as what was heard.
    """
    L, text = tower.config.num_layers, list(prompt)
    before = tower.embed(upload([text[:-1]], tower.device))
    if prefix is not None:
        check_prefixes(tower, [prefix], 1)
        before = torch.cat((prefix[None], before), dim=1)
    capacity = before.shape[1] + 1 + end.remaining
    cache = KVCache(tower.config, 1, capacity, tower.device, tower.dtype)
    if before.shape[1] > 0:
        tower.run(before, 0, L, cache)
    while end.reason is None:
        newest = upload([text[-1:]], tower.device)
        h = tower.run(tower.embed(newest), 0, L, cache)
        token = int(chooser.choose(tower.logits(h, L), [len(text)], None))
        text.append(token)
        _, piece = end.push([token])
        chooser.commit(0, [token], len(text))
        yield Step(0, (token,), piece, (), 0, None, end.reason)
