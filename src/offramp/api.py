"""The public calls: load a model, generate or stream text from it; turn speech into text, whole
or as it comes.

    model = offramp.load("lm-tiny")
    print(model.generate("The count opened the").text)
    print(offramp.transcribe("talk.flac").text)
    for event in offramp.stream("talk.flac"):
        print(event)

Drafting is on by default where the checkpoint says what drafts well, and never changes the
text. Thin by design: the work is in `decoding/`.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch

from offramp.audio.io import Source
from offramp.audio.live import open_source
from offramp.compress.checkpoint import load_model
from offramp.config import DecoderConfig
from offramp.decoding.drafts import (
    AdaptiveExitDraft,
    Draft,
    EarlyExitDraft,
    ModelDraft,
    NGramDraft,
    NoDraft,
    check_exit_layer,
)
from offramp.decoding.exits import RoundCosts
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import RowEnd, Stop
from offramp.decoding.stream_plan import StreamOptions
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.models import hub
from offramp.models.decoder_lm import DecoderLM
from offramp.nn.device import choose_device
from offramp.nn.tower import Tower, TracedTower, TruncatedTower
from offramp.recognizers import AnyOptions, transcriber
from offramp.results import DecodeStats, DraftCounts, FinishReason, Generation, Step, Transcript
from offramp.stream_events import Event
from offramp.streaming import StreamingRecognizer
from offramp.tokenizer import TextStream, TextTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Looking at a drafted token costs little on a CPU; on a GPU the host would wait every time.
_MIN_CONFIDENCE_ON_CPU = 0.6
DRAFTS = ("exit", "adaptive", "ngram", "model", "none")
DraftKind = Literal["exit", "adaptive", "ngram", "model", "none"]


@dataclass(frozen=True)
class DraftOptions:
    """How to draft. exit_layer and num_draft_tokens None: what the checkpoint recommends
    (offramp.json), else a third of the tower and 6 tokens.

    kind: `exit` (lower layers, fixed), `adaptive` (exit and length chosen per round, plain
    decoding where drafting does not pay), `ngram` (look in the text so far), `model` (a smaller
    checkpoint, `model`), `none` (plain decoding), or a `Draft` of your own. None: `exit` where
    an exit layer is given or recommended, else `adaptive`. min_confidence: with `exit` and
    `adaptive`, stop a draft at a token less probable than this; None: 0.6 on a CPU, 0 (never) on
    a GPU.
    """

    kind: DraftKind | Draft | None = None
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    min_confidence: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.kind, str) and self.kind not in DRAFTS:
            raise InputError(f"draft is {self.kind!r}; allowed: {', '.join(DRAFTS)}")
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise InputError(
                f"num_draft_tokens is {self.num_draft_tokens}; it must be at least 1 "
                "(plain decoding is draft 'none')"
            )
        if self.exit_layer is not None and self.kind not in (None, "exit", "adaptive"):
            raise InputError(
                f"an exit layer is of no use to draft {self.kind!r}; leave one of them out"
            )
        if self.min_confidence is not None and self.kind not in (None, "exit", "adaptive"):
            raise InputError(
                f"min_confidence is of no use to draft {self.kind!r}; leave one of them out"
            )
        if (self.kind == "model") != (self.model is not None):
            raise InputError(
                "draft 'model' and a draft model (--draft-model) go together; give both or neither"
            )


def load(
    model: str | Path, *, device: str = "cpu", dtype: str = "float32", tokenizer: bool = True
) -> Model:
    """A checkpoint, compressed or not, as a model: one that ships by name, a folder, or a hub id.

    dtype: `float32`, `bfloat16` or `float16`, of weights and computation; the first alone for
    quantised weights. tokenizer=False loads a folder without one; prompts are then lists of token
    ids and there is no text. Raises CheckpointError or ConfigError for what cannot be loaded.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    folder = hub.resolve(str(model))
    tower = load_model(DecoderLM, folder, choose_device(device), DTYPES[dtype])
    text = TextTokenizer.load(folder / "tokenizer.json") if tokenizer else None
    return Model(tower, text, hub.load_defaults(folder))


