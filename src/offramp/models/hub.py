"""Checkpoints in and out: a folder as Hugging Face writes it, or the name of one that ships.

A folder holds config.json, model.safetensors (or shards and their index), tokenizer.json, and
optionally offramp.json: the exit layer and draft length that `offramp tune` found best.
Fused matrices are split on saving, so transformers loads what we save.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offramp.config import DecoderConfig, check_counts, strict
from offramp.errors import CheckpointError, ConfigError, InputError, first_line
from offramp.files import json_text, replacing
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hf_config import eos_ids, from_hf, to_hf
from offramp.models.stored import INT8, encode, take, take_weights
from offramp.nn.unfilled import unfilled
from offramp.tokenizer import BLANK, BOS, EOS, PAD, TextTokenizer

_Config = TypeVar("_Config")

_PACKAGED = Path(__file__).parent.parent / "checkpoints"
# Models of all kinds in one dict: what a folder holds is told by its config.json alone.
SHIPPED = {
    name: _PACKAGED / name
    for name in ("lm-tiny", "parse-tiny", "asr-tiny", "stream-tiny", "speech-llm-tiny")
}
ENCODER_TYPE = "offramp-ctc"  # model_type of what models/ctc_checkpoint.py reads
TRANSDUCER_TYPE = "offramp-transducer"  # and of what models/transducer_checkpoint.py reads
SPEECH_LM_TYPE = "offramp-speech-lm"  # and of what models/speech_lm_checkpoint.py reads
COMPRESSED_TYPE = "offramp-compressed"  # and of what compress/checkpoint.py reads:
DECODER_KIND = "decoder"  # its kind is this or one of the first two above
_SPEECH = {
    ENCODER_TYPE: "offramp transcribe",
    TRANSDUCER_TYPE: "offramp stream",
    SPEECH_LM_TYPE: "offramp transcribe",
}

# Ours <- theirs: one matrix of ours may be several of theirs, stacked.
_LAYER_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
_TOP_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
}


@dataclass(frozen=True)
class DraftDefaults:
    """What drafts best with this checkpoint: offramp.json. None: not known."""

    exit_layer: int | None = None
    num_draft_tokens: int | None = None


def resolve(name: str, remedy: str | None = None) -> Path:
    """The folder of a shipped name, a path, or a hub id (downloaded through huggingface_hub).

    remedy: what to do where there is no such folder; None: give another.
    """
    if name in SHIPPED:
        if not SHIPPED[name].is_dir():
            raise CheckpointError(
                f"{name} does not come with this version; give the folder of such a checkpoint "
                "(offramp train makes them)"
            )
        return SHIPPED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        finished = path / "checkpoint"
        if (finished / "config.json").exists() and not (path / "config.json").exists():
            raise CheckpointError(f"{name} is the folder of a training run; give {finished}")
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder with config.json")
    is_path = name.startswith((".", "/", "~", "runs/"))  # where offramp train writes
    if name.count("/") == 1 and not is_path:
        return _download(name)
    known = f"give a folder, a hub id (owner/name), or one that ships: {', '.join(shipped())}"
    what = "folder" if "/" in name else "checkpoint"
    raise CheckpointError(f"there is no {what} {name}; {remedy or known}")


def shipped() -> list[str]:
    """The names in `SHIPPED` whose files are there."""
    return [name for name, path in SHIPPED.items() if path.is_dir()]


def load_config(folder: Path) -> DecoderConfig:
    """The tower in `folder`, compressed or not.

    generation_config.json may name further tokens that end a text.
    """
    values = read_json(folder / "config.json")
    compressed = is_compressed(folder)
    kind = values.get("kind" if compressed else "model_type")
    if (command := _SPEECH.get(str(kind))) is not None:
        raise CheckpointError(
            f"{folder} holds a speech recogniser, which writes no text by itself; give it to "
            f"{command}, or choose the folder of a language model"
        )
    raw = values.get("config")
    if compressed:
        config = DecoderConfig.from_dict(raw if isinstance(raw, dict) else {})
    else:
        config = from_hf(values)
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    both = (*config.eos_ids, *eos_ids(read_json(path)))
    return replace(config, eos_ids=tuple(dict.fromkeys(both)))


def is_compressed(folder: Path) -> bool:
    """Whether compress/checkpoint.py reads `folder`."""
    return read_json(folder / "config.json").get("model_type") == COMPRESSED_TYPE


def load_defaults(folder: Path) -> DraftDefaults:
    """What offramp.json in `folder` says; CheckpointError: it does not fit the tower there."""
    path = folder / "offramp.json"
    if not path.exists():
        return DraftDefaults()
    config = load_config(folder)
    limits = {"exit_layer": config.num_layers, "num_draft_tokens": config.max_positions}
    try:
        defaults = strict(DraftDefaults, read_json(path))
        for name, value in asdict(defaults).items():
            if value is not None:
                check_counts(1, **{name: value})
                if value >= limits[name]:
                    raise ConfigError(f"{name} is {value}; it must be less than {limits[name]}")
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: {error}; delete the file (offramp tune writes a new one)"
        ) from error
    return defaults


def weights_sha256(folder: Path) -> str:
    """Tells whether the weights in `folder` are still the same."""
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_decoder(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DecoderLM:
    """The tower in `folder`, every tensor checked by name and shape; not a compressed one."""
    config = load_config(folder)
    if is_compressed(folder):
        raise CheckpointError(
            f"{folder} holds a compressed model, which is ready for use and for nothing else; "
            "choose the folder of the one that it was made from"
        )
    with unfilled():
        model = DecoderLM(config)
    theirs = dict(read_tensors(folder))
    fill_decoder(model, theirs, folder, device, dtype)
    ignored = ["rotary_emb.inv_freq"]
    if config.tied_embeddings:
        ignored.append("lm_head.weight")  # the embedding once more
    refuse_unexplained(folder, [name for name in theirs if not name.endswith(tuple(ignored))])
    model.requires_grad_(False)
    return model.eval()


def fill_decoder(
    decoder: DecoderLM,
    theirs: dict[str, Tensor],
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give it the weights that `theirs`, as transformers lays them out, holds; they are taken out.

    CheckpointError names a tensor of `folder` that is missing or of another shape.
    """
    state = {}
    for name, p in decoder.named_parameters():
        parts = [
            take(theirs, part, (rows, *p.shape[1:]), folder)
            for part, rows in _their_rows(name, p.shape[0], decoder.config)
        ]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[name] = lay_out(tensor.to(device=device, dtype=dtype))
    decoder.load_state_dict(state, assign=True)


