"""Audio language models that people already have: Qwen2-Audio and Audio Flamingo 3.

Their audio tower is Whisper's encoder, at the end of which pairs of frames become one (arXiv
2407.10759, 2507.08128). It and the projector stay transformers' own modules; the decoder becomes
our tower, so drafts, beams and counts are those of every Speech-LM. What the decoder reads is what
transformers gives it, only that the silence with which transformers fills up the tower's window is
cut off before the first layer: there it is masked, so it changes nothing and costs much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.audio.io import SAMPLE_RATE
from offramp.audio.reader import Reader
from offramp.config import DecoderConfig
from offramp.config_speech_lm import AUDIO, ProjectorConfig, SpeechLMConfig
from offramp.errors import CheckpointError, ConfigError, InputError, first_line
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hf_checkpoint import quiet
from offramp.models.hf_config import eos_ids, from_hf
from offramp.models.hf_ctc import EncoderState, import_transformers
from offramp.models.hub import (
    check_finite,
    fill_decoder,
    read_json,
    read_tensors,
    refuse_unexplained,
)
from offramp.models.speech_lm import PromptTokens, SpeechLM
from offramp.models.stored import take
from offramp.nn.projector import Projector
from offramp.nn.unfilled import unfilled
from offramp.tokenizer import TextTokenizer


@dataclass(frozen=True)
class _Family:
    """name: of transformers' class. audio_first: what it was taught to be asked, audio or words."""

    name: str
    audio_first: bool


FAMILIES = {
    "qwen2_audio": _Family("Qwen2AudioForConditionalGeneration", True),
    "audioflamingo3": _Family("AudioFlamingo3ForConditionalGeneration", False),
}
# Others that hear, and what keeps them out.
_REFUSED = {
    "glmasr": "hears through an encoder with rotary positions",
    "granite_speech": "hears through a windowed Q-Former",
    "granite_speech_plus": "hears through a windowed Q-Former",
    "musicflamingo": "turns its audio by the time of each frame",
    "qwen3_asr": "hears through an encoder that works in windows",
    "ultravox": "needs the code in its folder, which is never run",
    "voxtral": "has Mistral's own tokenizer and no tokenizer.json",
    "voxtral_realtime": "hears a little more with every token that it writes",
}
# Where transformers keeps tensors (before and since version 5) -> the part, as `hub` names it.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.audio_tower.": "audio_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_REQUEST = "Transcribe the input speech."


@dataclass(frozen=True)
class AudioTowerConfig:
    """The shape of an audio tower, an `EncoderShape` that has no CTC.

    num_mels: features per frame. window: how many frames are always given, silence behind speech.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_mels: int
    window: int
    exits: tuple[int, ...] = ()
    vocab_size: int = 0
    blank_id: int = 0

    def output_frames(self, num_inputs: int) -> int:
        """Frames of the tower for so many feature frames; 0: too short."""
        return self.layer_frames(num_inputs) // 2

    def layer_frames(self, num_inputs: int) -> int:
        """Frames in its layers."""
        return -(-num_inputs // 2)

    def macs(self, num_inputs: int) -> int:
        """Of one utterance, counted as in `energy/hf_cost.py`; the convolutions hear the window."""
        D, T = self.d_model, self.layer_frames(num_inputs)
        front = 3 * self.window * self.num_mels * D + 3 * self.window // 2 * D * D
        layer = T * (4 * D * D + 2 * D * self.d_ff) + 2 * T * T * D
        return front + self.num_layers * layer


class AudioTower(nn.Module):
    """A transformers audio tower, layer by layer: a `SpeechEncoder` without exits."""

    time_axis = 2  # of what it reads

    def __init__(self, base: Any, config: AudioTowerConfig) -> None:
        super().__init__()
        self.base, self.config = base, config

    def embed(self, inputs: Tensor, lengths: Tensor) -> EncoderState:
        """inputs: features [B, F, T] of the whole window; lengths: int64 [B], true frames."""
        config = self.config
        wanted = (config.num_mels, config.window)
        if inputs.ndim != 3 or tuple(inputs.shape[1:]) != wanted:
            raise InputError(
                f"the input is {list(inputs.shape)}; it must be [B, {wanted[0]}, "
                f"{wanted[1]}], the features of a whole window"
            )
        frames = (lengths + 1) // 2
        fits = len(inputs) > 0 and lengths.shape == inputs.shape[:1]
        if not fits or bool((frames < 2).any() | (lengths > config.window).any()):
            raise InputError(
                f"lengths are {lengths.tolist()} for an input of {list(inputs.shape)}; give one "
                f"true length per row, 3 to {config.window}"
            )
        base = self.base
        x = F.gelu(base.conv1(inputs.to(base.conv1.weight.dtype)))
        h = F.gelu(base.conv2(x)).transpose(1, 2) + base.embed_positions.weight
        return EncoderState(h[:, : int(frames.max())], frames, 0)

    def run(self, state: EncoderState, start: int, stop: int) -> EncoderState:
        """Layers start ... stop-1, counted from 0; `start` is where `state` has got to.

        Behind the last one frames are half as many.
        """
        L = self.config.num_layers
        state.check_run(start, stop, L)
        if start == stop:
            return state
        from transformers.masking_utils import create_bidirectional_mask

        base, h, frames = self.base, state.h, state.lengths
        valid = torch.arange(h.shape[1], device=h.device) < frames.to(h.device)[:, None]
        mask = create_bidirectional_mask(config=base.config, inputs_embeds=h, attention_mask=valid)
        for layer in base.layers[start:stop]:
            h = layer(h, mask)
        if stop == L:
            h = base.layer_norm(base.avg_pooler(h.transpose(1, 2)).transpose(1, 2))
            frames = frames // 2
        return replace(state, h=h, lengths=frames, layer=stop)

    def log_probs(self, state: EncoderState, exit_layer: int) -> Tensor:
        raise InputError(f"exit_layer is {exit_layer}; this encoder has no CTC to read")


class PretrainedProjector(Projector):
    """A transformers projector, which takes frame by frame."""

    def __init__(self, base: nn.Module, d_out: int) -> None:
        nn.Module.__init__(self)  # none of our layers
        self.config, self.base = ProjectorConfig(1, d_out), base

    def forward(self, h: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, D] -> embeddings [B, T, d_out]; padding is the caller's to leave out."""
        embeddings: Tensor = self.base(h)
        return embeddings


