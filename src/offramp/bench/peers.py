"""transformers' `generate` on the same checkpoint, as arms to compare with.

Its `assistant_early_exit` takes draft length, schedule and confidence threshold from the
model's generation_config alone; as arguments of generate() they are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from offramp.bench.arms import Arm, Decoded
from offramp.bench.prompts import Prompt
from offramp.decoding.drafts import EarlyExitDraft
from offramp.decoding.stopping import Stop
from offramp.errors import InputError
from offramp.models.hf_checkpoint import quiet


class Transformers:
    """A checkpoint folder as transformers loads it; decodes greedily until `stop`."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        stop: Stop,
        draft: EarlyExitDraft,
        num_draft_tokens: int,
    ) -> None:
        try:
            import transformers
        except ImportError as error:
            raise InputError(
                "the comparison with transformers needs it installed: pip install "
                "'offramp[hf]', or leave the peers out (--no-peers)"
            ) from error
        self._exit_layer = draft.exit_layer
        self.version: str = transformers.__version__
        with quiet():
            cls: Any = transformers.AutoModelForCausalLM  # not typed as we need it
            self._model = cls.from_pretrained(folder, dtype=dtype).to(device).eval()
        eos = sorted(stop.token_ids)
        settings: Any = transformers.GenerationConfig  # their __init__ is not typed
        self._model.generation_config = settings(
            do_sample=False,
            max_new_tokens=stop.max_tokens,
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else None,
            num_assistant_tokens=num_draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=draft.min_confidence,
        )

    def greedy(self) -> Arm:
        return self._arm()

    def early_exit(self) -> Arm:
        return self._arm(assistant_early_exit=self._exit_layer)

    def _arm(self, **settings: int) -> Arm:
        def decode(prompt: Prompt) -> Decoded:
            ids = torch.tensor([list(prompt)], device=self._model.device)
            mask = torch.ones_like(ids)
            written = self._model.generate(ids, attention_mask=mask, **settings)
            return Decoded(tuple(written[0, len(prompt) :].tolist()))

        return decode