class Model:
    """A decoder tower with its tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        tower: Tower,
        tokenizer: TextTokenizer | None,
        defaults: hub.DraftDefaults | None = None,
    ) -> None:
        self.tower, self.tokenizer = tower, tokenizer
        self.defaults = defaults or hub.DraftDefaults()
        self._costs: RoundCosts | None = None
        self._draft_towers: dict[str, Tower] = {}

    @property
    def config(self) -> DecoderConfig:
        return self.tower.config

    @overload
    def generate(
        self,
        prompt: str | list[int],
        *,
        sampling: Sampling = ...,
        draft: DraftOptions = ...,
        stop: Stop | None = ...,
        early_exit: int | None = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        sampling: Sampling = ...,
        draft: DraftOptions = ...,
        stop: Stop | None = ...,
        early_exit: int | None = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | list[int] | list[str] | list[list[int]],
        *,
        sampling: Sampling = Sampling(),
        draft: DraftOptions = DraftOptions(),
        stop: Stop | None = None,
        early_exit: int | None = None,
    ) -> Generation | list[Generation]:
        """Text for one prompt, or for a list of prompts decoded as one batch.

        prompt: text or token ids. stop: default 256 tokens or the checkpoint's end of text.
        early_exit: leave the tower after this layer for every token: faster, another text, and
        no drafting. Row i of a batch draws its own noise: in sampling, equal prompts in one batch
        give different texts. Raises InputError for an empty prompt or one that
        does not fit the context.
        """
        one = isinstance(prompt, str) or (len(prompt) > 0 and hasattr(prompt[0], "__index__"))
        prompts = [prompt] if one else list(prompt)
        run = Run(self, prompts, sampling, draft, stop, early_exit)  # type: ignore[arg-type]
        for _ in run:
            pass
        return run.generations[0] if one else run.generations

    def stream(
        self,
        prompt: str | list[int],
        *,
        sampling: Sampling = Sampling(),
        draft: DraftOptions = DraftOptions(),
        stop: Stop | None = None,
        early_exit: int | None = None,
    ) -> Run:
        """The same for one prompt, as it comes: iterate for `Step`s, then `.generations[0]`."""
        return Run(self, [prompt], sampling, draft, stop, early_exit)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, checked. InputError if there are none or one is out of range."""
        if not isinstance(prompt, str):
            ids = [operator.index(i) for i in prompt]
        elif self.tokenizer is None:
            raise InputError("the model was loaded without a tokenizer; give token ids")
        elif not prompt:
            raise InputError("the prompt is empty; give at least one word")
        else:
            ids = self.tokenizer.encode(prompt)
        if not ids:
            raise InputError("the prompt has no tokens; give at least one")
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise InputError(
                f"token {bad[0]} is not in the vocabulary of {self.config.vocab_size}; "
                "the tokenizer and the weights are not of one checkpoint"
            )
        return ids

    def make_draft(self, options: DraftOptions) -> tuple[Draft, int]:
        """(draft, tokens per round at most) for `options`, with the checkpoint's defaults."""
        L, eos = self.config.num_layers, frozenset(self.config.eos_ids)
        exit_layer = options.exit_layer or self.defaults.exit_layer
        d = options.num_draft_tokens or self.defaults.num_draft_tokens or 6
        kind = options.kind or ("adaptive" if exit_layer is None else "exit")
        if not isinstance(kind, str):
            return kind, d
        if options.exit_layer is not None:
            check_exit_layer(options.exit_layer, L)
        confidence = options.min_confidence
        if confidence is None:
            confidence = _MIN_CONFIDENCE_ON_CPU if self.tower.device.type == "cpu" else 0.0
        if kind == "exit":
            return EarlyExitDraft(exit_layer or max(1, L // 3), L, confidence, eos), d
        if kind == "adaptive" and L > 1:
            exits = [options.exit_layer] if options.exit_layer else candidate_exits(L)
            draft = AdaptiveExitDraft(exits, L, self.costs(), confidence, eos)
            return draft, options.num_draft_tokens or 8
        if kind == "ngram":
            return NGramDraft(), d
        if kind == "model":
            assert options.model is not None, "DraftOptions checks it"
            return ModelDraft(self._draft_tower(options.model)), d
        return NoDraft(), 1

    def _draft_tower(self, name: str) -> Tower:
        """The draft model `name`, loaded once."""
        if name not in self._draft_towers:
            folder = hub.resolve(name)
            loaded = load_model(DecoderLM, folder, self.tower.device, self.tower.dtype)
            self._draft_towers[name] = loaded
        return self._draft_towers[name]

    def costs(self) -> RoundCosts:
        """What rounds cost on this machine, measured once."""
        if self._costs is None:
            self._costs = RoundCosts.measure(self.tower)
        return self._costs


def transcribe(
    source: Source,
    *,
    model: str | Path = "asr-tiny",
    options: AnyOptions | None = None,
    device: str = "cpu",
) -> Transcript:
    """The text of a recording: a path, "-" for standard input, or a binary file object.

    model: a shipped name, a folder or a hub id. options: `TranscribeOptions`, for a Speech-LM
    `SpeechLMOptions`. For many recordings, or segments as they come, keep a `Recognizer` or a
    `SpeechLMRecognizer`. Raises AudioError, and CheckpointError for what is no recogniser.
    """
    return transcriber(model, options, device)(source).complete()


def stream(
    source: Source,
    *,
    model: str | Path = "stream-tiny",
    options: StreamOptions | None = None,
    device: str = "cpu",
) -> Iterator[Event]:
    """What is said in a recording as it comes: `Partial`, `Final` and `Endpoint` events.

    source: a path, a binary file object, or "-" for standard input: WAV, or 16-bit
    samples at 16 kHz, mono. For blocks of samples of your own, and several streams, keep a
    `StreamingRecognizer`. Faults of the model and the options show here, those of the audio where
    they are reached, after what was said before them.
    """
    blocks, rate = open_source(source)
    return StreamingRecognizer.load(model, device=device).stream(blocks, options, rate)


def candidate_exits(num_layers: int) -> list[int]:
    """Exits worth comparing: an eighth, a quarter, three eighths and half of the tower."""
    return sorted({max(1, round(num_layers * share / 8)) for share in (1, 2, 3, 4)})


class Run:
    """One decoding run: an iterator of `Step`s that knows its results when it has ended."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str | list[int]],
        sampling: Sampling,
        draft: DraftOptions,
        stop: Stop | None,
        early_exit: int | None,
    ) -> None:
        if not prompts:
            raise InputError("there is no prompt; give at least one")
        self._model, self._prompts, self._sampling = model, prompts, sampling
        self._texts = [model.encode(p) for p in prompts]
        self._stops = [_stop_within_context(model, text, stop) for text in self._texts]
        tower = model.tower
        if early_exit is not None:
            if draft != DraftOptions():
                raise InputError(
                    f"early_exit {early_exit} leaves the tower for every token, and a draft was "
                    "given too; choose one"
                )
            tower, draft = TruncatedTower(tower, early_exit), DraftOptions("none")
        self._trace = Trace(tower.config.num_layers)
        self._tower = TracedTower(tower, self._trace)
        began = time.perf_counter()
        self._draft, self._k = model.make_draft(draft)
        # Measuring what rounds cost, for an adaptive draft, is part of this run's time.
        self._seconds, self._ttft = time.perf_counter() - began, 0.0
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._text = [""] * len(prompts)
        self._reasons: list[FinishReason | None] = [None] * len(prompts)
        self._drafts, self._verify_calls = DraftCounts(), 0
        self._steps = self._timed()

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    @property
    def generations(self) -> list[Generation]:
        """One per prompt; InputError while the run has not ended."""
        out = []
        for prompt, tokens, text, reason in zip(
            self._prompts, self._tokens, self._text, self._reasons, strict=True
        ):
            if reason is None:
                raise InputError("the run has not ended; iterate over it first")
            shown = prompt if isinstance(prompt, str) else ""
            out.append(Generation(shown, text, tuple(tokens), reason, self.stats))
        return out

    @property
    def stats(self) -> DecodeStats:
        """Counts and times so far."""
        t = self._trace
        return DecodeStats(
            prompt_tokens=sum(map(len, self._texts)),
            generated_tokens=sum(map(len, self._tokens)),
            drafted_tokens=self._drafts.drafted,
            accepted_tokens=self._drafts.accepted,
            verify_calls=self._verify_calls,
            layer_calls=sum(t.layer_calls),
            first_layer_positions=t.layer_positions[0],
            last_layer_positions=t.layer_positions[-1],
            head_positions=t.head_positions,
            seconds=self._seconds,
            ttft_s=self._ttft,
        )

    def _timed(self) -> Iterator[Step]:
        """The steps, with the time spent in decoding (not in whoever consumes them)."""
        steps = self._decode()
        while True:
            began = time.perf_counter()
            step = next(steps, None)
            self._seconds += time.perf_counter() - began
            if step is None:
                return
            if not self._ttft:
                self._ttft = self._seconds
            self._tokens[step.row] += step.tokens
            self._text[step.row] += step.text
            self._reasons[step.row] = step.finish_reason
            self._drafts += DraftCounts.of(step)
            self._verify_calls += 1
            yield step

    def _decode(self) -> Iterator[Step]:
        tokenizer = self._model.tokenizer
        rows = range(len(self._texts))
        streams = [None if tokenizer is None else TextStream(tokenizer, t) for t in self._texts]
        ends = [RowEnd(*pair) for pair in zip(self._stops, streams, strict=True)]
        size, device = self._tower.config.vocab_size, self._tower.device
        chooser = Chooser(self._sampling, self._texts, rows, size, device)
        return speculate(self._tower, self._texts, self._draft, self._k, chooser, ends)


def _stop_within_context(model: Model, text: Sequence[int], stop: Stop | None) -> Stop:
    """`stop` with the checkpoint's ends of text added and its length cut to the context."""
    limit = model.config.max_positions
    if len(text) >= limit:
        raise InputError(
            f"the prompt has {len(text)} tokens and the model's context is {limit}; "
            f"shorten it to at most {limit - 1}"
        )
    wanted = stop or Stop(max_tokens=256)
    if bad := [i for i in wanted.token_ids if not 0 <= i < model.config.vocab_size]:
        raise InputError(
            f"stop token {bad[0]} is not in the vocabulary of {model.config.vocab_size}; "
            "it would never end a text"
        )
    ids = wanted.token_ids | frozenset(model.config.eos_ids)
    return Stop(min(wanted.max_tokens, limit - len(text)), ids, wanted.strings)
