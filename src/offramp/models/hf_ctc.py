"""Exits for CTC models that people already have: Wav2Vec2, HuBERT, WavLM and Parakeet.

A transformers checkpoint becomes a tower: its own layers run, one after another and each once,
and may be left at any exit. The last exit is the model's own head, so its output is
transformers'; every earlier exit has a LayerNorm and a linear layer of its own, which start as
copies of the model's last (early-exit fine-tuning: arXiv 2309.09546; HuBERT-EE: 2204.06328).

Every utterance gives what it gives alone, whatever it is batched with. Transformers itself
promises that only for some checkpoints: where the front end normalises over time (the group
norm of wav2vec2-base and hubert-base) it sees the padding, so here such a front end runs row
by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offramp.energy.hf_cost import ParakeetShape, WaveformShape
from offramp.errors import ConfigError, InputError
from offramp.models.hf_encoders import Family, Parakeet, Waveform

FAMILIES = {
    "wav2vec2": "Wav2Vec2ForCTC",
    "hubert": "HubertForCTC",
    "wavlm": "WavLMForCTC",
    "parakeet_ctc": "ParakeetForCTC",
}


@dataclass(frozen=True)
class PretrainedConfig:
    """What decoding and exit policies need to know of the model; sizes in units of 1.

    family: transformers' model_type. input_size: features per frame, None for a model of raw
    samples. hop: frames or samples of input per output frame. exits: layers counted from 1. shape:
    all sizes that a count of multiply-accumulates needs.
    """

    family: str
    d_model: int
    num_layers: int
    vocab_size: int
    blank_id: int
    exits: tuple[int, ...]
    input_size: int | None
    hop: int
    shape: WaveformShape | ParakeetShape

    def output_frames(self, num_inputs: int) -> int:
        """Frames of the tower for so many samples or feature frames; 0: too short."""
        return self.shape.frames(num_inputs)


@dataclass(frozen=True)
class EncoderState:
    """Utterances on their way through the tower.

    h: [B, T', D]. lengths: int64 [B], true frames; what lies behind them means nothing. layer:
    how many layers ran. positions: what the layers are told of positions, or None: WavLM's bias
    [H, T', T'], Parakeet's embeddings [2T'-1, D] of the distances T'-1 ... -(T'-1).
    """

    h: Tensor
    lengths: Tensor
    layer: int
    positions: Tensor | None = None

    def check_run(self, start: int, stop: int, num_layers: int) -> None:
        """InputError: layers start ... stop-1 are not those that come next."""
        if not start <= stop <= num_layers or start != self.layer:
            raise InputError(
                f"layers {start} to {stop} were asked for after {self.layer} layers; "
                f"allowed: {self.layer} <= stop <= {num_layers}, from {self.layer} on"
            )

    def select(self, rows: Tensor | Sequence[int]) -> EncoderState:
        """The utterances `rows` [K] alone, without frames that are padding in all of them."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.h.device)
        if len(rows) == 0:
            raise InputError("select got no rows; stop when no utterance is left")
        lengths = self.lengths[rows]
        T, kept = self.h.shape[1], int(lengths.max())
        positions = self.positions
        if positions is not None and positions.ndim == 3:
            positions = positions[:, :kept, :kept]
        elif positions is not None:
            positions = positions[T - kept : T + kept - 1]
        return replace(self, h=self.h[rows, :kept], lengths=lengths, positions=positions)