@dataclass(frozen=True)
class MelReader:
    """What such a tower reads: an `audio.reader.Reader`. extractor: transformers' own."""

    config: AudioTowerConfig
    extractor: Any

    @property
    def frame_s(self) -> float:
        return 4 * self._hop / SAMPLE_RATE

    @property
    def first_frame_s(self) -> float:
        return 0.0

    def num_inputs(self, num_samples: int) -> int:
        frames = -(-num_samples // self._hop)
        return frames if self.config.output_frames(frames) else 0

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each -> features [B, F, T] of the window, and true lengths [B].

        InputError: an utterance too short for a frame, or longer than the window.
        """
        counts = [self.num_inputs(len(x)) for x in samples]
        if 0 in counts:
            short = len(samples[counts.index(0)])
            raise InputError(f"{short} samples give no frame; leave such a recording out")
        if max(counts) > self.config.window:
            longest_s = max(map(len, samples)) / SAMPLE_RATE
            raise InputError(
                f"an utterance of {longest_s:.1f} s is longer than the audio tower's window of "
                f"{self.config.window * self._hop / SAMPLE_RATE:g} s; cut it into pieces"
            )
        heard = [x.float().numpy().astype(np.float32) for x in samples]
        made = self.extractor(heard, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return made["input_features"], torch.tensor(counts)

    @property
    def _hop(self) -> int:
        return int(self.extractor.hop_length)


@dataclass(frozen=True)
class AudioLM:
    """A Speech-LM from transformers, its decoder's tokenizer, and what its encoder reads with."""

    model: SpeechLM
    tokenizer: TextTokenizer
    reader: Reader


def is_audio_lm(folder: Path) -> bool:
    """Whether `load_audio_lm` reads `folder`; CheckpointError: it holds one of another kind."""
    kind = str(read_json(folder / "config.json").get("model_type"))
    if (why := _REFUSED.get(kind)) is not None:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, which {why}; supported: "
            f"{', '.join(FAMILIES)}, or join a CTC encoder and a decoder of the Llama family"
        )
    return kind in FAMILIES


