"""Exits on transformers' CTC models: the last is transformers', the others are the tower's laws."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.models.hf_ctc import (
    PretrainedCTCEncoder,
    attach_exits,
    load_exits,
    load_pretrained,
    save_exits,
)
from toy import randomize

transformers = pytest.importorskip("transformers")

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
LENGTHS = (900, 1500, 611)  # samples; a tenth of it frames for Parakeet


def theirs(name: str, seed: int = 0, **settings: Any) -> Any:
    """A random transformers model, in eval mode."""
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


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


# -- equal to transformers -----------------------------------------------------------------------


def test_the_last_exit_is_transformers_own(name: str) -> None:
    x, lengths = inputs(name)
    encoder = toy(name)
    for row, n in enumerate(lengths.tolist()):
        own, alone = encoder.base(x[row : row + 1, :n]).logits, torch.tensor([n])
        state = encoder.embed(x[row : row + 1, :n], alone)
        state = encoder.run(state, 0, L)
        assert state.lengths.tolist() == [own.shape[1]]
        assert_close(encoder.logits(state, L), own, 1e-4)
        assert own.std() > 0.05  # random weights that do something


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_a_batch_is_transformers_own_where_padding_does_not_matter_to_it(name: str) -> None:
    x, lengths = inputs(name)
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    encoder = toy(name)
    own = encoder.base(x.clone(), attention_mask=mask.long()).logits
    state = encoder.run(encoder.embed(x, lengths), 0, L)
    ours = encoder.logits(state, L)
    differences = [
        float((a[:n] - b[:n]).abs().max())
        for a, b, n in zip(ours, own, state.lengths.tolist(), strict=True)
    ]
    if MODELS[name][2]:
        assert max(differences) < 1e-4
    else:  # ours gives what the row gives alone, which is why these differ
        assert max(differences) > 1e-3


def test_every_layer_is_transformers_own(name: str) -> None:
    """Through exits everywhere, against transformers' record of its hidden states."""
    x, lengths = inputs(name)
    x, lengths = x[1:2], lengths[1:2]
    encoder = toy(name, exits=tuple(range(1, L + 1)))
    hidden = encoder.base(x, output_hidden_states=True).hidden_states
    state = encoder.embed(x, lengths)
    for layer in range(L):
        assert_close(state.h, hidden[layer], 1e-4)
        state = encoder.run(state, layer, layer + 1)
    if MODELS[name][1].get("do_stable_layer_norm") is None:  # else the last one is normed
        assert_close(state.h, hidden[L], 1e-4)


# -- a tower -------------------------------------------------------------------------------------


def test_a_batch_gives_what_each_utterance_gives_alone(name: str) -> None:
    encoder = toy(name)
    x, lengths = inputs(name)
    batched = all_exits(encoder, x, lengths)
    frames = encoder.embed(x, lengths).lengths
    for row, n in enumerate(lengths.tolist()):
        alone = all_exits(encoder, x[row : row + 1, :n], torch.tensor([n]))
        for exit_layer, log_probs in alone.items():
            assert log_probs.shape[1] == frames[row]
            assert_close(batched[exit_layer][row, : frames[row]], log_probs[0])


def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    encoder = toy(name)
    clean, lengths = inputs(name)
    dirty, _ = inputs(name, padding=torch.nan)
    wide = torch.cat((dirty, torch.full_like(dirty, 7.0)), dim=1)
    expected, found = all_exits(encoder, clean, lengths), all_exits(encoder, wide, lengths)
    frames = encoder.embed(clean, lengths).lengths
    for exit_layer, log_probs in expected.items():
        for row, T in enumerate(frames.tolist()):
            assert_close(found[exit_layer][row, :T], log_probs[row, :T])


