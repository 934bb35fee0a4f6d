"""A language model that hears: encoder, projector, decoder tower, and heads for more tokens.

The audio becomes embeddings that stand in the prompt like those of tokens (Speech-LLaMA, arXiv
2307.11795); from there on the decoder is the tower that it is without them. All rows begin at
position 0 and end where they end: what pads a batch stands behind what is real, where a causal
decoder never looks, so an utterance gives in a batch what it gives alone. Encoder and decoder are
given, and neither knows of the other; a cache is the decoder's alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from offramp.config import EncoderConfig
from offramp.config_speech_lm import AUDIO, EncoderShape, SpeechLMConfig
from offramp.errors import ConfigError, InputError
from offramp.nn.device import upload
from offramp.nn.heads import Heads, build_heads
from offramp.nn.layers import View
from offramp.nn.projector import AnyProjector, CTCProjector, build_projector, token_runs
from offramp.nn.tower import Tower
from offramp.tokenizer import TextTokenizer

Padding = Literal["right", "left"]


class SpeechEncoder(Protocol):
    """An encoder with CTC exits, ours or a transformers model's; an `nn.Module` too.

    One whose inputs have their time elsewhere than in axis 1 says so in a `time_axis`.
    """

    @property
    def config(self) -> EncoderShape: ...

    def embed(self, inputs: Tensor, lengths: Tensor, /) -> Any: ...

    def run(self, state: Any, start: int, stop: int) -> Any: ...

    def log_probs(self, state: Any, exit_layer: int) -> Tensor: ...


class TextDecoder(Tower, Protocol):
    """A tower that also runs over whole sequences, for training; an `nn.Module` too."""

    def view(self, num_tokens: int) -> View: ...

    def layer(self, index: int, h: Tensor, view: View) -> Tensor: ...


@dataclass(frozen=True)
class PromptTokens:
    """What stands before and after the audio; the last token after it is the one to go on from."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, config: SpeechLMConfig, tokenizer: TextTokenizer) -> PromptTokens:
        """`config.prompt` in tokens; ConfigError: `tokenizer` cannot write it for the decoder."""
        size, decoder = tokenizer.vocab_size, config.decoder
        if size > decoder.vocab_size:
            raise ConfigError(
                f"the tokenizer has {size} tokens and the decoder {decoder.vocab_size}; give the "
                "decoder's own"
            )
        texts = config.prompt.split(AUDIO)
        before, after = (tuple(tokenizer.encode(text, special=False)) for text in texts)
        for text, tokens in zip(texts, (before, after), strict=True):
            if text and not tokens:
                raise ConfigError(f"the tokenizer has no tokens for {text!r} of the prompt")
        ends = [t for t in (decoder.bos_id, *decoder.eos_ids) if t is not None and t >= size]
        if ends:
            raise ConfigError(
                f"the tokenizer has {size} tokens and none for {ends}, which begin or end the "
                "decoder's texts; give the decoder's own"
            )
        if not texts[1]:
            assert decoder.bos_id is not None  # SpeechLMConfig sees to it
            after = (decoder.bos_id,)
        return cls(before, after)

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True)
class Heard:
    """What the decoder is to know of a batch of utterances.

    audio: embeddings [N_b, D] for each. ctc_log_probs: float32 [B, T', V] of the exit that drafts;
    None: none does, or it was not read. frames: int64 [B], how many of T' are real. exits:
    log-probabilities [B, T', V] of every exit that was read.
    """

    audio: list[Tensor]
    ctc_log_probs: Tensor | None
    frames: Tensor
    exits: Mapping[int, Tensor]


