"""Checkpoints of every supported family: from the same files transformers computes the same."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

import toy
from offramp.config import DecoderConfig
from offramp.errors import CheckpointError, ConfigError, OfframpError
from offramp.models import hub
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hf_config import from_hf, to_hf
from offramp.nn.cache import KVCache
from offramp.tokenizer import BOS, EOS, PAD, TextTokenizer, train_bpe
from thinned import thinned

transformers = pytest.importorskip("transformers")

B, T, V = 2, 40, 61
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# name -> (transformers' config class, what sets the family apart)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "Llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3": ("LlamaConfig", {"rope_parameters": rope(500_000.0)}),
    "Llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3, "eos_token_id": [2, 3, 4]}),
    "Llama 3.2": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "CodeLlama": ("LlamaConfig", {"num_key_value_heads": 4, "rope_parameters": rope(1e6)}),
    "Mistral": ("MistralConfig", {"sliding_window": 6}),
    "Mistral, no window": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "Qwen2": ("Qwen2Config", {"rope_parameters": rope(1e6), "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3 with biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
}
every_family = pytest.mark.parametrize(
    "family",
    thinned(
        FAMILIES.keys(),
        keep=("Llama with biases", "Llama 3.1", "Llama 3.2", "Mistral", "Qwen2", "Qwen3"),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars and no chatter from transformers."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


def build(family: str) -> Any:
    """A random model of `family` as transformers makes it, biases and norms random as well."""
    cls, changes = FAMILIES[family]
    config = getattr(transformers, cls)(
        **{
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "head_dim": 8,
            **changes,
        }
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    toy.randomize(model, seed=len(family))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """(folder as transformers writes it, logits of its model), by family."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(family: str) -> tuple[Path, Tensor]:
        if family not in made:
            model, folder = build(family), tmp_path_factory.mktemp("hf")
            model.save_pretrained(folder)
            made[family] = folder, theirs(model)
        return made[family]

    return get


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    return model(toy.tokens(B, T, V)).logits