def test_resumed_is_whole_and_no_layer_runs_twice(name: str) -> None:
    encoder = toy(name)
    x, lengths = inputs(name)
    layers = encoder.base.encoder if MODELS[name][0] == "Parakeet" else encoder._family._encoder
    calls: list[int] = []
    for i, layer in enumerate(layers.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    start = encoder.embed(x, lengths)
    assert calls == []
    whole = encoder.run(start, 0, L)
    assert calls == list(range(L))
    calls.clear()
    state = encoder.run(encoder.run(start, 0, 2), 2, 2)
    encoder.log_probs(state, 2)
    assert calls == [0, 1]  # nothing beyond the exit
    state = encoder.run(encoder.run(state, 2, 3), 3, L)
    assert calls == list(range(L))
    assert torch.equal(state.h, whole.h) and state.layer == L


@pytest.mark.parametrize("rows", [[2, 0], [1]])
def test_selected_rows_go_on_as_they_would_have(name: str, rows: list[int]) -> None:
    encoder = toy(name)
    state = encoder.run(encoder.embed(*inputs(name)), 0, 2)
    expected = encoder.log_probs(encoder.run(state, 2, L), L)
    some = state.select(rows)
    assert some.h.shape[1] == int(state.lengths[rows].max())
    found = encoder.log_probs(encoder.run(some, 2, L), L)
    for row, now in zip(rows, range(len(rows)), strict=True):
        T = int(state.lengths[row])
        assert_close(found[now, :T], expected[row, :T])
    again = some.select([0]).select(torch.tensor([0]))  # also after it was trimmed
    T = int(state.lengths[rows[0]])
    assert_close(encoder.log_probs(encoder.run(again, 2, L), L)[0, :T], expected[rows[0], :T])


def test_log_probabilities_are_float32_and_sum_to_1(name: str) -> None:
    encoder = toy(name).bfloat16()
    x, lengths = inputs(name)
    for log_probs in all_exits(encoder, x, lengths).values():
        assert log_probs.dtype == torch.float32 and log_probs.shape[2] == V
        assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))


def test_states_and_exits_are_checked() -> None:
    encoder = toy("parakeet")
    x, lengths = inputs("parakeet")
    state = encoder.run(encoder.embed(x, lengths), 0, 2)
    for start, stop in ((0, 2), (2, 1), (2, L + 1), (3, 4)):
        with pytest.raises(InputError, match="after 2 layers"):
            encoder.run(state, start, stop)
    for exit_layer in (4, 3, L):
        with pytest.raises(InputError, match="after 2 layers"):
            encoder.log_probs(state, exit_layer)
    with pytest.raises(InputError, match="no rows"):
        state.select([])
    with pytest.raises(InputError, match=r"features \[B, T, 16\]"):
        encoder.embed(x[..., :9], lengths)
    for wrong in ((x, lengths + 99), (x, lengths[:2]), (x[:0], lengths[:0])):
        with pytest.raises(InputError, match="one true length"):
            encoder.embed(*wrong)
    with pytest.raises(InputError, match="no frame"):
        toy("wavlm group norm").embed(torch.zeros(2, 400), torch.tensor([400, 9]))


# -- exits ---------------------------------------------------------------------------------------


def test_default_exits_are_every_second_layer() -> None:
    assert attach_exits(theirs("parakeet")).config.exits == (2, 4, 5)
    even = theirs("hubert group norm", num_hidden_layers=4)
    assert attach_exits(even).config.exits == (2, 4)
    for exits in ((), (0, L), (2, 4), (3, 3, L), (4, 2, L), (2, L, L + 1)):
        with pytest.raises(ConfigError, match="exits"):
            attach_exits(even if exits == (2, L, L + 1) else theirs("parakeet"), exits)


def test_a_new_exit_reads_through_a_copy_of_the_last_norm_and_head() -> None:
    for name, norm in (("wav2vec2 layer norm first", True), ("parakeet", False)):
        encoder = attach_exits(theirs(name))
        state = encoder.run(encoder.embed(*inputs(name)), 0, 2)
        h = state.h
        if norm:
            last = encoder.base.lm_head(encoder.base.wav2vec2.encoder.layer_norm(h))
        else:
            last = encoder.base.ctc_head(torch.nn.functional.layer_norm(h, h.shape[-1:]))
        assert_close(encoder.logits(state, 2), last)


def test_what_decoding_needs_to_know() -> None:
    config = toy("parakeet").config
    assert (config.blank_id, config.vocab_size, config.num_layers) == (V - 1, V, L)
    assert (config.input_size, config.hop, config.family) == (16, 8, "parakeet_ctc")
    config = toy("wavlm layer norm first").config
    assert (config.blank_id, config.input_size, config.hop) == (0, None, 20)


# -- training ------------------------------------------------------------------------------------


