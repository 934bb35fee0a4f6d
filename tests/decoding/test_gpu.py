"""On a GPU: the same text, and no waiting for the device while drafting."""

import pytest
import torch

from offramp.api import DraftOptions, Model
from offramp.decoding.drafts import DecodeState, EarlyExitDraft
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.stopping import Stop
from offramp.nn.cache import KVCache
from toy import decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
PROMPTS = [[5, 6, 7], [8], [9] * 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["exit", "adaptive", "ngram"])
def test_drafts_write_the_plain_text(kind, dtype):
    model = Model(decoder().to("cuda", dtype), None)
    plain = model.generate(PROMPTS, draft=DraftOptions("none"), stop=Stop(20))
    drafted = model.generate(PROMPTS, draft=DraftOptions(kind), stop=Stop(20))
    same = [a.tokens == b.tokens for a, b in zip(plain, drafted, strict=True)]
    # Half precision may break near-ties differently; test_speculative.py bounds that on the CPU.
    assert all(same) if dtype == torch.float32 else any(same)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=9, top_p=0.9)])
def test_drafting_never_waits_for_the_device(sampling):
    tower = decoder().to("cuda")
    cache = KVCache(tower.config, 3, 64, tower.device, tower.dtype)
    chooser = Chooser(sampling, PROMPTS, [0, 1, 2], tower.config.vocab_size, tower.device)
    state = DecodeState(tower, cache, [list(p) for p in PROMPTS], chooser)
    draft = EarlyExitDraft(2, tower.config.num_layers)
    with torch.inference_mode():
        draft.propose(state, 4)  # allocations and kernels of a first call may wait
        cache.truncate([0, 0, 0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert draft.propose(state, 4).tokens.shape == (3, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