def load_audio_lm(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AudioLM:
    """The model in `folder`, every tensor checked by name and shape; frozen, in eval mode.

    Its prompt is `prompt` in config.json, or else what the chat template makes of a request for a
    transcript. CheckpointError: the folder lacks something, or its parts are not supported.
    """
    transformers, raw = import_transformers(), read_json(folder / "config.json")
    if not is_audio_lm(folder):
        raise CheckpointError(
            f"{folder} describes a model of type {raw.get('model_type')!r}; choose one of "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[raw["model_type"]]
    config, processor = _described(folder)
    shape = _shape(config.audio_config, f"{raw['model_type']}_encoder", folder)
    _check_extractor(processor.feature_extractor, shape, folder)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    try:
        decoder_config = _decoder_config(config.text_config, raw, folder)
        prompt = raw["prompt"] if "prompt" in raw else _chat_prompt(processor, family, folder)
        width = decoder_config.d_model
        ours = SpeechLMConfig(None, ProjectorConfig(1, width), decoder_config, prompt=prompt)
        tokens = PromptTokens.of(ours, tokenizer)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    with unfilled():
        base = getattr(transformers, family.name)(config).model
        decoder = DecoderLM(decoder_config)
    tower = AudioTower(base.audio_tower, shape)
    projector = PretrainedProjector(base.multi_modal_projector, width)
    model = SpeechLM(ours, tokens, tower, decoder, projector)
    stored = dict(_renamed(read_tensors(folder)))
    for part, prefix in ((tower, "audio_tower."), (projector, "multi_modal_projector.")):
        state = {
            name: take(stored, prefix + name, p.shape, folder).to(device=device, dtype=dtype)
            for name, p in part.base.state_dict().items()
        }
        part.base.load_state_dict(state, assign=True)
    fill_decoder(decoder, stored, folder, device, dtype)
    refuse_unexplained(folder, sorted(stored))
    check_finite(model, folder)
    model.requires_grad_(False).eval()
    return AudioLM(model, tokenizer, MelReader(shape, processor.feature_extractor))


# -- parts of the folder ----------------------------------------------------------------------


def _described(folder: Path) -> tuple[Any, Any]:
    """transformers' configuration and processor; code that lies in the folder is refused."""
    transformers = import_transformers()
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            processor = transformers.AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False
            )
    except Exception as error:  # the library raises many kinds, all of them "cannot be read"
        raise CheckpointError(
            f"cannot load how {folder} reads and writes: {first_line(error)}; it needs its "
            "config.json, preprocessor_config.json and tokenizer"
        ) from error
    return config, processor


def _shape(config: Any, wanted: str, folder: Path) -> AudioTowerConfig:
    if config.model_type != wanted:
        raise CheckpointError(
            f"{folder}: the audio tower is of type {config.model_type!r}; it must be {wanted!r}"
        )
    window = 2 * config.max_source_positions
    sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return AudioTowerConfig(*sizes, config.num_mel_bins, window)


def _check_extractor(extractor: Any, shape: AudioTowerConfig, folder: Path) -> None:
    wanted = (SAMPLE_RATE, shape.num_mels, shape.window)
    names = ("sampling_rate", "feature_size", "nb_max_frames")
    if (found := tuple(getattr(extractor, name, None) for name in names)) != wanted:
        raise CheckpointError(
            f"the feature extractor in {folder} makes {found[1]} features in {found[2]} frames at "
            f"{found[0]} Hz; the audio tower reads {wanted[1]} in {wanted[2]} at {wanted[0]} Hz: "
            "the files are not of one checkpoint, fetch it anew"
        )


def _decoder_config(text_config: Any, raw: dict[str, Any], folder: Path) -> DecoderConfig:
    """With the tokens that end a text; generation_config.json may name them too."""
    # Whatever the text model says of itself: these classes keep an un-embedding of their own.
    own = {"tie_word_embeddings": False, "quantization_config": raw.get("quantization_config")}
    config = from_hf(text_config.to_dict() | own)
    path = folder / "generation_config.json"
    theirs = eos_ids(read_json(path)) if path.exists() else ()
    return replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *theirs))))


def _chat_prompt(processor: Any, family: _Family, folder: Path) -> str:
    """What the folder's chat template makes of a request, with `{audio}` for the audio."""
    content = [{"type": "audio", "audio": ""}, {"type": "text", "text": _REQUEST}]
    said = [{"role": "user", "content": content if family.audio_first else content[::-1]}]
    try:
        text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template that somebody wrote may do
        raise ConfigError(
            f"the chat template makes no prompt ({first_line(error)}); set prompt in "
            f"config.json, with {AUDIO} where the audio stands"
        ) from error
    return str(text).replace(processor.audio_token, AUDIO)


# -- weights ----------------------------------------------------------------------------------


def _renamed(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        yield name if prefix is None else _PREFIXES[prefix] + name[len(prefix) :], tensor