def gradients(encoder: PretrainedCTCEncoder, name: str) -> set[str]:
    """Names of the parameters that a CTC loss over all exits reaches."""
    x, lengths = inputs(name)
    frames = encoder.embed(x, lengths).lengths
    targets, sizes = torch.tensor([[1, 2], [3, 1], [2, 3]]), torch.tensor([2, 2, 2])
    loss = sum(
        torch.nn.functional.ctc_loss(
            p.transpose(0, 1), targets, frames, sizes, encoder.config.blank_id
        )
        for p in all_exits(encoder, x, lengths).values()
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    return {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}


def test_heads_alone_or_everything_can_be_trained(name: str) -> None:
    encoder = toy(name).requires_grad_(True).train()
    reached = gradients(encoder, name)
    unused = {n for n, _ in encoder.named_parameters()} - reached
    # A key's bias shifts all its row's scores alike; the mask vector is SpecAugment's.
    assert all(re.search(r"k_proj\.bias|masked_spec_embed", n) for n in unused), unused
    encoder.zero_grad(set_to_none=True)
    encoder.freeze_base()
    assert gradients(encoder, name) == {n for n, _ in encoder.named_parameters() if "heads." in n}


def test_a_frozen_model_stays_as_it_is_in_training() -> None:
    encoder = toy("parakeet").train()
    encoder.freeze_base()
    before = {k: v.clone() for k, v in encoder.base.state_dict().items()}
    a, b = (all_exits(encoder, *inputs("parakeet"))[L] for _ in range(2))
    assert torch.equal(a, b)  # no dropout
    after = encoder.base.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # no new statistics
    assert encoder.training and not encoder.base.training
    encoder.freeze_base(False)
    assert encoder.base.training and all(p.requires_grad for p in encoder.base.parameters())
    a, b = (all_exits(encoder, *inputs("parakeet"))[L] for _ in range(2))
    assert not torch.equal(a, b)


# -- files ---------------------------------------------------------------------------------------


def test_a_saved_checkpoint_loads_with_the_same_exits(name: str, tmp_path: Path) -> None:
    encoder = toy(name, exits=(1, 4, L))
    encoder.base.save_pretrained(tmp_path / "model")
    save_exits(encoder, tmp_path / "new" / "exits.safetensors")
    again = load_pretrained(tmp_path / "model", exits=(1, 4, L))
    load_exits(again, tmp_path / "new" / "exits.safetensors")
    assert not again.training
    again.requires_grad_(False)
    x, lengths = inputs(name)
    expected = all_exits(encoder, x, lengths)
    for exit_layer, log_probs in all_exits(again, x, lengths).items():
        assert_close(log_probs, expected[exit_layer])
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["exits.safetensors"]


def test_exits_of_another_model_are_refused(tmp_path: Path) -> None:
    encoder, path = toy("parakeet"), tmp_path / "exits.safetensors"
    save_exits(encoder, path)
    before = {k: v.clone() for k, v in encoder.heads.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"exits is \[2, 4, 5\], not \[3, 5\]"):
        load_exits(toy("parakeet", exits=(3, L)), path)
    with pytest.raises(CheckpointError, match="family is parakeet_ctc, not hubert"):
        load_exits(toy("hubert group norm"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot load exits"):
        load_exits(encoder, path)
    with pytest.raises(CheckpointError, match="cannot load exits"):
        load_exits(encoder, tmp_path / "nothing")
    encoder.base.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no exit heads"):
        load_exits(encoder, tmp_path / "model" / "model.safetensors")
    after = encoder.heads.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_other_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    llama = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"'llama'; allowed: wav2vec2, hubert, wavlm, parakeet"):
        load_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="'Linear'"):
        attach_exits(torch.nn.Linear(2, 2))
    own = theirs("wav2vec2 group norm")
    with pytest.raises(ConfigError, match="Wav2Vec2Model; it must be a Wav2Vec2ForCTC"):
        attach_exits(own.wav2vec2)
    with pytest.raises(ConfigError, match="add_adapter"):
        attach_exits(theirs("wav2vec2 group norm", add_adapter=True, num_adapter_layers=1))
    own.config.pad_token_id = None
    with pytest.raises(ConfigError, match="blank"):
        attach_exits(own)


def test_checkpoints_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    own = theirs("wav2vec2 group norm")
    own.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut"):
        load_pretrained(tmp_path / "cut")
    own.wav2vec2.save_pretrained(tmp_path / "pretrained")  # not trained with CTC: no head
    with pytest.raises(CheckpointError, match=r"lacks lm_head"):
        load_pretrained(tmp_path / "pretrained")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"offramp\[hf\]"):
        load_pretrained(tmp_path / "cut")


# -- the how-to ----------------------------------------------------------------------------------

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "exits-on-your-speech-model.md"


def test_the_how_to_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs("wav2vec2 layer norm first", vocab_size=8).save_pretrained("my-model")
    vocab = {c: i for i, c in enumerate(["<pad>", "|", "a", "b", "c", "<unk>", "<s>", "</s>"])}
    Path("vocab.json").write_text(json.dumps(vocab))
    transformers.Wav2Vec2CTCTokenizer("vocab.json").save_pretrained("my-model")
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained("my-model")
    random = np.random.default_rng(0)
    for n in (1, 2, 3):
        soundfile.write(f"{n}.wav", 0.1 * random.standard_normal(300 * n + 200), 16_000)
    Path("train.tsv").write_text("1.wav\tab\n2.wav\tc a\n3.wav\tbb\n")
    blocks = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(HOW_TO), "exec"), names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[:30]]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert isinstance(names["text"], str) and names["state"].layer in names["encoder"].config.exits
