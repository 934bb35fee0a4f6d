"""What a Speech-LM heard as text: its drafts by name, its search, its guard, and what each took.

The drafts write what the decoder alone would write; how many calls of it that takes is all they
differ in. `threshold` alone is lossy. A text has at most as many tokens as the encoder has frames,
which is what CTC could write: a decoder that does not find its end stops there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from offramp.audio.vad import VadOptions
from offramp.config import check_choice, check_counts, check_range
from offramp.decoding.alignment import TokenSpan, align_text
from offramp.decoding.ctc import greedy
from offramp.decoding.ctc_draft import CTCDraft
from offramp.decoding.drafts import (
    DecodeState,
    Draft,
    EarlyExitDraft,
    NoDraft,
    Proposal,
    check_exit_layer,
)
from offramp.decoding.first_of import FirstOf
from offramp.decoding.guard import Flag, Guard, GuardedEnd, GuardOptions
from offramp.decoding.heads_draft import HeadsDraft
from offramp.decoding.sampling import Chooser, Sampling
from offramp.decoding.speculative import speculate
from offramp.decoding.stopping import RowEnd, Stop
from offramp.decoding.threshold import Trust, decode_unverified
from offramp.decoding.tower_beam import TextHypothesis, TowerBeam, tower_beam
from offramp.decoding.verified_beam import CTCTails, HeadTails, TailDraft, verified_beam
from offramp.energy.trace import Trace
from offramp.errors import InputError
from offramp.models.speech_lm import Heard, Padding, SpeechLM
from offramp.nn.heads import Heads
from offramp.nn.tower import TracedTower
from offramp.results import DecoderCounts, DraftCounts, FinishReason, Step
from offramp.tokenizer import TextStream, TextTokenizer

DraftName = Literal["ctc+mtp", "ctc", "mtp", "exit", "none"]
DRAFTS: tuple[DraftName, ...] = get_args(DraftName)
BEAM_DRAFTS: tuple[DraftName, ...] = ("ctc", "mtp", "none")
# Of early exits, which draft token by token: as `offramp generate` has them.
_EXIT_TOKENS, _EXIT_CONFIDENCE = 6, 0.6
_BRIDGE_CONFIDENCE = 0.5  # of a head, to go before what CTC heard


@dataclass(frozen=True)
class SpeechLMOptions:
    """How a Speech-LM decodes. Nothing given: greedily, by the drafts that the checkpoint has.

    draft: `ctc` (what the encoder's CTC wrote), `mtp` (heads for more tokens), `ctc+mtp` (the first
    that has something), `exit` (the decoder's own lower layers), `none`; None: both of `ctc` and
    `mtp`, or the one that there is. exit_layer: of draft `exit`; None: a third of the decoder.
    threshold: LOSSY: with `mtp`, believe a head that is at least so certain, unverified.
    beam_size: texts kept in a beam search, the same with every draft (`ctc`, `mtp`, `none`).
    guard: what to do about words that the audio does not hold; `flag` them, or `stop` there too;
    None: flag them where CTC can tell. batch_size: segments read ahead and batched. Raises
    InputError or ConfigError for options that contradict each other.
    """

    draft: DraftName | None = None
    exit_layer: int | None = None
    threshold: float | None = None
    beam_size: int | None = None
    guard: Literal["flag", "stop"] | None = None
    guard_options: GuardOptions = field(default_factory=GuardOptions)
    batch_size: int = 8
    vad: VadOptions = field(default_factory=VadOptions)

    def __post_init__(self) -> None:
        check_counts(1, batch_size=self.batch_size)
        if self.draft is not None:
            check_choice(draft=(self.draft, DRAFTS))
        if self.guard is not None:
            check_choice(guard=(self.guard, ("flag", "stop")))
        for name in ("exit_layer", "beam_size"):
            if getattr(self, name) is not None:
                check_counts(1, **{name: getattr(self, name)})
        if self.exit_layer is not None and self.draft != "exit":
            raise InputError(f"exit_layer {self.exit_layer} is for draft 'exit'; give both or none")
        if self.threshold is not None:
            check_range(0.0, threshold=self.threshold)
            if self.draft != "mtp":
                raise InputError(
                    f"threshold {self.threshold} is for draft 'mtp', whose tokens it believes "
                    "unverified; give both or leave the threshold out"
                )
        self._check_beam()

    def _check_beam(self) -> None:
        if self.beam_size is None:
            return
        if self.draft not in (None, *BEAM_DRAFTS):
            raise InputError(
                f"draft {self.draft!r} cannot draft for a beam; choose one of "
                f"{', '.join(BEAM_DRAFTS)}, or leave beam_size out"
            )
        if self.threshold is not None or self.guard == "stop":
            other = "guard 'stop'" if self.threshold is None else "threshold"
            raise InputError(f"beam_size and {other} exclude each other; choose one")

    @property
    def lossy(self) -> bool:
        return self.threshold is not None


@dataclass(frozen=True)
class SpeechText:
    """What was decoded for one utterance. tokens: without what ends a text; parts: the text that
    each of them adds. spans: where CTC finds them; None: it cannot tell."""

    tokens: tuple[int, ...]
    parts: tuple[str, ...]
    spans: list[TokenSpan] | None
    flags: tuple[Flag, ...]
    counts: DecoderCounts
    finish_reason: FinishReason

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())


@dataclass(frozen=True)
class PartTimes:
    """Seconds. encoder_s: projector included, and the CTC head; ctc_s: greedy CTC, alignment and
    the guard that flags; decoder_s: the decoder, its drafts and a guard that stops it."""

    encoder_s: float = 0.0
    ctc_s: float = 0.0
    decoder_s: float = 0.0

    def __add__(self, other: PartTimes) -> PartTimes:
        return PartTimes(
            self.encoder_s + other.encoder_s,
            self.ctc_s + other.ctc_s,
            self.decoder_s + other.decoder_s,
        )


def available_drafts(model: SpeechLM) -> tuple[DraftName, ...]:
    """The drafts that `model` has, the one that most calls are expected to be saved by first."""
    has = {"ctc": model.config.ctc_exit is not None, "mtp": model.heads is not None}
    has |= {"ctc+mtp": all(has.values()), "exit": model.config.decoder.num_layers > 1, "none": True}
    return tuple(name for name in DRAFTS if has[name])


def most_tokens(model: SpeechLM, heard: Heard, lengths: Tensor) -> list[int]:
    """The most tokens that a text of each row may have, its end included; lengths: as in `hear`.

    InputError: an utterance leaves the decoder no room for a text.
    """
    pairs = zip(lengths.tolist(), heard.frames.tolist(), strict=True)
    return [min(model.room(n), frames + 1) for n, frames in pairs]


class SpeechLMPlan:
    """Options made ready for a model."""

    def __init__(self, model: SpeechLM, tokenizer: TextTokenizer, options: SpeechLMOptions) -> None:
        """InputError: the model lacks what the options need."""
        self._model, self._tokenizer, self.options = model, tokenizer, options
        self.draft: DraftName = options.draft or self._best()
        for part in self.draft.split("+"):
            self._need(part, f"draft {self.draft!r}")
        if options.guard is not None:
            self._need("ctc", f"guard {options.guard!r}")
        num_layers = model.config.decoder.num_layers
        self._exit_layer = options.exit_layer or max(1, num_layers // 3)
        if self.draft == "exit":
            check_exit_layer(self._exit_layer, num_layers)

    def _best(self) -> DraftName:
        """The default: an early exit drafts only on request, since few decoders are trained so."""
        beam = self.options.beam_size is not None
        names = [name for name in available_drafts(self._model) if name != "exit"]
        return next(name for name in names if not beam or name in BEAM_DRAFTS)

    def _need(self, part: str, what: str) -> None:
        """InputError if `what` needs a part that is not there."""
        config = self._model.config
        lacks = None
        if part == "mtp" and config.heads is None:
            lacks = "heads for more than one token"
        elif part == "ctc" and config.ctc_exit is None:
            lacks = "a CTC exit that writes the decoder's tokens"
        if lacks is not None:
            raise InputError(
                f"{what} needs {lacks}, and this Speech-LM has none; its drafts are "
                f"{', '.join(available_drafts(self._model))}"
            )

    @torch.inference_mode()
    def decode(
        self, inputs: Tensor, lengths: Tensor, padding: Padding = "right"
    ) -> tuple[list[SpeechText], PartTimes]:
        """What the encoder reads, of which `lengths` [B] are real -> a text for each row.

        padding: where it stands. InputError: an utterance leaves the decoder no room for a text.
        """
        lap = _Laps(self._model.device)
        heard = self._model.hear(inputs, lengths, padding=padding)
        encoder_s = lap()
        said = self._said(heard)
        ctc_s = lap()
        rows = self._rows(heard, lengths, said)
        decoder_s = lap()
        texts = [self._text(row, self._log_probs(heard, b)) for b, row in enumerate(rows)]
        return texts, PartTimes(encoder_s, ctc_s + lap(), decoder_s)

    # -- CTC -------------------------------------------------------------------------------

    def _said(self, heard: Heard) -> list[tuple[int, ...]]:
        """What CTC wrote, if it is to draft."""
        if heard.ctc_log_probs is None or "ctc" not in self.draft:
            return [()] * len(heard.audio)
        blank_id = self._model.encoder.config.blank_id
        return [h.tokens for h in greedy(heard.ctc_log_probs, heard.frames, blank_id)]

    def _log_probs(self, heard: Heard, row: int) -> Tensor | None:
        """[T, V] of one utterance, without padding."""
        if heard.ctc_log_probs is None:
            return None
        return heard.ctc_log_probs[row, : int(heard.frames[row])].cpu()

    def _text(self, row: _Row, log_probs: Tensor | None) -> SpeechText:
        """With what CTC has to say of it."""
        tokens = tuple(t for t in row.tokens if t not in self._eos_ids)
        stream = TextStream(self._tokenizer)
        parts = [stream.push(token) for token in tokens]
        if parts:
            parts[-1] += stream.flush()
        spans, guard = None, row.guard
        if log_probs is not None:
            blank_id = self._model.encoder.config.blank_id
            spans = align_text(log_probs, tokens, blank_id, self.options.guard_options.min_odds)
            if guard is None:
                guard = self._guard(log_probs)
                for token in tokens:
                    guard.push(token)
        flags = () if guard is None else tuple(guard.flags)
        assert row.reason is not None, "decoding ends with a reason"
        return SpeechText(tokens, tuple(parts), spans, flags, row.counts(), row.reason)

    def _guard(self, log_probs: Tensor) -> Guard:
        return Guard(log_probs, self._model.encoder.config.blank_id, self.options.guard_options)

    # -- the decoder -----------------------------------------------------------------------

    @property
    def _eos_ids(self) -> frozenset[int]:
        return frozenset(self._model.config.decoder.eos_ids)

    @property
    def _heads(self) -> Heads:
        assert self._model.heads is not None, "looked at when the plan was made"
        return self._model.heads

    def _rows(self, heard: Heard, lengths: Tensor, said: Sequence[tuple[int, ...]]) -> list[_Row]:
        most, prefixes = most_tokens(self._model, heard, lengths), self._model.prefixes(heard)
        if self.options.beam_size is not None:
            triples = zip(prefixes, said, most, strict=True)
            return [_Row.of(*self._search(*triple, self.options.beam_size)) for triple in triples]
        guards: list[Guard | None] = [None] * len(most)
        if self.options.guard == "stop":
            found = [self._log_probs(heard, b) for b in range(len(most))]
            guards = [None if x is None else self._guard(x) for x in found]
        return self._greedy(prefixes, said, most, guards)

    def _greedy(
        self,
        prefixes: list[Tensor],
        said: Sequence[tuple[int, ...]],
        most: Sequence[int],
        guards: Sequence[Guard | None],
    ) -> list[_Row]:
        tower, first = self._model.decoder, self._model.first_token
        prompts = [[first] for _ in prefixes]
        stops = [Stop(n, self._eos_ids) for n in most]
        ends = [
            RowEnd(stop, None) if guard is None else GuardedEnd(stop, None, guard)
            for stop, guard in zip(stops, guards, strict=True)
        ]
        size = self._model.config.decoder.vocab_size
        chooser = Chooser(Sampling(), prompts, range(len(prompts)), size, tower.device)
        if self.options.threshold is not None:
            trust = Trust(self._heads, self.options.threshold)
            steps = decode_unverified(tower, prompts, trust, chooser, ends, prefixes)
        else:
            # Whatever was heard rides the prompt's call, all of it.
            most_drafted = _EXIT_TOKENS if self.draft == "exit" else max(most)
            draft = self._make_draft(said)
            steps = speculate(tower, prompts, draft, most_drafted, chooser, ends, prefixes)
        rows = [_Row(guard) for guard in guards]
        for step in steps:
            rows[step.row].add(step, self.draft)
        return rows

    def _make_draft(self, said: Sequence[tuple[int, ...]]) -> Draft:
        if self.draft == "none":
            return _Plain()
        if self.draft == "exit":
            L = self._model.config.decoder.num_layers
            sure = _EXIT_CONFIDENCE if self._model.device.type == "cpu" else 0.0  # never waits
            return _Exit(self._exit_layer, L, sure, self._eos_ids)
        eos_id, drafts = self._model.config.decoder.eos_ids[0], self.draft.split("+")
        # Before what CTC heard, a token that is wrong makes all of it wrong.
        least = _BRIDGE_CONFIDENCE if "ctc" in drafts else 0.0
        return FirstOf(
            {
                name: CTCDraft(said, eos_id) if name == "ctc" else HeadsDraft(self._heads, least)
                for name in drafts
            }
        )

    def _search(
        self, prefix: Tensor, said: Sequence[int], most: int, beam_size: int
    ) -> tuple[TextHypothesis, int]:
        """What a beam search finds best, and how often the decoder was called."""
        model = self._model
        tower = TracedTower(model.decoder, Trace(model.config.decoder.num_layers))
        beam, prompt = TowerBeam(most, self._eos_ids, beam_size), [model.first_token]
        if self.draft == "none":
            found = tower_beam(tower, prompt, beam, prefix)
        else:
            of_ctc = self.draft == "ctc"
            tails: TailDraft = CTCTails(said) if of_ctc else HeadTails(self._heads, model.decoder)
            found = verified_beam(tower, prompt, beam, tails, prefix)
        return found[0], tower.trace.layer_calls[-1]


class _Plain(NoDraft):
    """Nothing drafted, and no call for the prompt alone: what other ways are compared with."""

    def open(self, state: DecodeState, k: int) -> Proposal:
        return Proposal.empty(state)


class _Exit(EarlyExitDraft):
    """An early exit, which has nothing to read before the prompt: drafts from the next call on."""

    def open(self, state: DecodeState, k: int) -> Proposal:
        return Proposal.empty(state)


class _Row:
    """What is decoded of one row, and from where."""

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard, self._calls = guard, 0
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self._unverified = 0
        self._sources: dict[str, DraftCounts] = {}

    @classmethod
    def of(cls, hypothesis: TextHypothesis, calls: int) -> _Row:
        row = cls()
        row.tokens, row.reason = list(hypothesis.tokens), hypothesis.finish_reason
        row._calls = calls
        return row

    def add(self, step: Step, draft: str) -> None:
        self.tokens += step.tokens
        self.reason = step.finish_reason
        self._calls += 1
        self._unverified += step.unverified
        if step.drafted:
            source = step.source or draft
            counted = self._sources.get(source, DraftCounts())
            self._sources[source] = counted + DraftCounts.of(step)

    def counts(self) -> DecoderCounts:
        return DecoderCounts(len(self.tokens), self._calls, self._unverified, self._sources)


class _Laps:
    """Seconds since it was last asked, work of the device included."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._since = device, time.perf_counter()

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._since = self._since, time.perf_counter()
        return self._since - before
