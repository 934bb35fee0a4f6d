"""Random transformers CTC models of every family, small, and folders of them as one finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.models.hf_ctc import PretrainedCTCEncoder, attach_exits
from toy_encoder import randomize

L, V = 5, 11

SAMPLES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "pad_token_id": 0,
}
FIRST: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}

# name: (transformers' name, settings, whether transformers' own batches are padding-invariant)
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "wav2vec2 group norm": ("Wav2Vec2", {}, False),
    "wav2vec2 layer norm first": ("Wav2Vec2", {**FIRST, "adapter_attn_dim": 8}, True),
    "wav2vec2 eager": ("Wav2Vec2", {**FIRST, "attn_implementation": "eager"}, True),
    "hubert group norm": ("Hubert", {}, False),
    "hubert layer norm first": ("Hubert", {**FIRST, "feat_proj_layer_norm": False}, True),
    "hubert batch norm": ("Hubert", {**FIRST, "conv_pos_batch_norm": True}, False),
    "wavlm group norm": ("WavLM", {"num_buckets": 20, "max_bucket_distance": 40}, False),
    "wavlm layer norm first": ("WavLM", {**FIRST, "num_buckets": 20}, True),
    "parakeet": ("Parakeet", {}, True),
    "parakeet without scale": ("Parakeet", {"scale_input": False, "subsampling_factor": 4}, True),
}
PARAKEET: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_kernel_size": 5,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
}
# By the default suite, of large matrices: one of each family.
KEPT = ("wav2vec2 layer norm first", "hubert batch norm", "wavlm group norm", "parakeet")
LENGTHS = (900, 1500, 611)  # samples; a tenth of it frames for Parakeet


def theirs(name: str, seed: int = 0, **settings: Any) -> Any:
    """A random transformers model, in eval mode."""
    import transformers

    family, own, _ = MODELS[name]
    own = {**own, **settings}
    if family == "Parakeet":
        encoder = transformers.ParakeetEncoderConfig(**{**PARAKEET, **own})
        config = transformers.ParakeetCTCConfig(
            vocab_size=V, pad_token_id=V - 1, encoder_config=encoder
        )
    else:
        attention = own.pop("attn_implementation", None)
        config = getattr(transformers, f"{family}Config")(**{**SAMPLES, **own})
        config._attn_implementation = attention
    model = getattr(transformers, f"{family}ForCTC")(config)
    randomize(model, seed)
    for buffer, value in model.named_buffers():  # batch norms that do something
        if buffer.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def toy(name: str, seed: int = 0, exits: tuple[int, ...] | None = None) -> PretrainedCTCEncoder:
    """With exit heads that all differ, and no gradients."""
    encoder = attach_exits(theirs(name, seed), exits)
    randomize(encoder.heads, seed + 1)
    return encoder.eval().requires_grad_(False)


def inputs(name: str, seed: int = 0, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Three utterances of different lengths, with `padding` behind them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    if MODELS[name][0] == "Parakeet":
        lengths = lengths // 10
        x = torch.randn(3, int(lengths.max()), 16, generator=generator)
    else:
        x = torch.randn(3, int(lengths.max()), generator=generator)
    beyond = torch.arange(x.shape[1]) >= lengths[:, None]
    return x.masked_fill(beyond if x.ndim == 2 else beyond[..., None], padding), lengths


def all_exits(encoder: PretrainedCTCEncoder, x: Tensor, lengths: Tensor) -> dict[int, Tensor]:
    state, found = encoder.embed(x, lengths), {}
    for exit_layer in encoder.config.exits:
        state = encoder.run(state, state.layer, exit_layer)
        found[exit_layer] = encoder.log_probs(state, exit_layer)
    return found


WORDS = ("ab", "c a", "bb", "a c b")  # what the vocabulary can write


def save_checkpoint(folder: Path, name: str = "wav2vec2 layer norm first", **settings: Any) -> Path:
    """A folder with model, feature extractor and tokenizer, as transformers writes it."""
    import transformers

    folder.mkdir(parents=True)
    if MODELS[name][0] != "Parakeet":
        settings = {"conv_stride": (5, 8, 4), **settings}  # 10 ms, or tests take long
    theirs(name, **settings).save_pretrained(folder)
    if MODELS[name][0] == "Parakeet":
        extractor = transformers.ParakeetFeatureExtractor(feature_size=PARAKEET["num_mel_bins"])
        tokenizer = _parakeet_tokenizer()
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
        vocab = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "'", "D", "E"]
        path = folder / "vocab.json"
        path.write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(path))
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _parakeet_tokenizer() -> Any:
    """Pieces with U+2581, the blank behind them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    start = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = ["<unk>", start, f"{start}a", "a", "b", "c", f"{start}b", "d", "e", "f"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, [(start, "a"), (start, "b")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = transformers.ParakeetTokenizer(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>"
    )
    assert tokenizer.pad_token_id == V - 1
    return tokenizer
