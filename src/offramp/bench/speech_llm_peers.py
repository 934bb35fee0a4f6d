"""What a Speech-LM is held against: transformers' `generate` on its decoder, and a CTC recogniser.

transformers is given the decoder's weights and the embeddings of what was heard, so both sides read
the same. Of its own ways of drafting those take part that it accepts such a prompt for; what it
says to the others is kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from offramp.audio.io import read_audio
from offramp.bench.speech_lm_quality import Way
from offramp.bench.wer import as_reference
from offramp.data.manifest import Utterance
from offramp.decoding.ctc import text
from offramp.decoding.early_exit_ctc import EarlyExitOptions, early_exit
from offramp.decoding.exit_policies import FixedExit
from offramp.decoding.speech_lm import PartTimes, SpeechText, most_tokens
from offramp.errors import InputError
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hf_checkpoint import quiet
from offramp.models.hub import save_decoder
from offramp.models.speech_lm import Heard, SpeechLM
from offramp.recognizer import Recognizer
from offramp.results import DecoderCounts
from offramp.speech_lm_recognizer import SpeechLMRecognizer

GREEDY = "transformers"
NEAR_TIE = 1e-3  # logits so near: rounding in float32 chooses
_LOOKED_UP = 10  # tokens that prompt lookup drafts, as in transformers' own documentation


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "bench speech-llm compares with transformers; pip install 'offramp[hf]'"
        ) from error
    return transformers


class TransformersDecoder:
    """The decoder of a Speech-LM as transformers' model; utterances one by one, on the CPU."""

    def __init__(self, recognizer: SpeechLMRecognizer) -> None:
        transformers = import_transformers()
        self.version: str = transformers.__version__
        self._recognizer, decoder = recognizer, recognizer.model.decoder
        assert isinstance(decoder, DecoderLM), "we know of no other"
        with TemporaryDirectory() as folder, quiet():
            save_decoder(decoder, Path(folder) / "decoder")
            made = transformers.AutoModelForCausalLM.from_pretrained(
                Path(folder) / "decoder", dtype=decoder.dtype
            )
        self._model, self._config = made.eval(), transformers.GenerationConfig
        # The ways of drafting that need no second model.
        exit_layer = max(1, decoder.config.num_layers // 3)
        self._drafting: dict[str, dict[str, int]] = {
            f"{GREEDY}_prompt_lookup": {"prompt_lookup_num_tokens": _LOOKED_UP},
            f"{GREEDY}_early_exit": {"assistant_early_exit": exit_layer},
        }

    def ways(self, samples: Tensor) -> tuple[dict[str, Way], dict[str, str]]:
        """(greedy and the ways of drafting that it accepts, what it says to the others), tried on
        one utterance."""
        accepted: dict[str, Way] = {GREEDY: partial(self._decode, self._model, {})}
        refused = {}
        for name, settings in self._drafting.items():
            # A model of its own: one whose early exit has failed stays without its upper layers.
            way = partial(self._decode, copy.deepcopy(self._model), settings)
            try:
                way([samples])
            except Exception as error:  # whatever it says is the finding
                refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            else:
                accepted[name] = way
        return accepted, refused

    @torch.inference_mode()
    def _decode(
        self, theirs: Any, settings: Mapping[str, int], samples: Sequence[Tensor]
    ) -> tuple[list[SpeechText], PartTimes]:
        model = self._recognizer.model
        began = time.perf_counter()
        inputs, lengths = self._recognizer.reader.inputs(samples)
        heard = model.hear(inputs, lengths)
        listened = time.perf_counter()
        most = most_tokens(model, heard, lengths)
        first = model.decoder.embed(torch.tensor([[model.first_token]]))[0]
        prefixes = [torch.cat((prefix, first)) for prefix in model.prefixes(heard)]
        made = [self._generate(theirs, settings, *x) for x in zip(prefixes, most, strict=True)]
        times = PartTimes(listened - began, 0.0, time.perf_counter() - listened)
        return [self._written(tokens) for tokens in made], times

    def _generate(
        self, theirs: Any, settings: Mapping[str, int], prompt: Tensor, most: int
    ) -> list[int]:
        eos = list(self._recognizer.model.config.decoder.eos_ids)
        theirs.generation_config = self._config(
            do_sample=False, max_new_tokens=most, eos_token_id=eos, pad_token_id=eos[0]
        )
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        with quiet():
            made = theirs.generate(inputs_embeds=prompt[None], attention_mask=mask, **settings)
        tokens: list[int] = made[0].tolist()  # of embeddings it returns what is new alone
        return tokens

    def _written(self, made: Sequence[int]) -> SpeechText:
        eos = self._recognizer.model.config.decoder.eos_ids
        tokens = tuple(token for token in made if token not in eos)
        ended = len(tokens) < len(made)
        parts = (self._recognizer.tokenizer.decode(list(tokens)),)
        counts = DecoderCounts(len(made), len(made))  # of greedy decoding; drafts' are not told
        return SpeechText(tokens, parts, None, (), counts, "stop" if ended else "length")


@torch.inference_mode()
def gap(
    recognizer: SpeechLMRecognizer, samples: Tensor, ours: SpeechText, other: SpeechText
) -> float:
    """Where two texts of an utterance part, how far the decoder's logits of their tokens are apart.

    Near 0 where rounding chose between two about equal ones; 0 if they do not part.
    """
    model = recognizer.model
    a, b = (_with_end(model, text) for text in (ours, other))
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if common is None:
        return 0.0
    heard: Heard = model.hear(*recognizer.reader.inputs([samples]))
    state = model.read(heard, [a[:common]])[:, -1:]
    logits = model.decoder.logits(state, model.config.decoder.num_layers)[0, 0]
    return float((logits[a[common]] - logits[b[common]]).abs())


def _with_end(model: SpeechLM, text: SpeechText) -> list[int]:
    """With the token that ended it, if one did."""
    end = model.config.decoder.eos_ids[:1] if text.finish_reason == "stop" else ()
    return [*text.tokens, *end]


@torch.inference_mode()
def recognized(model: str, utterances: Sequence[Utterance]) -> list[str]:
    """What the last exit of a CTC recogniser writes, greedily, normalised as references are."""
    recognizer = Recognizer.load(model)
    config, written = recognizer.config, []
    options = EarlyExitOptions(config.blank_id)
    for utterance in utterances:
        samples = read_audio(utterance.path)
        if not recognizer.reader.num_inputs(len(samples)):
            written.append("")
            continue
        inputs = recognizer.inputs([samples])
        (made,) = early_exit(recognizer.encoder, config.exits, *inputs, FixedExit(), options)
        written.append(as_reference(text(made.hypothesis.tokens, recognizer.pieces)))
    return written
