"""A toy Speech-LM: random weights, every part matters, milliseconds per test."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import toy
import toy_encoder
from offramp.config_speech_lm import HeadsConfig, ProjectorConfig, SpeechLMConfig
from offramp.models.ctc import CTCEncoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.speech_lm import PromptTokens, SpeechLM
from offramp.models.speech_lm_checkpoint import SpeechLMCheckpoint
from offramp.tokenizer import BOS, EOS, TextTokenizer

V = 61  # the decoder's tokens; the encoder's CTC has the blank behind them
BOS_ID, EOS_ID = 0, 1
WORDS = [f"w{i}" for i in range(2, V)]  # each its own token, w7 is token 7
LENGTHS = [61, 23, 40]  # feature frames of three utterances
TEXTS = [[5, 9, 9, 2], [], [44, 60]]  # what was said in them

# Every part of the configuration on its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "audio alone": {},
    "text after the audio": {"prompt": "{audio} w7 w8 w9"},
    "one token after the audio": {"prompt": "{audio} w7"},
    "text before and after": {"prompt": f"{BOS} w3 {{audio}} w4 w5"},
    "text before": {"prompt": "w3 w4 {audio}"},
    "every frame": {"projector": ProjectorConfig(stack=1, d_hidden=20)},
    "many frames stacked": {"projector": ProjectorConfig(stack=7, d_hidden=20)},
    "latent heads": {"heads": HeadsConfig()},
    "independent heads": {"heads": HeadsConfig(3, "independent", draft_vocab=17)},
    "drafts at the last exit": {"ctc_exit": 5},
    "drafts at an early exit": {"ctc_exit": 3},
    "by the tokens of CTC": {"projector": ProjectorConfig(1, 20, "ctc"), "ctc_exit": 3},
}
# By the default suite, of large matrices.
KEPT = ("text before and after", "every frame", "independent heads", "by the tokens of CTC")


def config(**changes: Any) -> SpeechLMConfig:
    """`encoder` and `decoder` as changes are changes to theirs."""
    own = {"vocab_size": V + 1, "blank_id": V}
    encoder = toy_encoder.config(**(toy_encoder.OURS | own | changes.pop("encoder", {})))
    named = {"bos_id": BOS_ID, "eos_ids": (EOS_ID,)}
    decoder = toy.config(**(named | changes.pop("decoder", {})))
    projector = changes.pop("projector", ProjectorConfig(stack=3, d_hidden=24))
    return SpeechLMConfig(encoder, projector, decoder, **changes)


def tokenizer(words: list[str] | None = None) -> TextTokenizer:
    """One token for each of `words` (None: `WORDS`), and those that begin and end a text."""
    vocab = {word: i for i, word in enumerate([BOS, EOS, *(words or WORDS)])}
    made = Tokenizer(models.WordLevel(vocab))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return TextTokenizer(made)


def checkpoint(seed: int = 0, **changes: Any) -> SpeechLMCheckpoint:
    """As `speech_lm`, with its tokenizer."""
    settings, tokens = config(**changes), tokenizer()
    assert settings.encoder is not None
    encoder, decoder = CTCEncoder(settings.encoder), DecoderLM(settings.decoder)
    model = SpeechLM(settings, PromptTokens.of(settings, tokens), encoder, decoder)
    toy.randomize(model, seed)
    toy_encoder.randomize(encoder, seed)
    return SpeechLMCheckpoint(model.requires_grad_(False).eval(), tokens)


def varied(seed: int = 1, ending: float = 1.6, **changes: Any) -> SpeechLMCheckpoint:
    """As `checkpoint`, but its texts do not settle on one token; the higher `ending`, the sooner
    they end."""
    made = checkpoint(seed, **changes)
    decoder = made.model.decoder
    assert isinstance(decoder, DecoderLM) and decoder.unembedding is not None
    for layer in decoder.layers:
        for p in layer.parameters():
            if p.ndim >= 2:
                p.mul_(3.0)
    decoder.unembedding.weight[EOS_ID] *= ending
    return made


def speech_lm(seed: int = 0, **changes: Any) -> SpeechLM:
    """A Speech-LM with random weights and statistics, in eval mode, without gradients."""
    return checkpoint(seed, **changes).model
