"""From audio to text: speech segments of a recording up an encoder, each to its own exit.

An exit policy (fixed, by certainty, within a budget) decides per segment how many layers run, and
every segment knows what it cost. transcription.py finds the segments and batches them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from offramp.audio.io import Source
from offramp.audio.reader import LogMelReader, Reader
from offramp.audio.vad import Segment, VadOptions
from offramp.compress.checkpoint import load_model
from offramp.config import EncoderConfig, check_counts, check_positive
from offramp.decoding.beam import BeamOptions, beam_search
from offramp.decoding.calibration import Calibration
from offramp.decoding.ctc import Hypothesis, geometric_mean, text, words
from offramp.decoding.early_exit_ctc import EarlyExit, EarlyExitOptions, early_exit, stopwatch
from offramp.decoding.encoder_cost import measured_cost, tower_cost, tower_macs
from offramp.decoding.exit_policies import RULES, AnyOf, Budget, ExitPolicy, FixedExit
from offramp.decoding.lm import LanguageModel, WordScorer, WordScorerOptions, hotword_spelling
from offramp.errors import ConfigError, InputError
from offramp.models import hub
from offramp.models.ctc import CTCEncoder
from offramp.models.hf_checkpoint import EXITS, PretrainedSpeech, is_pretrained
from offramp.models.hf_ctc import PretrainedConfig, PretrainedCTCEncoder
from offramp.nn.device import choose_device
from offramp.results import ExitText, Transcript, TranscriptSegment
from offramp.transcription import Transcription, heard_s, placed

CALIBRATION = "calibration.json"  # in the checkpoint folder; `offramp calibrate` writes it
Decode = Callable[[Tensor], Hypothesis]  # [T, V] without padding -> its text


@dataclass(frozen=True)
class TranscribeOptions:
    """How deep to go, and how to decode. Nothing given: the last exit, greedily.

    exit_policy: `entropy` (nats per frame, at most), `confidence` or `agreement` (at least), or
    an `ExitPolicy` of your own. threshold: the rule's; None: the calibrated one. max_wer_increase:
    in percent, use thresholds certified for at most this (greedily, without a budget); the rule,
    if not given, is the calibrated one. calibration: where thresholds are; None: calibration.json
    in the checkpoint.
    exit_layer: always leave there. budget_ms, budget_macs: go deeper only while the next part fits
    what is left for this segment; the first exit is always reached. With budget_ms segments go
    one by one, timed from their features on to the exit.

    beam_size: prefixes kept in a beam search at the exit taken; None: greedy, or 16 where lm (an
    ARPA file) or hotwords need one. lm_weight: how much the language model counts; None:
    as `WordScorerOptions` has it. batch_size: segments read ahead and batched. trail: keep what
    every tested exit wrote. Raises InputError for options that contradict each other.
    """

    exit_policy: Literal["entropy", "confidence", "agreement"] | ExitPolicy | None = None
    threshold: float | None = None
    max_wer_increase: float | None = None
    calibration: Path | None = None
    exit_layer: int | None = None
    budget_ms: float | None = None
    budget_macs: float | None = None
    beam_size: int | None = None
    lm: Path | None = None
    lm_weight: float | None = None
    hotwords: tuple[str, ...] = ()
    batch_size: int = 8
    trail: bool = False
    vad: VadOptions = field(default_factory=VadOptions)

    def __post_init__(self) -> None:
        check_counts(1, batch_size=self.batch_size)
        for name in ("beam_size", "exit_layer"):
            if getattr(self, name) is not None:
                check_counts(1, **{name: getattr(self, name)})
        self._check_types()
        for name in ("max_wer_increase", "budget_ms", "budget_macs"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        self._refuse_contradictions()
        self._refuse_what_was_not_certified()

    def _check_types(self) -> None:
        policy, hotwords = self.exit_policy, self.hotwords
        for name in ("threshold", "max_wer_increase", "budget_ms", "budget_macs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                raise InputError(f"{name} is {value!r}; it must be a number")
        if isinstance(policy, str):
            known = policy in RULES
        else:
            methods = ("tested", "decide")
            known = policy is None or all(callable(getattr(policy, m, None)) for m in methods)
        if not known:
            raise InputError(
                f"exit_policy is {policy!r}; allowed: {', '.join(RULES)}, or an ExitPolicy with "
                "tested and decide; to leave at one exit always, give an exit_layer"
            )
        if isinstance(hotwords, str) or not all(isinstance(phrase, str) for phrase in hotwords):
            raise InputError(
                f"hotwords are {hotwords!r}; give a tuple of phrases, such as ('obeyed',)"
            )

    def _refuse_contradictions(self) -> None:
        deciding = ("exit_policy", "max_wer_increase", "budget_ms", "budget_macs")
        given = [name for name in (*deciding, "threshold") if getattr(self, name) is not None]
        if self.exit_layer is not None and given:
            raise InputError(
                f"exit_layer {self.exit_layer} fixes where to leave, and {given[0]} was given too; "
                "choose one"
            )
        if self.budget_ms is not None and self.budget_macs is not None:
            raise InputError("budget_ms and budget_macs were both given; choose one")
        if self.threshold is not None:
            if not isinstance(self.exit_policy, str):
                raise InputError(
                    "a threshold needs the exit_policy that it is for: " + ", ".join(RULES)
                )
            if self.max_wer_increase is not None or self.calibration is not None:
                raise InputError(
                    "a threshold and a calibrated one (max_wer_increase, calibration) exclude "
                    "each other; choose one"
                )
        if self.max_wer_increase is not None or self.calibration is not None:
            if self.exit_policy is not None and not isinstance(self.exit_policy, str):
                raise InputError("an exit_policy of your own cannot be calibrated; leave one out")
            if self.max_wer_increase is None and self.exit_policy is None:
                raise InputError(
                    "calibration says where thresholds are; give exit_policy or max_wer_increase"
                )
        if self.lm_weight is not None and self.lm is None:
            raise InputError("lm_weight needs the lm that it is for; give both or neither")

    def _refuse_what_was_not_certified(self) -> None:
        if self.max_wer_increase is None and self.calibration is None:
            return
        for name in ("beam_size", "lm", "hotwords", "budget_ms", "budget_macs"):
            if getattr(self, name) not in (None, ()):
                raise InputError(
                    f"{name} was given together with a calibrated threshold (max_wer_increase, "
                    "calibration), whose guarantee holds for greedy decoding without a budget; "
                    "leave one out"
                )


class Recognizer:
    """An encoder with its pieces. One recording at a time; loading is the slow part, so keep it.

    pieces: what each token id writes, with U+2581 or a space where a word starts. reader: how
    samples become what the encoder reads; None: as our encoders read them.
    """

    def __init__(
        self,
        encoder: CTCEncoder | PretrainedCTCEncoder,
        pieces: Sequence[str],
        folder: Path | None = None,
        reader: Reader | None = None,
    ) -> None:
        # One of the two; their states differ in type, so no union of them can be run.
        self.encoder: Any = encoder
        self.pieces, self.folder = tuple(pieces), folder
        if reader is None:
            assert isinstance(encoder, CTCEncoder), "a transformers model comes with its reader"
            reader = LogMelReader(encoder.config)
        self.reader = reader
        self._plan: tuple[TranscribeOptions, _Plan] | None = None

    @classmethod
    def load(cls, model: str | Path = "asr-tiny", *, device: str = "cpu") -> Recognizer:
        """A shipped name, a folder or a hub id, compressed or not.

        CheckpointError: no recogniser is there.
        """
        folder = hub.resolve(str(model))
        if is_pretrained(folder):
            speech = PretrainedSpeech.load(folder, device=choose_device(device))
            speech.encoder.requires_grad_(False)
            return cls(speech.encoder, speech.reader.pieces, folder, speech.reader)
        encoder = load_model(CTCEncoder, folder, choose_device(device))
        config = encoder.config
        return cls(encoder, hub.load_pieces(folder, config.vocab_size, config.blank_id), folder)

    @property
    def config(self) -> EncoderConfig | PretrainedConfig:
        config: EncoderConfig | PretrainedConfig = self.encoder.config
        return config

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each -> the encoder's input [B, ...] and lengths [B], on its device."""
        made, lengths = self.reader.inputs(samples)
        device = self.encoder.device
        return made.to(device), lengths.to(device)

    def weights_sha256(self) -> str | None:
        """Tells whether the weights, exit heads included, are the same; None: no folder."""
        if self.folder is None:
            return None
        model, heads = hub.weights_sha256(self.folder), self.folder / EXITS
        if not heads.exists():
            return model
        return hashlib.sha256(model.encode() + heads.read_bytes()).hexdigest()

    def transcribe(self, source: Source, options: TranscribeOptions | None = None) -> Transcript:
        """The whole recording: a path, "-" for standard input, or a binary file.

        Raises AudioError, or InputError where `source` is none of these.
        """
        return self.stream(source, options).complete()

    def stream(self, source: Source, options: TranscribeOptions | None = None) -> Transcription:
        """The same as it comes: iterate for segments, in order; then it has `.transcript`."""
        return Transcription(source, _Writer(self, self.plan(options or TranscribeOptions())))

    def plan(self, options: TranscribeOptions) -> _Plan:
        """`options` made ready for this model, kept for the next recording; their faults show here.

        Raises InputError, ConfigError or DataError.
        """
        if self._plan is None or self._plan[0] != options:
            self._plan = options, _Plan(self, options)
        return self._plan[1]

    def calibration(self, options: TranscribeOptions) -> Calibration:
        """The calibration that `options` ask for, checked against them."""
        path = options.calibration
        if path is None:
            if self.folder is None:
                raise InputError("this recogniser has no folder; give a calibration or a threshold")
            path = self.folder / CALIBRATION
            if not path.exists():
                raise InputError(
                    f"{path} is missing, so there is no threshold to use; run offramp calibrate, "
                    "or give a threshold"
                )
        found = self.load_calibration(path)
        wanted, limit = options.exit_policy, options.max_wer_increase
        if wanted not in (None, found.rule):
            raise InputError(
                f"{path} is for the rule {found.rule}, not {wanted}; choose that one, give a "
                "threshold, or run offramp calibrate"
            )
        if limit is not None and found.max_wer_increase > limit / 100:
            raise InputError(
                f"{path} certifies +{100 * found.max_wer_increase:.4g} % WER, which is more than "
                f"{limit:.4g}; run offramp calibrate --max-wer-increase {limit:.4g}"
            )
        return found

    def load_calibration(self, path: Path) -> Calibration:
        """What is at `path`; ConfigError: it is malformed, or was made with other weights."""
        found = Calibration.load(path)
        if found.weights is not None and self.weights_sha256() not in (None, found.weights):
            raise ConfigError(
                f"{path} was calibrated for another checkpoint than {self.folder}; calibrate anew"
            )
        return found