class ExitHead(nn.Module):
    """Logits [B, T', V] of a layer's output [B, T', D]: LayerNorm, linear."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.linear = nn.Linear(d_model, vocab_size)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(h))
        return logits


class PretrainedCTCEncoder(nn.Module):
    """A transformers CTC model with exits; made by `attach_exits`, or loaded with them.

    base: the transformers model, for its own `save_pretrained`. Its SpecAugment and its random
    skipping of layers are not used: both draw from the global state. Dropout is.
    """

    def __init__(self, base: Any, config: PretrainedConfig) -> None:
        super().__init__()
        self.base, self.config = base, config
        parakeet = config.family == "parakeet_ctc"
        self._family: Family = Parakeet(base) if parakeet else Waveform(base, config.family)
        self._is_frozen = False
        self.heads = nn.ModuleDict(
            {str(e): ExitHead(config.d_model, config.vocab_size) for e in config.exits[:-1]}
        )
        norm, weight, bias = self._family.last_head()
        with torch.no_grad():
            for head in self.heads.values():
                assert isinstance(head, ExitHead)
                head.linear.weight.copy_(weight)
                head.linear.bias.copy_(bias)
                if norm is not None:
                    head.norm.weight.copy_(norm.weight)
                    head.norm.bias.copy_(norm.bias)
        self.heads.to(weight)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.dtype
        return dtype

    # -- the tower ---------------------------------------------------------------------------

    def embed(self, inputs: Tensor, lengths: Tensor) -> EncoderState:
        """Everything before the first layer.

        inputs: what the checkpoint's feature extractor makes, without its mask: samples [B, N],
        or for Parakeet features [B, T, F]. lengths: int64 [B], true samples or frames.
        """
        size = self.config.input_size
        wanted = "samples [B, N]" if size is None else f"features [B, T, {size}]"
        if inputs.ndim != (2 if size is None else 3) or (size and inputs.shape[-1] != size):
            raise InputError(f"the input is {list(inputs.shape)}; it must be {wanted}")
        fits = len(inputs) > 0 and lengths.shape == inputs.shape[:1]
        if not fits or bool((lengths > inputs.shape[1]).any()):
            raise InputError(
                f"lengths are {lengths.tolist()} for an input of {list(inputs.shape)}; give one "
                "true length per row"
            )
        lengths = lengths.to(inputs.device)
        frames = self._family.frames(lengths).to(torch.int64)
        if bool((frames < 1).any()):
            raise InputError(
                f"lengths are {lengths.tolist()}; the shortest gives no frame: leave it out"
            )
        beyond = torch.arange(inputs.shape[1], device=inputs.device) >= lengths[:, None]
        inputs = inputs.masked_fill(beyond if size is None else beyond[..., None], 0.0)
        h, positions = self._family.embed(inputs.to(self.dtype), lengths, frames)
        return EncoderState(h, frames, 0, positions)

    def run(self, state: EncoderState, start: int, stop: int) -> EncoderState:
        """Layers start ... stop-1, counted from 0; `start` is where `state` has got to."""
        state.check_run(start, stop, self.config.num_layers)
        if start == stop:
            return state
        return replace(
            state,
            h=self._family.run(state.h, state.lengths, state.positions, start, stop),
            layer=stop,
        )

    def log_probs(self, state: EncoderState, exit_layer: int) -> Tensor:
        """float32 [B, T', V] at `exit_layer`, which is where `state` must be."""
        return torch.log_softmax(self.logits(state, exit_layer).float(), dim=-1)

    def logits(self, state: EncoderState, exit_layer: int) -> Tensor:
        """[B, T', V] at `exit_layer`; the last layer's are transformers' own."""
        if exit_layer not in self.config.exits or exit_layer != state.layer:
            raise InputError(
                f"exit_layer is {exit_layer} after {state.layer} layers; allowed: the layer "
                f"reached, and one of {', '.join(map(str, self.config.exits))}"
            )
        if exit_layer == self.config.num_layers:
            return self._family.last_logits(state.h)
        logits: Tensor = self.heads[str(exit_layer)](state.h)
        return logits

    # -- training ----------------------------------------------------------------------------

    def freeze_base(self, frozen: bool = True) -> None:
        """Train the exit heads alone (or, with False, everything).

        A frozen model also stays in evaluation mode: no dropout, and batch norms keep their
        statistics. The last exit then stays exactly what it was.
        """
        self._is_frozen = frozen
        self.base.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> PretrainedCTCEncoder:
        super().train(mode)
        if self._is_frozen:
            self.base.eval()
        return self


# -- from transformers ------------------------------------------------------------------------


def attach_exits(model: Any, exits: Iterable[int] | None = None) -> PretrainedCTCEncoder:
    """Exits on a transformers model that you hold; it is not copied.

    exits: layers counted from 1, the last among them; None: every second. ConfigError: a model of
    another family, or exits out of range.
    """
    import_transformers()
    theirs = getattr(model, "config", None)
    family = getattr(theirs, "model_type", None) or type(model).__name__
    wanted = class_name(family)
    if all(cls.__name__ != wanted for cls in type(model).__mro__):
        raise ConfigError(f"the model is a {type(model).__name__}; it must be a {wanted}")
    assert theirs is not None
    if theirs.pad_token_id is None:
        raise ConfigError("the model names no blank token; set pad_token_id in its config.json")
    if getattr(theirs, "add_adapter", False):
        raise ConfigError(
            "the model has an adapter that shortens its output (add_adapter), which exits before "
            "it would not have; give a checkpoint without"
        )
    parakeet = family == "parakeet_ctc"
    encoder = theirs.encoder_config if parakeet else theirs
    L = encoder.num_hidden_layers
    hop = encoder.subsampling_factor if parakeet else _product(encoder.conv_stride)
    return PretrainedCTCEncoder(
        model,
        PretrainedConfig(
            family,
            encoder.hidden_size,
            L,
            theirs.vocab_size,
            theirs.pad_token_id,
            _checked(exits, L),
            encoder.num_mel_bins if parakeet else None,
            hop,
            (_parakeet_shape if parakeet else _waveform_shape)(encoder, theirs.vocab_size),
        ),
    )


def _waveform_shape(config: Any, vocab_size: int) -> WaveformShape:
    gated = config.model_type == "wavlm"
    adapter = getattr(config, "adapter_attn_dim", None)
    adapted = config.do_stable_layer_norm and not gated
    return WaveformShape(
        config.hidden_size,
        config.intermediate_size,
        vocab_size,
        tuple(config.conv_dim),
        tuple(config.conv_kernel),
        tuple(config.conv_stride),
        config.num_conv_pos_embeddings,
        config.num_conv_pos_embedding_groups,
        adapter=(adapter or 0) if adapted else 0,
        gated=gated,
    )


def _parakeet_shape(config: Any, vocab_size: int) -> ParakeetShape:
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", head_dim)
    return ParakeetShape(
        config.hidden_size,
        config.intermediate_size,
        vocab_size,
        heads * head_dim,
        config.num_key_value_heads * head_dim,
        config.conv_kernel_size,
        config.num_mel_bins,
        config.subsampling_conv_channels,
        config.subsampling_conv_kernel_size,
        config.subsampling_conv_stride,
        config.subsampling_factor.bit_length() - 1,
    )


def import_transformers() -> Any:
    try:
        import transformers  # slow, and an optional package
    except ImportError as error:
        raise ConfigError(
            "a transformers model needs transformers; pip install 'offramp[hf]'"
        ) from error
    return transformers


def class_name(family: str) -> str:
    if family not in FAMILIES:
        raise ConfigError(f"the model is of the family {family!r}; allowed: {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _checked(exits: Iterable[int] | None, num_layers: int) -> tuple[int, ...]:
    if exits is None:
        return (*range(2, num_layers, 2), num_layers)
    found = tuple(exits)
    inside = found and found[0] >= 1 and found[-1] == num_layers
    if not inside or any(a >= b for a, b in pairwise(found)):
        raise ConfigError(
            f"exits are {found}; they must rise from at least 1 to the last layer, {num_layers}"
        )
    return found


def _product(numbers: Iterable[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product
