"""Hugging Face's `config.json` to our `DecoderConfig` and back; the rest is refused by name.

Both spellings of rotary settings are read: `rope_theta` + `rope_scaling` (up to transformers 4)
and `rope_parameters` (from 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp.config import DecoderConfig, RopeScaling, check_counts, check_positive
from offramp.errors import ConfigError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """The tower that `raw`, a parsed config.json, describes; ConfigError: we do not have it."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"model_type is {family!r}; supported: {', '.join(FAMILIES)} "
            "(Llama 2/3/3.1/3.2 and CodeLlama are 'llama')"
        )
    _refuse(raw, family)
    attention_bias = _flag(raw, "attention_bias")
    try:
        width, heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
        return DecoderConfig(
            vocab_size=_count(raw, "vocab_size"),
            d_model=width,
            num_layers=_count(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_count(raw, "num_key_value_heads", heads),
            head_dim=_count(raw, "head_dim", width // heads),
            d_ff=_count(raw, "intermediate_size"),
            max_positions=_count(raw, "max_position_embeddings"),
            rope_theta=_positive(_rope(raw), "rope_theta"),
            rope_scaling=_rope_scaling(raw),
            norm_eps=_positive({"rms_norm_eps": 1e-6, **raw}, "rms_norm_eps"),
            tied_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias and family != "qwen2",
            mlp_bias=_flag(raw, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_window=raw.get("sliding_window") if family == "mistral" else None,
            bos_id=raw.get("bos_token_id"),
            eos_ids=eos_ids(raw),
        )
    except KeyError as error:
        raise ConfigError(
            f"config.json of model_type {family!r} lacks {error.args[0]!r}; fetch the file anew"
        ) from error


def eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text by `raw`, a parsed config.json or generation_config.json."""
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        check_counts(0, eos_token_id=token)
    return tuple(ids)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A config.json with which transformers builds the same tower."""
    family = _family(config)
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.output_bias,
        "rope_parameters": rope,
        # Both spellings: transformers before 5 reads these two.
        "rope_theta": config.rope_theta,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
    }
    if config.rope_scaling is not None:
        raw["rope_scaling"] = rope
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        raw["sliding_window"] = config.sliding_window
    return raw


def _count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The size at `key`; `default`, if there is one, where it is null or missing."""
    if default is not None and raw.get(key) is None:
        return default
    check_counts(1, **{key: raw[key]})
    return int(raw[key])


def _positive(raw: Mapping[str, Any], key: str) -> float:
    check_positive(**{key: raw[key]})
    return float(raw[key])


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    return bool(value)


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of either spelling, `rope_theta` among them."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    settings = raw.get(key) or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key} is {settings!r}; it must be an object of settings")
    return {"rope_theta": raw.get("rope_theta", 10_000.0), **settings}


def _rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope scaling is {kind!r}; supported: default, llama3")
    return RopeScaling(
        factor=_positive(rope, "factor"),
        low_freq_factor=_positive(rope, "low_freq_factor"),
        high_freq_factor=_positive(rope, "high_freq_factor"),
        original_max_positions=_count(rope, "original_max_position_embeddings"),
    )


def _refuse(raw: Mapping[str, Any], family: str) -> None:
    """ConfigError for settings of a supported family that our layers do not have."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}; supported: silu")
    if quantised := raw.get("quantization_config"):
        known = isinstance(quantised, Mapping)
        method = quantised.get("quant_method", "unknown") if known else quantised
        raise ConfigError(
            f"the checkpoint is quantised ({method}); supported: fp32, bf16 and fp16 weights"
        )
    if (
        raw.get("partial_rotary_factor", 1.0) != 1.0
        or _rope(raw).get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise ConfigError("partial_rotary_factor is not 1; supported: full rotary positions")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ConfigError(f"layer_types is {kinds!r}; it must be a list, one entry per layer")
    sliding = "sliding_attention" in kinds
    if family.startswith("qwen") and (raw.get("use_sliding_window") or sliding):
        raise ConfigError(
            "use_sliding_window is on; supported for qwen2 and qwen3: full attention in every layer"
        )


def _family(config: DecoderConfig) -> str:
    """The Hugging Face family that has just these features."""
    if config.qk_norm:
        family, same = "qwen3", config.qkv_bias == config.output_bias
    elif config.qkv_bias and not config.output_bias:
        family, same = "qwen2", True
    elif config.sliding_window is not None:
        family, same = "mistral", not config.qkv_bias
    else:
        family, same = "llama", config.qkv_bias == config.output_bias
    only_llama = config.mlp_bias and family != "llama"
    windowed = config.sliding_window is not None and family != "mistral"
    if not same or only_llama or windowed:
        raise ConfigError(
            "no Hugging Face family has this mix of biases, q/k norm and sliding window; "
            f"supported: the mixes of {', '.join(FAMILIES)}"
        )
    return family