def ours(model: DecoderLM, chunks: list[int] | None = None) -> Tensor:
    cache, L = KVCache(model.config, B, T), model.config.num_layers
    parts = toy.tokens(B, T, V).split(chunks or [T], 1)
    return torch.cat([model.logits(toy.run(model, part, cache), L) for part in parts], 1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# -- the same numbers ------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("chunks", [[T], [7, 1, 1, 16, 15]], ids=["whole", "chunked"])
def test_logits_equal_transformers(saved: Callable, family: str, chunks: list[int]) -> None:
    folder, expected = saved(family)
    model = hub.load_decoder(folder)
    assert expected.std() > 0.1, "the comparison would be empty"
    close(ours(model, chunks), expected)


@every_family
def test_transformers_loads_what_we_save(saved: Callable, family: str, tmp_path: Path) -> None:
    folder, expected = saved(family)
    model = hub.load_decoder(folder)
    hub.save_decoder(model, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    close(theirs(again), expected)
    assert again.dtype == torch.float32
    assert hub.load_config(tmp_path / "again") == model.config


@every_family
def test_saving_and_loading_keeps_every_bit(saved: Callable, family: str, tmp_path: Path) -> None:
    model = hub.load_decoder(saved(family)[0])
    hub.save_decoder(model, tmp_path / "again")
    again = hub.load_decoder(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("family", ["Llama 2", "Llama 3.2", "Qwen3"])
def test_shards_load_like_one_file(saved: Callable, family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    close(ours(hub.load_decoder(tmp_path)), saved(family)[1])
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.* is missing"):
        hub.load_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_stored_and_loaded_in_the_dtype_asked_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = toy.decoder()
    hub.save_decoder(model, tmp_path / "half", dtype=dtype)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    assert hub.load_decoder(tmp_path / "half").dtype == torch.float32
    loaded = hub.load_decoder(tmp_path / "half", dtype=dtype)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.to(dtype))
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert auto.dtype == dtype


def test_a_loaded_model_is_for_inference(tmp_path: Path) -> None:
    hub.save_decoder(toy.decoder(), tmp_path / "m")
    model = hub.load_decoder(tmp_path / "m")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# -- config.json -----------------------------------------------------------------------------


@every_family
def test_both_spellings_of_rotary_settings_mean_the_same(saved: Callable, family: str) -> None:
    raw = json.loads((saved(family)[0] / "config.json").read_text())
    new = from_hf(raw)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    assert from_hf(raw) == new
    if raw["rope_scaling"]:
        rope["type"] = rope.pop("rope_type")  # older still
        assert from_hf(raw) == new


@pytest.mark.parametrize("changes", toy.VARIANTS.values(), ids=toy.VARIANTS)
def test_config_survives_the_round_trip(changes: dict) -> None:
    config = toy.config(**changes, bos_id=1, eos_ids=(2, 3))
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True, "sliding_window": 4},
        {"qk_norm": True, "qkv_bias": True},
        {"qk_norm": True, "mlp_bias": True},
        {"output_bias": True},
        {"sliding_window": 4, "qkv_bias": True, "output_bias": True},
    ],
    ids=str,
)
def test_a_tower_of_no_family_is_not_saved(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Hugging Face family"):
        hub.save_decoder(toy.decoder(**changes), tmp_path / "m")
    assert not list(tmp_path.iterdir())


# -- refusals --------------------------------------------------------------------------------


def llama(folder: Path, **changes: Any) -> Path:
    """A checkpoint of ours with `changes` to its config.json."""
    hub.save_decoder(toy.decoder(), folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


def one_line(error: pytest.ExceptionInfo[OfframpError]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is on"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_hidden_layers": "5"}, "num_hidden_layers is '5'; it must be a whole number"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta is None; it must be a number"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ({"rope_parameters": None, "rope_scaling": 5}, "rope_scaling is 5; it must be an object"),
        ({"rope_parameters": {**LLAMA3, "factor": None}}, "factor is None; it must be a number"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "must be greater than low_freq"),
        (
            {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings is 1.5; it must be a whole number",
        ),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5; it must be a whole number of at least 0"),
        ({"eos_token_id": "a"}, "eos_token_id is 'a'"),
        ({"eos_token_id": [1, None]}, "eos_token_id is None"),
        ({"bos_token_id": "a"}, "bos_id is 'a'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a number greater than 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"quantization_config": "int4"}, r"quantised \(int4\)"),
        ({"layer_types": 5}, "layer_types is 5; it must be a list"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ", ".join(x),
)
def test_a_config_that_we_cannot_run_is_refused_by_name(
    changes: dict, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        hub.load_decoder(llama(tmp_path, **changes))
    assert one_line(error)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_a_config_that_lacks_a_size_is_refused_by_name(key: str, tmp_path: Path) -> None:
    raw = to_hf(toy.config())
    del raw[key]
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        from_hf(raw)


def test_generation_config_adds_tokens_that_end_a_text(saved: Callable, tmp_path: Path) -> None:
    """As transformers' generate stops at them."""
    folder = llama(tmp_path / "m", eos_token_id=[5, 2])
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model = hub.load_decoder(folder)
    assert model.config.eos_ids == (5, 2, 7)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert set(theirs.eos_token_id) <= set(model.config.eos_ids)
    hub.save_decoder(model, tmp_path / "again")
    assert hub.load_config(tmp_path / "again").eos_ids == (5, 2, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert hub.load_config(folder).eos_ids == (5, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ConfigError, match="eos_token_id is 'end'"):
        hub.load_decoder(folder)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q, K, GATE = (
    f"model.layers.1.{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "mlp.gate")
)
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "cut config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "list as config": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "not valid JSON"),
    "cut weights": (
        lambda f: (w := f / "model.safetensors").write_bytes(w.read_bytes()[:-99]),
        "model.safetensors is truncated or corrupt",
    ),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors is truncated or corrupt",
    ),
    "pickle only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pickled weights \(.bin, .pt\) are not read",
    ),
    **{
        f"index holds {index}": (
            lambda f, index=index: (
                (f / "model.safetensors").unlink(),
                (f / "model.safetensors.index.json").write_text(index),
            ),
            "model.safetensors.index.json has no weight_map",
        )
        for index in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}')
    },
    "missing tensor": (lambda f: edit(f, lambda t: t.pop(K)), f"lacks the tensor {K}"),
    "no head": (lambda f: edit(f, lambda t: t.pop("lm_head.weight")), "lacks .* lm_head.weight"),
    "extra tensor": (
        lambda f: edit(f, lambda t: t.update({"model.extra": torch.ones(1)})),
        "1 tensors that config.json does not explain .*model.extra",
    ),
    "other width": (
        lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        r"model.norm.weight has shape \[31\], config.json says \[32\]",
    ),
    "other width in a fused matrix": (
        lambda f: edit(f, lambda t: t.update({K: torch.ones(16, 31)})),
        r"k_proj.weight has shape \[16, 31\], config.json says \[16, 32\]",
    ),
    "other split of a fused matrix": (
        lambda f: edit(f, lambda t: t.update({Q: t[K].clone(), K: t[Q].clone()})),
        r"q_proj.weight has shape \[16, 32\], config.json says \[32, 32\]",
    ),
    "other rank": (
        lambda f: edit(f, lambda t: t.update({GATE: torch.ones(48)})),
        r"gate_proj.weight has shape \[48\], config.json says \[48, 32\]",
    ),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    folder = llama(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as error:
        hub.load_decoder(folder)
    assert one_line(error)
    assert str(tmp_path) in str(error.value)


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        hub.resolve(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"no checkpoint no-such-model; give .*lm-tiny"):
        hub.resolve("no-such-model")
    for name in ("./no", "./no/such", "/no/such", "~/no-such", "a/b/c", "runs/no-such"):
        with pytest.raises(CheckpointError, match=f"no folder {name}; give .*lm-tiny"):
            hub.resolve(name)
        with pytest.raises(CheckpointError, match=f"no folder {name}; make it$"):
            hub.resolve(name, "make it")
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"config.json is missing; give the folder of a"):
        hub.load_config(tmp_path)


def test_the_folder_of_a_run_names_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert hub.resolve(str(tmp_path)) == tmp_path, "the run has not ended"
    hub.save_decoder(toy.decoder(), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=f"training run; give {tmp_path}/checkpoint$"):
        hub.resolve(str(tmp_path))
    hub.save_decoder(toy.decoder(), tmp_path / "m")
    (tmp_path / "m" / "checkpoint").mkdir()
    (tmp_path / "m" / "checkpoint" / "config.json").touch()
    assert hub.resolve(str(tmp_path / "m")) == tmp_path / "m"


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(hf, "snapshot_download", refuse)
    said = r"no folder a/b, and it cannot be downloaded \(no route to host\); check"
    with pytest.raises(CheckpointError, match=said):
        hub.resolve("a/b")


def test_a_download_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no folder a/b; to download .*offramp\[hub\]"):
        hub.resolve("a/b")


# -- the rest of the folder ------------------------------------------------------------------


def test_a_folder_holds_tokenizer_defaults_and_further_files(tmp_path: Path) -> None:
    folder, defaults = tmp_path / "m", hub.DraftDefaults(exit_layer=2, num_draft_tokens=4)
    tokenizer = train_bpe(["a rose is a rose"], 270, [])
    hub.save_decoder(toy.decoder(), folder, tokenizer, defaults, files={"README.md": "Rose é\n"})
    assert hub.load_defaults(folder) == defaults
    assert (folder / "README.md").read_text(encoding="utf-8") == "Rose é\n"
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    assert fast("a rose").input_ids == tokenizer.encode("a rose")
    assert (fast.bos_token, fast.eos_token, fast.pad_token) == (BOS, EOS, PAD)
    (folder / "offramp.json").unlink()
    assert hub.load_defaults(folder) == hub.DraftDefaults()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"exit": 2}', "no setting exit; allowed: exit_layer"),
        ('{"exit_layer": "2"}', "exit_layer is '2'; it must be a whole number of at least 1"),
        ('{"exit_layer": 2.0}', "exit_layer is 2.0"),
        ('{"exit_layer": true}', "exit_layer is True"),
        ('{"exit_layer": 0}', "exit_layer is 0"),
        ('{"exit_layer": 5}', "exit_layer is 5; it must be less than 5"),
        ('{"num_draft_tokens": -1}', "num_draft_tokens is -1"),
        ('{"num_draft_tokens": 128}', "num_draft_tokens is 128; it must be less than 128"),
        ("[]", "no JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_defaults_that_do_not_fit_the_model_are_refused(
    text: str, says: str, tmp_path: Path
) -> None:
    folder = llama(tmp_path / "m")
    (folder / "offramp.json").write_text(text)
    with pytest.raises(CheckpointError, match=says) as error:
        hub.load_defaults(folder)
    assert one_line(error)
    assert str(folder / "offramp.json") in str(error.value)


def test_a_tokenizer_names_only_the_special_tokens_it_has(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, EOS: 1}, unk_token="a"))
    hub.save_decoder(toy.decoder(), tmp_path / "m", TextTokenizer(tokenizer))
    raw = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert {name for name in raw if name.endswith("_token")} == {"eos_token"}