class SpeechLM(nn.Module):
    """`hear` speech, and decode with `decoder` from `prefixes` and `first_token` on."""

    encoder: SpeechEncoder
    decoder: TextDecoder
    heads: Heads | None

    def __init__(
        self,
        config: SpeechLMConfig,
        prompt: PromptTokens,
        encoder: SpeechEncoder,
        decoder: TextDecoder,
        projector: AnyProjector | None = None,
    ) -> None:
        """projector: None: a new one. ConfigError: `config` is not of that encoder or decoder."""
        super().__init__()
        config.check_drafting(encoder.config)
        own = encoder.config if isinstance(encoder.config, EncoderConfig) else None
        for name, wanted, got in (
            ("encoder", config.encoder, own),
            ("decoder", config.decoder, decoder.config),
        ):
            if wanted != got:
                raise ConfigError(f"the {name} given is {got}; the Speech-LM's is {wanted}")
        self.config, self.prompt = config, prompt
        self.encoder, self.decoder = encoder, decoder
        width = config.decoder.d_model
        if projector is None:
            projector = build_projector(config.projector, encoder.config.d_model, width)
        self.projector = projector
        if (room := self.room(1)) < 1:
            limit = config.decoder.max_positions
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, and the decoder has {limit} positions for "
                f"prompt, audio and text; make it one of at most {len(prompt) - 1 + room}"
            )
        self.heads = None if config.heads is None else build_heads(config.heads, config.decoder)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def first_token(self) -> int:
        """The last token of the prompt, which heads decoding."""
        return self.prompt.after[-1]

    # -- hearing -----------------------------------------------------------------------------

    def hear(
        self,
        inputs: Tensor,
        lengths: Tensor,
        exits: Sequence[int] | None = None,
        padding: Padding = "right",
    ) -> Heard:
        """What the encoder reads, of which `lengths` [B] are real -> what the decoder is to know.

        exits: whose CTC to read; None: the one that drafts alone, which is read in any case if the
        projector goes by it. No layer runs twice. padding: on which side of the real inputs it
        stands. InputError: an utterance is too long for the decoder, or too short for the encoder.
        """
        self._check_room(lengths)
        inputs = self._padded_right(inputs, lengths, padding)
        drafting = self.config.ctc_exit
        if exits is None:
            exits = () if drafting is None else (drafting,)
        if drafting is not None and self.config.projector.kind == "ctc":
            exits = (*exits, drafting)
        state, read = self.encoder.embed(inputs, lengths), {}
        for exit_layer in sorted(set(exits)):
            state = self.encoder.run(state, state.layer, exit_layer)
            read[exit_layer] = self.encoder.log_probs(state, exit_layer)
        state = self.encoder.run(state, state.layer, self.encoder.config.num_layers)
        log_probs = None if drafting is None else read.get(drafting)
        audio = self._audio(state.h, state.lengths, log_probs)
        return Heard(audio, log_probs, state.lengths, read)

    def _padded_right(self, inputs: Tensor, lengths: Tensor, padding: Padding) -> Tensor:
        """`inputs` with all that is real of each row at its beginning."""
        if padding not in ("right", "left"):
            raise InputError(f"padding is {padding!r}; it must be 'right' or 'left'")
        axis: int = getattr(self.encoder, "time_axis", 1)
        fits = inputs.ndim > axis and lengths.shape == inputs.shape[:1]
        if padding == "right" or not fits:  # of what does not fit the encoder says why
            return inputs
        pairs = zip(inputs, lengths.tolist(), strict=True)
        return torch.stack([row.roll(n - row.shape[axis - 1], axis - 1) for row, n in pairs])

    def _audio(self, h: Tensor, lengths: Tensor, log_probs: Tensor | None) -> list[Tensor]:
        """The embeddings [N_b, D] of each utterance, of the encoder's last state h [B, T', D']."""
        if not isinstance(self.projector, CTCProjector):
            counts = map(self.projector.output_frames, lengths.tolist())
            projected = self.projector(h, lengths)
            return [row[:n] for row, n in zip(projected, counts, strict=True)]
        assert log_probs is not None, "SpeechLMConfig sees to it"
        best = zip(log_probs.argmax(-1), lengths.tolist(), strict=True)
        labels = [row[:n] for row, n in best]
        begins = [token_runs(row, self.encoder.config.blank_id) for row in labels]
        audio = self.projector(h, lengths, begins)
        return [
            x + self._spelled(row[at]) for x, row, at in zip(audio, labels, begins, strict=True)
        ]

    def _spelled(self, labels: Tensor) -> Tensor:
        """The decoder's own embeddings [N, D] of CTC's labels [N]; zeros for the blank."""
        blank = labels == self.encoder.config.blank_id
        embedded = self.decoder.embed(labels.masked_fill(blank, 0)[None])[0]
        return embedded.masked_fill(blank[:, None], 0.0)

    def prefixes(self, heard: Heard) -> list[Tensor]:
        """Embeddings [m_b, D] of all that stands before `first_token`."""
        before = self._embed(self.prompt.before)
        after = self._embed(self.prompt.after[:-1])
        return [torch.cat((before, audio, after)) for audio in heard.audio]

    def room(self, num_inputs: int) -> int:
        """Tokens that the decoder has room for after an utterance of `num_inputs` and the prompt;
        none where that is not positive."""
        frames = self.encoder.config.output_frames(num_inputs)
        taken = len(self.prompt) + self.projector.output_frames(frames)
        return self.config.decoder.max_positions - taken

    def longest(self, num_tokens: int, num_inputs: int) -> int:
        """The longest utterance, up to `num_inputs`, with room for `num_tokens` of text; 0: none.

        For cutting long audio into pieces that fit.
        """
        fits = range(1, num_inputs + 1)
        return bisect.bisect_right(fits, -num_tokens, key=lambda n: -self.room(n))

    # -- training ----------------------------------------------------------------------------

    def read(self, heard: Heard, texts: Sequence[Sequence[int]]) -> Tensor:
        """The top layer's state [B, U + 1, D] where it reads `first_token` and each of a text's
        tokens, U of the longest text; zeros behind a shorter one.

        Position t is to predict token t of the text, the last one its end. InputError: an utterance
        and its text are too long for the decoder.
        """
        last = self.config.decoder.num_layers
        return self.read_exits(heard, texts, (last,))[last]

    def read_exits(
        self, heard: Heard, texts: Sequence[Sequence[int]], exits: Collection[int]
    ) -> dict[int, Tensor]:
        """Exit -> what `read` gives, as it is after so many layers of the decoder."""
        prefixes = self.prefixes(heard)
        counts = [len(text) + 1 for text in texts]
        self._check_texts(prefixes, counts)
        tokens = self._embed([t for text in texts for t in (self.first_token, *text)])
        embedded = torch.split(tokens, counts)
        rows = [torch.cat(pair) for pair in zip(prefixes, embedded, strict=True)]
        h = pad_sequence(rows, batch_first=True)
        view, found = self.decoder.view(h.shape[1]), {}
        for layer in range(1, max(exits) + 1):
            h = self.decoder.layer(layer - 1, h, view)
            if layer in exits:
                spans = zip(h, map(len, prefixes), counts, strict=True)
                read = [row[at : at + n] for row, at, n in spans]
                found[layer] = pad_sequence(read, batch_first=True)
        return found

    # -- parts -------------------------------------------------------------------------------

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """[n, D]"""
        return self.decoder.embed(upload([list(tokens)], self.device))[0]

    def _check_room(self, lengths: Tensor) -> None:
        longest = int(lengths.max()) if len(lengths) else 0
        if (room := self.room(longest)) < 1:
            limit = self.config.decoder.max_positions
            raise InputError(
                f"an utterance of {longest} input frames takes {limit - room} positions with the "
                f"prompt, and the decoder has {limit}; cut it into pieces of at most "
                f"{self.longest(1, longest)}"
            )

    def _check_texts(self, prefixes: Sequence[Tensor], counts: Sequence[int]) -> None:
        if len(prefixes) != len(counts):
            raise InputError(
                f"there are {len(counts)} texts for {len(prefixes)} utterances; give one each"
            )
        limit = self.config.decoder.max_positions
        needed = max(len(p) + n for p, n in zip(prefixes, counts, strict=True))
        if needed > limit:
            raise InputError(
                f"an utterance and its text take {needed} positions, and the decoder has {limit}; "
                "leave it out"
            )
