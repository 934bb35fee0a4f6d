"""Transformers CTC checkpoints with exits, in and out of folders, with what they read and write.

The folder stays one that transformers loads as it did before: the exit heads lie beside the model
in exits.safetensors. With the model come its own feature extractor and tokenizer, so samples go in
and text comes out as they do in transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.audio.io import SAMPLE_RATE
from offramp.errors import CheckpointError, ConfigError, DataError, InputError, first_line
from offramp.files import replacing
from offramp.models.hf_ctc import (
    FAMILIES,
    PretrainedConfig,
    PretrainedCTCEncoder,
    attach_exits,
    class_name,
    import_transformers,
)
from offramp.models.hub import check_target, read_json

EXITS = "exits.safetensors"  # beside the model in its folder
_FORMAT = "offramp-ctc-exits-1"
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_VARIANCE_FLOOR = 1e-7  # of transformers' normalisation of samples


def is_pretrained(folder: Path) -> bool:
    """Whether `folder` holds a transformers model of a family that can have exits."""
    path = folder / "config.json"
    return path.exists() and read_json(path).get("model_type") in FAMILIES


@dataclass(frozen=True)
class PretrainedReader:
    """What a transformers CTC model reads (an `audio.reader.Reader`) and writes.

    config: of its encoder. pieces: what each token id writes, U+2581 where a word starts, "" for
    the blank and other tokens without text. extractor, tokenizer: transformers' own, as they lie
    in the folder.
    """

    config: PretrainedConfig
    pieces: tuple[str, ...]
    extractor: Any
    tokenizer: Any

    @property
    def frame_s(self) -> float:
        config = self.config
        step = 1 if config.input_size is None else int(self.extractor.hop_length)
        return config.hop * step / SAMPLE_RATE

    @property
    def first_frame_s(self) -> float:
        return 0.0

    def num_inputs(self, num_samples: int) -> int:
        config, found = self.config, num_samples
        if config.input_size is not None:
            found = num_samples // int(self.extractor.hop_length)
            found = found if found > 1 else 0  # one frame has no variance to be normalised by
        return found if config.output_frames(found) else 0

    def inputs(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [N_b] each -> what the encoder reads, zero beyond lengths [B], and those.

        Normalised samples [B, N], or features [B, T, F]: for each utterance what the checkpoint's
        own extractor gives for it alone. InputError: an utterance too short for a frame.
        """
        if short := [len(x) for x in samples if not self.num_inputs(len(x))]:
            raise InputError(f"{short[0]} samples give no frame; leave such a recording out")
        if self.config.input_size is None:
            waves = [_normalized(x) if self.extractor.do_normalize else x.float() for x in samples]
            lengths = torch.tensor([len(x) for x in samples])
            return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths
        heard = [x.float().numpy().astype(np.float32) for x in samples]
        made = self.extractor(heard, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return made["input_features"], made["attention_mask"].sum(-1)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids to train on, in the vocabulary's own case.

        Characters that it does not have are left out. DataError: a text of nothing else.
        """
        has_lower = any(piece != piece.upper() for piece in self.pieces)
        cased = [text if has_lower else text.upper() for text in texts]
        ids = self.tokenizer(cased, add_special_tokens=False)["input_ids"]
        found = [[i for i in row if self.pieces[i]] for row in ids]
        for text, row in zip(texts, found, strict=True):
            if text.strip() and not "".join(self.pieces[i] for i in row).strip(_WORD_START):
                raise DataError(
                    f"the model's vocabulary cannot write {text!r}; give texts in its language"
                )
        return found


@dataclass(frozen=True)
class PretrainedSpeech:
    """A transformers CTC model with exits, and what it reads and writes."""

    encoder: PretrainedCTCEncoder
    reader: PretrainedReader

    @classmethod
    def load(
        cls,
        folder: Path,
        exits: Iterable[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        untrained: bool = False,
    ) -> PretrainedSpeech:
        """As `load_pretrained`, and CheckpointError where extractor or tokenizer are missing."""
        transformers = import_transformers()
        encoder = load_pretrained(folder, exits, device=device, untrained=untrained)
        try:
            extractor = transformers.AutoFeatureExtractor.from_pretrained(str(folder))
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"cannot load how {folder} reads and writes: {first_line(error)}; it needs its "
                "preprocessor_config.json and its tokenizer"
            ) from error
        rate = getattr(extractor, "sampling_rate", None)
        if rate != SAMPLE_RATE:
            raise ConfigError(f"the model reads {rate} Hz; it must be {SAMPLE_RATE}")
        pieces = _pieces(encoder.config, tokenizer)
        return cls(encoder, PretrainedReader(encoder.config, pieces, extractor, tokenizer))

    def save(self, folder: Path) -> None:
        """Write a folder that `load` and transformers read; whole or not at all."""
        check_target(folder)
        with replacing(folder) as temporary:
            temporary.mkdir()
            with quiet():
                self.encoder.base.save_pretrained(str(temporary))
                self.reader.extractor.save_pretrained(str(temporary))
                self.reader.tokenizer.save_pretrained(str(temporary))
            if len(self.encoder.config.exits) > 1:
                save_exits(self.encoder, temporary / EXITS)
            # safetensors lets only the owner read, whatever the umask.
            for path in temporary.glob("*.safetensors"):
                shutil.copymode(temporary / "config.json", path)


def load_pretrained(
    source: str | Path,
    exits: Iterable[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    untrained: bool = True,
) -> PretrainedCTCEncoder:
    """The checkpoint `source` (folder, or name on the Hugging Face Hub), with exits, in eval mode.

    exits: layers counted from 1, the last among them; None: those whose heads lie in the folder, or
    else new ones at every second layer (without `untrained`, none but the last). CheckpointError:
    it cannot be read, lacks weights, or its heads are for other exits. ConfigError: of another
    family, or exits out of range.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot load {source}: {first_line(error)}; give a folder or name"
        ) from error
    cls = getattr(transformers, class_name(config.model_type))
    try:
        with quiet():
            model, info = cls.from_pretrained(str(source), output_loading_info=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load {source}: {first_line(error)}; fetch it again"
        ) from error
    # The mask vector only serves SpecAugment.
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("masked_spec_embed"))
    if missing:
        raise CheckpointError(
            f"{source} lacks {', '.join(missing[:3])}; give a checkpoint that was trained with CTC"
        )
    stored = Path(source) / EXITS
    if exits is None and stored.exists():
        exits = _stored_exits(stored)
    if exits is None and not untrained:
        exits = (attach_exits(model).config.num_layers,)
    encoder = attach_exits(model, exits)
    if stored.exists():
        load_exits(encoder, stored)
    return encoder.to(device).eval()