def test_saving_keeps_what_tune_found_where_it_fits(tmp_path: Path) -> None:
    folder, found = tmp_path / "m", hub.DraftDefaults(exit_layer=3, num_draft_tokens=4)
    hub.save_decoder(toy.decoder(), folder, defaults=found)
    hub.save_decoder(toy.decoder(seed=1), folder)
    assert hub.load_defaults(folder) == found
    hub.save_decoder(toy.decoder(), folder, defaults=hub.DraftDefaults(exit_layer=1))
    assert hub.load_defaults(folder) == hub.DraftDefaults(exit_layer=1)
    hub.save_decoder(toy.decoder(num_layers=2), folder)
    assert hub.load_defaults(folder) == hub.DraftDefaults()


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "diary.txt").touch()
    with pytest.raises(CheckpointError, match=r"home holds files and is no checkpoint"):
        hub.save_decoder(toy.decoder(), folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["home", "diary.txt"]
    (folder / "diary.txt").unlink()
    hub.save_decoder(toy.decoder(), folder)
    assert hub.load_decoder(folder)


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        hub.save_decoder(toy.decoder(), tmp_path / "m", train_bpe(["a rose"], 270, []))
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()} == {0o644}


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder, second = tmp_path / "m", toy.decoder(seed=1)
    hub.save_decoder(toy.decoder(), folder, files={"old.txt": ""})
    hub.save_decoder(second, folder)
    assert torch.equal(hub.load_decoder(folder).embedding.weight, second.embedding.weight)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "m", "model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = tmp_path / "m", toy.decoder()
    hub.save_decoder(first, folder)

    def disk_full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_file", disk_full)
    with pytest.raises(OfframpError, match="No space left on device"):
        hub.save_decoder(toy.decoder(seed=1), folder)
    assert torch.equal(hub.load_decoder(folder).embedding.weight, first.embedding.weight)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_strict_configuration_names_what_is_wrong() -> None:
    values = {"vocab_size": 9, "d_model": 8, "num_layers": 1, "num_heads": 1, "head_dim": 4}
    with pytest.raises(ConfigError, match="has no setting heads; allowed: vocab_size"):
        DecoderConfig.from_dict({**values, "heads": 2})
    with pytest.raises(ConfigError, match="lacks num_kv_heads, d_ff, max_positions"):
        DecoderConfig.from_dict(values)