def lay_out(tensor: Tensor) -> Tensor:
    """The same tensor, a matrix with more rows than columns stored column by column.

    On a CPU the product of one token with such a matrix is up to five times as fast that way
    (measured with MKL on Zen 4, see docs/log.md); shape and values do not change.
    """
    tall = tensor.ndim == 2 and tensor.shape[0] > tensor.shape[1]
    return tensor.t().contiguous().t() if tall and tensor.device.type == "cpu" else tensor


def load_pieces(folder: Path, vocab_size: int, blank_id: int) -> list[str]:
    """What each token id of the speech model in `folder` writes; "" where it has no piece.

    CheckpointError: its tokenizer is another model's.
    """
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    if tokenizer.token_id(BLANK) != blank_id or tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{folder}/tokenizer.json has {tokenizer.vocab_size} pieces, blank "
            f"{tokenizer.token_id(BLANK)}; config.json says at most {vocab_size}, blank "
            f"{blank_id}: the files are not of one checkpoint"
        )
    pieces = tokenizer.pieces()
    return pieces + [""] * (vocab_size - len(pieces))


def save_decoder(
    model: DecoderLM,
    folder: Path,
    tokenizer: TextTokenizer | None = None,
    defaults: DraftDefaults | None = None,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_decoder` and transformers load; whole or not at all.

    defaults None: what offramp.json in `folder` says now, where it fits. dtype: of the stored
    weights (default: as they are). files: name -> text of further files, such as README.md.
    InputError: dtype is not of floats.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(
            f"a decoder cannot be stored in {dtype}, which transformers would not read; give "
            "float16, bfloat16 or float32"
        )
    check_target(folder)
    config = model.config
    defaults = defaults or _present_defaults(folder, config)
    theirs: dict[str, Tensor] = {}
    for name, p in model.state_dict().items():
        names, rows = zip(*_their_rows(name, len(p), config), strict=True)
        for their_name, part in zip(names, p.split(rows), strict=True):
            theirs[their_name] = part.detach().to("cpu", dtype or p.dtype).contiguous().clone()
    stored = next(iter(theirs.values())).dtype
    raw = to_hf(config) | {"dtype": str(stored).removeprefix("torch.")}
    own: dict[str, str] = {}
    if tokenizer is not None:
        own["tokenizer.json"] = tokenizer.to_json(pretty=True)
        own["tokenizer_config.json"] = json_text(_tokenizer_config(tokenizer))
    if defaults is not None:
        own["offramp.json"] = json_text(asdict(defaults))
    write_checkpoint(folder, theirs, raw, own | dict(files or {}))


def write_model(
    model: nn.Module,
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """What `described` and `fill` read, in `folder`'s place, whole or not at all.

    dtype: of the stored weights; int8: matrices of 8 bits and the rest in float16, see `stored.py`
    (default: as they are). files: name -> text of further files.
    """
    check_target(folder)
    how = {"stored": INT8} if dtype == torch.int8 else {}
    write_checkpoint(folder, stored_tensors(model, dtype), {**config, **how}, files or {})


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    """Weights, config.json and `files` (name -> text) in `folder`'s place, whole or not at all."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        texts = {"config.json": json_text(config), **files}
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        # safetensors lets only the owner read, whatever the umask.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")


def described(
    folder: Path, kind: str, parse: Callable[[Mapping[str, Any]], _Config], wanted: str
) -> _Config:
    """What `folder`/config.json describes, if it is a model of type `kind`.

    wanted: which folder to choose instead, for the CheckpointError where it is not.
    """
    path = folder / "config.json"
    values = read_json(path)
    found = values.pop("model_type", None)
    if found != kind:
        raise CheckpointError(
            f"{path} describes a model of type {found!r}, not {kind!r}; choose {wanted}"
        )
    if (stored := values.pop("stored", None)) not in (None, INT8):
        raise CheckpointError(
            f"{path} says that weights are stored as {stored!r}; this version reads {INT8} and "
            "plain ones, install a newer offramp"
        )
    try:
        return parse(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; fetch the checkpoint anew") from error


def fill(model: nn.Module, folder: Path, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give `model`, made on the meta device, the tensors in `folder`; frozen, in eval mode.

    Every one is checked by name and shape. dtype: of those that are not counts.
    """
    stored = dict(read_tensors(folder))
    state = {}
    for name, wanted in model.state_dict().items():
        tensor = take_weights(stored, name, wanted.shape, folder)
        kind = dtype if wanted.is_floating_point() else wanted.dtype
        state[name] = tensor.to(device=device, dtype=kind)
    refuse_unexplained(folder, sorted(stored))
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False).eval()


def check_finite(model: nn.Module, folder: Path) -> None:
    """CheckpointError: a model with NaN in it would write nothing at all, and not say why."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{folder}: {name} holds numbers that are not finite in {tensor.dtype}; fetch the "
                "checkpoint anew, or load it in float32"
            )


def stored_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What `fill` wants back. dtype: as in `write_model`, of those that are not counts."""
    whole = dtype == torch.int8
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        as_is = dtype is None or whole or not tensor.is_floating_point()
        kind = tensor.dtype if as_is else dtype
        tensors[name] = tensor.detach().to("cpu", kind).contiguous().clone()
    return encode(tensors) if whole else tensors


def refuse_unexplained(folder: Path, names: Sequence[str]) -> None:
    """CheckpointError if tensors `names` are left that the configuration has no place for."""
    if names:
        raise CheckpointError(
            f"{folder} holds {len(names)} tensors that config.json does not explain "
            f"(first: {names[0]}); the files are not of one checkpoint"
        )


def check_target(folder: Path) -> None:
    """CheckpointError if `folder` holds something that a checkpoint must not replace."""
    if folder.is_dir() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds files and is no checkpoint (it has no config.json); "
            "choose a new or empty folder"
        )


def _present_defaults(folder: Path, config: DecoderConfig) -> DraftDefaults | None:
    """What offramp.json in `folder` says now; None: nothing, or not for such a tower."""
    if not (folder / "offramp.json").exists():
        return None
    return load_defaults(folder) if load_config(folder).num_layers == config.num_layers else None


def _tokenizer_config(tokenizer: TextTokenizer) -> dict[str, Any]:
    """What AutoTokenizer needs beside tokenizer.json."""
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    special = {name: t for name, t in names.items() if tokenizer.token_id(t) is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 10**9,
        **special,
    }


def _their_rows(name: str, rows: int, config: DecoderConfig) -> list[tuple[str, int]]:
    """(name, rows) of Hugging Face's tensors that make up our parameter `name` of `rows` rows."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return [(f"{_TOP_NAMES[module]}.{kind}", rows)]
    _, index, rest = module.split(".", 2)
    names = [f"model.layers.{index}.{part}.{kind}" for part in _LAYER_NAMES[rest]]
    if rest == "attention.qkv":
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return list(zip(names, (n * config.head_dim for n in heads), strict=True))
    return [(part, rows // len(names)) for part in names]


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _weight_files(folder):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (a handle, not a dict)
                    yield name, file.get_tensor(name)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; fetch the checkpoint anew") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or corrupt ({error}); fetch the checkpoint anew"
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(
                f"{index} has no weight_map from tensors to files; fetch the checkpoint anew"
            )
        return [folder / shard for shard in sorted(set(shards.values()))]
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; "
        "pickled weights (.bin, .pt) are not read: convert them with transformers first"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; give the folder of a checkpoint, which holds one"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it anew") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it anew")
    return value


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {name}; to download a model of that name from the hub, "
            "pip install 'offramp[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the library raises many kinds, all of them "cannot be had"
        raise CheckpointError(
            f"there is no folder {name}, and it cannot be downloaded ({first_line(error)}); "
            "check the name and the network"
        ) from error