def save_exits(encoder: PretrainedCTCEncoder, path: Path) -> None:
    """Write the exit heads (not the model) to `path`, a safetensors file."""
    meta = {"format": _FORMAT, "config": json.dumps(_described(encoder), sort_keys=True)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in encoder.heads.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, meta)


def load_exits(encoder: PretrainedCTCEncoder, path: Path) -> None:
    """Give `encoder` the exit heads that `save_exits` wrote for a model of the same shape.

    CheckpointError, and nothing changed: not such a file, damaged, or of another model or exits.
    """
    theirs, tensors = _read_exits(path)
    ours = json.loads(json.dumps(_described(encoder)))
    if theirs != ours:
        differing = "; ".join(
            f"{k} is {theirs.get(k)}, not {ours[k]}" for k in ours if theirs.get(k) != ours[k]
        )
        raise CheckpointError(f"the exits in {path} are of another model: {differing}")
    expected = {k: v.shape for k, v in encoder.heads.state_dict().items()}
    if {k: v.shape for k, v in tensors.items()} != expected:
        raise CheckpointError(
            f"{path} is damaged: its tensors are not those of the exits; save again"
        )
    encoder.heads.load_state_dict(tensors)


def _stored_exits(path: Path) -> tuple[int, ...]:
    described, _ = _read_exits(path)
    exits = described.get("exits")
    if not isinstance(exits, list) or not all(isinstance(e, int) for e in exits):
        raise CheckpointError(f"{path} does not say which exits it holds; save them again")
    return tuple(exits)


def _read_exits(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what `_described` said, the heads' tensors)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot load exits from {path}: {error}; save them again") from error
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"{path} holds no exit heads; give a file that save_exits wrote")
    described: dict[str, Any] = json.loads(meta["config"])
    return described, tensors


def _described(encoder: PretrainedCTCEncoder) -> dict[str, Any]:
    names = ("family", "d_model", "num_layers", "vocab_size", "blank_id", "exits")
    return {name: getattr(encoder.config, name) for name in names}


def _pieces(config: PretrainedConfig, tokenizer: Any) -> tuple[str, ...]:
    """What each id writes; CTC vocabularies of characters have a token between words."""
    written = dict.fromkeys((*tokenizer.all_special_tokens, None), "")
    if (delimiter := getattr(tokenizer, "word_delimiter_token", None)) is not None:
        written[delimiter] = _WORD_START
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    found = [written.get(token, token) for token in tokens]
    if getattr(tokenizer, "do_lower_case", False):
        found = [piece.lower() for piece in found]
    found += [""] * (config.vocab_size - len(found))
    found[config.blank_id] = ""
    return tuple(found[: config.vocab_size])


def _normalized(samples: Tensor) -> Tensor:
    """To mean 0 and variance 1."""
    samples = samples.float()
    variance = samples.var(correction=0)
    return (samples - samples.mean()) / (variance + _VARIANCE_FLOOR).sqrt()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no remarks of transformers on standard error."""
    from transformers import utils

    logging: Any = utils.logging  # not typed
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