class _Plan:
    """What options mean for a model: where to leave, how to decode, how to batch."""

    def __init__(self, recognizer: Recognizer, options: TranscribeOptions) -> None:
        self.options = options
        config = recognizer.config
        self.policy = _policy(recognizer, options)
        self.policy.tested(config.exits)  # an exit that does not exist is refused now
        blank_id = config.blank_id
        self._run = EarlyExitOptions(
            blank_id, tower_cost(config), decode=decoder(recognizer.pieces, options, blank_id)
        )
        self.batch_size = 1 if options.budget_ms is not None else options.batch_size

    def run_options(self) -> EarlyExitOptions:
        """For a batch whose work begins now."""
        timed = self.options.budget_ms is not None
        return replace(self._run, stopwatch=stopwatch()) if timed else self._run


class _Writer:
    """Segments up the encoder, each to the exit where the policy has it leave."""

    def __init__(self, recognizer: Recognizer, plan: _Plan) -> None:
        self._recognizer, self._plan = recognizer, plan
        self.vad, self.batch_size = plan.options.vad, plan.batch_size
        self.reader = recognizer.reader

    def write(self, batch: Sequence[Segment]) -> list[TranscriptSegment]:
        options = self._plan.run_options()  # a stopwatch starts before the features
        inputs, lengths = self._recognizer.inputs([segment.samples for segment in batch])
        config, encoder = self._recognizer.config, self._recognizer.encoder
        results = early_exit(encoder, config.exits, inputs, lengths, self._plan.policy, options)
        return [self._written(*pair) for pair in zip(batch, results, strict=True)]

    def decoding(self) -> None:
        return None

    def _written(self, segment: Segment, result: EarlyExit) -> TranscriptSegment:
        """Results with times from the start of the recording."""
        config, pieces = self._recognizer.config, self._recognizer.pieces
        local = words(result.hypothesis, pieces, self.reader.frame_s, heard_s(segment, self.reader))
        moved = placed(local, segment, self.reader)
        tested = [t.exit_layer for t in result.trail]
        trail = tuple(
            ExitText(t.exit_layer, text(t.hypothesis.tokens, pieces), t.score)
            for t in result.trail
            if self._plan.options.trail
        )
        return TranscriptSegment(
            start_s=segment.start_s,
            end_s=segment.end_s,
            text=" ".join(word.text for word in moved),
            words=moved,
            confidence=geometric_mean([w.confidence for w in moved]) if moved else None,
            exit_layer=result.exit_layer,
            macs=tower_macs(config, self.reader.num_inputs(len(segment.samples)), tested),
            trail=trail,
        )


