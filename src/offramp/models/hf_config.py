"""Hugging Face's `config.json` to our `DecoderConfig` and back; the rest is refused by name.

Both spellings of rotary settings are read: `rope_theta` + `rope_scaling` (up to transformers 4)
and `rope_parameters` (from 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp.config import DecoderConfig, RopeScaling
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
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type is {family!r}; supported: {', '.join(FAMILIES)} "
            "(Llama 2/3/3.1/3.2 and CodeLlama are 'llama')"
        )
    _refuse(raw, family)
    attention_bias = bool(raw.get("attention_bias", False))
    eos = raw.get("eos_token_id")
    try:
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            d_model=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            d_ff=raw["intermediate_size"],
            max_positions=raw["max_position_embeddings"],
            rope_theta=float(_rope(raw).get("rope_theta", 10_000.0)),
            rope_scaling=_rope_scaling(raw),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias and family != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_window=raw.get("sliding_window") if family == "mistral" else None,
            bos_id=raw.get("bos_token_id"),
            eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )
    except KeyError as error:
        raise ConfigError(
            f"config.json of model_type {family!r} lacks {error.args[0]!r}; fetch the file anew"
        ) from error


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


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    old = {"rope_theta": raw.get("rope_theta", 10_000.0), **(raw.get("rope_scaling") or {})}
    return raw.get("rope_parameters") or old


def _rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"rope scaling is {kind!r}; supported: default, llama3")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _refuse(raw: Mapping[str, Any], family: str) -> None:
    """ConfigError for settings of a supported family that our layers do not have."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}; supported: silu")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"the checkpoint is quantised ({method}); supported: fp32, bf16 and fp16 weights"
        )
    if (
        raw.get("partial_rotary_factor", 1.0) != 1.0
        or _rope(raw).get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise ConfigError("partial_rotary_factor is not 1; supported: full rotary positions")
    sliding = "sliding_attention" in (raw.get("layer_types") or ())
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
