"""The shape of a Speech-LM, joined from an encoder, a projector, a decoder and heads.

Standard library only, as `config.py`, whose checks it uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from offramp.config import DecoderConfig, EncoderConfig, check_choice, check_counts, strict
from offramp.errors import ConfigError

AUDIO = "{audio}"  # where the audio stands in a prompt


class EncoderShape(Protocol):
    """What a Speech-LM asks of its encoder's configuration, ours or a transformers model's."""

    @property
    def d_model(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def exits(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def blank_id(self) -> int: ...

    def output_frames(self, num_inputs: int, /) -> int: ...


@dataclass(frozen=True)
class ProjectorConfig:
    """From encoder frames to the decoder's embeddings, through one hidden layer of `d_hidden`.

    kind: `stack`: so many frames side by side become one embedding. `ctc`: each token that the
    CTC of `ctc_exit` wrote does, with the frames up to the next one; stack is then 1.
    """

    stack: int
    d_hidden: int
    kind: Literal["stack", "ctc"] = "stack"

    def __post_init__(self) -> None:
        check_counts(1, stack=self.stack, d_hidden=self.d_hidden)
        check_choice(kind=(self.kind, ("stack", "ctc")))
        if self.kind == "ctc" and self.stack != 1:
            raise ConfigError(
                f"stack is {self.stack}, and a projector of kind ctc goes by tokens; set stack to 1"
            )


@dataclass(frozen=True)
class HeadsConfig:
    """Heads that each predict one more token from the same hidden state (arXiv 2409.08148).

    count: K, the decoder's own head among them. kind: `latent` (a matrix of d_model x d_model per
    head, then the decoder's own norm and un-embedding) or `independent` (an un-embedding per head).
    draft_vocab: heads 2 to K know the first so many tokens alone; None: all.
    """

    count: int = 4
    kind: Literal["latent", "independent"] = "latent"
    draft_vocab: int | None = None

    def __post_init__(self) -> None:
        check_counts(2, count=self.count)
        check_choice(kind=(self.kind, ("latent", "independent")))
        if self.draft_vocab is not None:
            check_counts(1, draft_vocab=self.draft_vocab)


@dataclass(frozen=True)
class SpeechLMConfig:
    """A decoder that hears: encoder, projector, decoder and, on its last state, heads.

    encoder: None for a transformers model, which brings a configuration of its own. prompt: text
    in the decoder's tokens, special ones by name, with `{audio}` where the audio stands; where
    nothing follows the audio, the decoder's BOS does. ctc_exit: the exit of the encoder that drafts
    in the decoder's tokens; None: its CTC vocabulary is another, and drafts nothing.
    """

    encoder: EncoderConfig | None
    projector: ProjectorConfig
    decoder: DecoderConfig
    heads: HeadsConfig | None = None
    prompt: str = AUDIO
    ctc_exit: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if not isinstance(self.prompt, str) or self.prompt.count(AUDIO) != 1:
            raise ConfigError(
                f"prompt is {self.prompt!r}; it must have {AUDIO} once, where the audio stands"
            )
        if self.projector.kind == "ctc" and self.ctc_exit is None:
            raise ConfigError(
                "the projector is of kind ctc, and no CTC writes the decoder's tokens; set "
                "ctc_exit, or kind to stack"
            )
        decoder, heads = self.decoder, self.heads
        if self.prompt.endswith(AUDIO) and decoder.bos_id is None:
            raise ConfigError(
                f"prompt is {self.prompt!r}, and the decoder has no bos_id to start the text with; "
                f"let text follow {AUDIO}"
            )
        if not decoder.eos_ids:
            raise ConfigError("the decoder has no eos_ids; name the token that ends a transcript")
        if heads is not None and (heads.draft_vocab or 1) > decoder.vocab_size:
            raise ConfigError(
                f"draft_vocab is {heads.draft_vocab}; the decoder has {decoder.vocab_size} tokens"
            )
        if self.encoder is not None:
            self.check_drafting(self.encoder)

    def _check_types(self) -> None:
        if not isinstance(self.encoder, EncoderConfig | None):
            raise ConfigError(f"encoder is {self.encoder!r}; it must be an EncoderConfig or None")
        if not isinstance(self.projector, ProjectorConfig):
            raise ConfigError(f"projector is {self.projector!r}; it must be a ProjectorConfig")
        if not isinstance(self.decoder, DecoderConfig):
            raise ConfigError(f"decoder is {self.decoder!r}; it must be a DecoderConfig")
        if not isinstance(self.heads, HeadsConfig | None):
            raise ConfigError(f"heads are {self.heads!r}; they must be a HeadsConfig or None")

    def check_drafting(self, encoder: EncoderShape) -> None:
        """ConfigError unless `ctc_exit` of `encoder` writes the decoder's tokens, by their ids.

        Its vocabulary is then the decoder's and, as the last id, the blank.
        """
        if self.ctc_exit is None:
            return
        check_counts(1, ctc_exit=self.ctc_exit)
        if self.ctc_exit not in encoder.exits:
            raise ConfigError(
                f"ctc_exit is {self.ctc_exit}; the encoder has the exits "
                f"{', '.join(map(str, encoder.exits))}"
            )
        V = self.decoder.vocab_size
        if (encoder.vocab_size, encoder.blank_id) != (V + 1, V):
            raise ConfigError(
                f"ctc_exit is {self.ctc_exit}, and the encoder's CTC head has "
                f"{encoder.vocab_size} tokens, blank {encoder.blank_id}; to draft it must have the "
                f"decoder's {V} tokens and a blank, {V}: set new_ctc_head, or leave ctc_exit out"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Strict: an unknown or missing key is an error that names it."""
        values = dict(values)
        if isinstance(values.get("encoder"), Mapping):
            values["encoder"] = EncoderConfig.from_dict(values["encoder"])
        if isinstance(values.get("decoder"), Mapping):
            values["decoder"] = DecoderConfig.from_dict(values["decoder"])
        if isinstance(values.get("projector"), Mapping):
            values["projector"] = strict(ProjectorConfig, values["projector"])
        if isinstance(values.get("heads"), Mapping):
            values["heads"] = strict(HeadsConfig, values["heads"])
        return strict(cls, values)