# -- options to parts ----------------------------------------------------------------------------


def _policy(recognizer: Recognizer, options: TranscribeOptions) -> ExitPolicy:
    policies: list[ExitPolicy] = []
    if isinstance(options.exit_policy, str) and options.threshold is not None:
        policies.append(RULES[options.exit_policy](options.threshold))
    elif isinstance(options.exit_policy, str) or options.max_wer_increase is not None:
        found = recognizer.calibration(options)
        policies.append(found.policy(recognizer.config.exits))
    elif options.exit_policy is not None:
        policies.append(options.exit_policy)
    if options.budget_ms is not None:
        policies.append(Budget(options.budget_ms, measured_cost(recognizer.encoder)))
    if options.budget_macs is not None:
        policies.append(Budget(options.budget_macs, tower_cost(recognizer.config)))
    if not policies:
        return FixedExit(options.exit_layer)
    return policies[0] if len(policies) == 1 else AnyOf(tuple(policies))


def decoder(pieces: Sequence[str], options: TranscribeOptions, blank_id: int) -> Decode | None:
    """The beam search that `options` ask for; None: the greedy text will do."""
    if options.beam_size is None and options.lm is None and not options.hotwords:
        return None
    beam = BeamOptions() if options.beam_size is None else BeamOptions(options.beam_size)
    scorer = None
    if options.lm is not None or options.hotwords:
        model = None if options.lm is None else LanguageModel(options.lm)
        hotwords = [hotword_spelling(phrase, pieces) for phrase in options.hotwords]
        weights = WordScorerOptions()
        if options.lm_weight is not None:
            weights = replace(weights, lm_weight=options.lm_weight)
        scorer = WordScorer(pieces, model, hotwords, weights)

    def decode(log_probs: Tensor) -> Hypothesis:
        return beam_search(log_probs, beam, scorer, blank_id)[0]

    return decode
