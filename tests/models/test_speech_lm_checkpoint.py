"""Speech-LMs survive the disk and are joined from folders; what does not fit is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

import toy
import toy_encoder
import toy_hf
import toy_speech_lm
from damage import Damage, tensors
from offramp.config_speech_lm import HeadsConfig, ProjectorConfig
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import load_encoder, save_encoder
from offramp.models.decoder_lm import DecoderLM
from offramp.models.hf_ctc import PretrainedCTCEncoder
from offramp.models.hub import load_config, load_decoder, save_decoder
from offramp.models.speech_lm import SpeechLM
from offramp.models.speech_lm_checkpoint import (
    SpeechLMCheckpoint,
    SpeechLMParts,
    join_speech_lm,
    load_speech_lm,
    load_speech_lm_config,
)
from offramp.tokenizer import BLANK, TextTokenizer
from thinned import thinned
from toy_encoder import features
from toy_speech_lm import KEPT, LENGTHS, TEXTS, VARIANTS, V

PROJECTOR = ProjectorConfig(stack=2, d_hidden=24)
HEADS = HeadsConfig(3)


def outputs(model: SpeechLM) -> list[Tensor]:
    """All that it computes."""
    heard = model.hear(*features(LENGTHS))
    states = model.read(heard, TEXTS)
    found = [*heard.audio, *heard.exits.values(), states]
    return found if model.heads is None else [*found, model.heads.logits(states, model.decoder)]


def is_frozen(model: nn.Module) -> bool:
    return not any(m.training for m in model.modules()) and not any(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize("changes", thinned(VARIANTS, KEPT))
def test_what_is_loaded_equals_what_was_saved(changes: dict[str, Any], tmp_path: Path) -> None:
    made = toy_speech_lm.checkpoint(**changes)
    made.save(tmp_path / "m")
    loaded = load_speech_lm(tmp_path / "m")
    assert loaded.model.config == load_speech_lm_config(tmp_path / "m") == made.model.config
    assert loaded.model.prompt == made.model.prompt
    assert loaded.tokenizer.to_json() == made.tokenizer.to_json()
    assert loaded.reader is None
    assert is_frozen(loaded.model)
    state = loaded.model.state_dict()
    assert list(state) == list(made.model.state_dict())
    assert all(torch.equal(state[name], x) for name, x in made.model.state_dict().items())
    for ours, theirs in zip(outputs(loaded.model), outputs(made.model), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    made = toy_speech_lm.checkpoint(heads=HEADS)
    made.save(tmp_path, dtype=torch.float16)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert load_speech_lm(tmp_path).model.dtype == torch.float32
    state = load_speech_lm(tmp_path, dtype=torch.float64).model.state_dict()
    assert {x.dtype for x in state.values()} == {torch.float64}


def test_further_files_lie_beside_and_go_with_the_checkpoint(tmp_path: Path) -> None:
    made = toy_speech_lm.checkpoint()
    made.save(tmp_path / "m", files={"README.md": "read me\n"})
    assert (tmp_path / "m" / "README.md").read_text() == "read me\n"
    made.save(tmp_path / "m")
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "m")) == wanted
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    toy_speech_lm.checkpoint().save(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*m"):
        toy_speech_lm.checkpoint(1).save(tmp_path / "m", files={"no/such/folder.txt": ""})
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds files and is no checkpoint"):
        toy_speech_lm.checkpoint().save(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


# -- joined from folders -------------------------------------------------------------------------


def encoder_folder(folder: Path, **changes: Any) -> Path:
    save_encoder(toy_encoder.encoder(**(toy_encoder.OURS | changes)), folder)
    return folder


def decoder_folder(folder: Path, **changes: Any) -> Path:
    named = {"bos_id": 0, "eos_ids": (1,)}
    save_decoder(toy.decoder(**(named | changes)), folder, toy_speech_lm.tokenizer())
    return folder


def join(tmp_path: Path, seed: int = 3, **changes: Any) -> SpeechLMCheckpoint:
    """Of toys in folders beside `tmp_path`, with these `changes` to the parts."""
    parts: dict[str, Any] = {"projector": PROJECTOR, **changes}
    parts.setdefault("encoder", tmp_path / "encoder")
    parts.setdefault("decoder", tmp_path / "decoder")
    if not (tmp_path / "encoder").exists():
        encoder_folder(tmp_path / "encoder")
    if not (tmp_path / "decoder").exists():
        decoder_folder(tmp_path / "decoder")
    parts |= {name: str(parts[name]) for name in ("encoder", "decoder")}
    return join_speech_lm(SpeechLMParts(**parts), seed)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("family", thinned(toy.VARIANTS, keep=("biases", "tied")))
def test_a_decoder_of_any_kind_is_joined_and_kept(family: dict[str, Any], tmp_path: Path) -> None:
    decoder_folder(tmp_path / "decoder", **family)
    made = join(tmp_path, heads=HEADS, prompt="w3 {audio} w4")
    assert made.reader is None
    assert is_frozen(made.model)
    assert isinstance(made.model.encoder, CTCEncoder)
    assert isinstance(made.model.decoder, DecoderLM)
    assert same_weights(made.model.encoder, load_encoder(tmp_path / "encoder"))
    assert same_weights(made.model.decoder, load_decoder(tmp_path / "decoder"))
    assert same_weights(made.model.projector, join(tmp_path).model.projector)
    assert not same_weights(made.model.projector, join(tmp_path, seed=4).model.projector)
    made.save(tmp_path / "m")
    loaded = load_speech_lm(tmp_path / "m").model
    for ours, theirs in zip(outputs(loaded), outputs(made.model), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_encoder_gets_a_ctc_head_in_the_decoders_tokens(tmp_path: Path) -> None:
    """Its own vocabulary may even be of the size wanted, and all that depends on it is new."""
    encoder_folder(tmp_path / "encoder", vocab_size=V + 1, blank_id=0)
    made = join(tmp_path, ctc_exit=3, new_ctc_head=True).model
    assert isinstance(made.encoder, CTCEncoder)
    config = made.encoder.config
    assert (config.vocab_size, config.blank_id) == (V + 1, V)
    old = load_encoder(tmp_path / "encoder").state_dict()
    changed = {n for n, x in made.encoder.state_dict().items() if not torch.equal(x, old[n])}
    vocabulary = {"heads.0.weight", "heads.0.bias", "feedback.weight", "feedback.bias"}
    assert changed == vocabulary
    log_probs = made.hear(*features(LENGTHS)).ctc_log_probs
    assert log_probs is not None
    assert log_probs.shape[-1] == V + 1


def test_a_ctc_that_drafts_writes_the_decoders_tokens_by_their_ids(tmp_path: Path) -> None:
    heard = toy_encoder.encoder(**(toy_encoder.OURS | {"vocab_size": V + 1, "blank_id": V}))
    same, other = toy_speech_lm.WORDS, [f"v{i}" for i in range(2, V)]
    for words, fits in (
        (same, True),
        ([*same, BLANK], True),
        ([*other, BLANK], False),
        (same[::-1], False),
    ):
        tokens = toy_speech_lm.tokenizer(words)
        save_encoder(heard, tmp_path / "encoder", files={"tokenizer.json": tokens.to_json()})
        if fits:
            assert join(tmp_path, ctc_exit=3).model.config.ctc_exit == 3
            continue
        says = (
            r"decoder in .*decoder writes other tokens than those of the encoder in .*encoder; set "
        )
        with pytest.raises(ConfigError, match=says + "new_ctc_head .*, or leave ctc_exit out"):
            join(tmp_path, ctc_exit=3)
    assert join(tmp_path, ctc_exit=3, new_ctc_head=True).model.config.ctc_exit == 3
    save_encoder(heard, tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"encoder.tokenizer.json is missing"):
        join(tmp_path, ctc_exit=3)


@pytest.mark.slow
def test_a_transformers_ctc_that_drafts_writes_the_decoders_tokens(tmp_path: Path) -> None:
    folder = toy_hf.save_checkpoint(tmp_path / "theirs", "parakeet")
    *written, blank = TextTokenizer.load(folder / "tokenizer.json").pieces()
    assert blank == "<pad>"
    named = {"bos_id": 0, "eos_ids": (1,), "vocab_size": len(written)}
    vocab = {piece: i for i, piece in enumerate(written)}
    same = TextTokenizer(Tokenizer(models.WordLevel(vocab, "<unk>")))
    save_decoder(toy.decoder(**named), tmp_path / "decoder", same)
    assert join(tmp_path, encoder=folder, ctc_exit=5).model.config.ctc_exit == 5
    other = toy_speech_lm.tokenizer([f"v{i}" for i in range(2, len(written))])
    save_decoder(toy.decoder(**named), tmp_path / "decoder", other)
    with pytest.raises(ConfigError, match="writes other tokens than those of the encoder"):
        join(tmp_path, encoder=folder, ctc_exit=5)


@pytest.mark.parametrize("name", thinned(["wav2vec2 layer norm first", "parakeet"], ["parakeet"]))
def test_a_transformers_encoder_is_joined_saved_and_loaded(name: str, tmp_path: Path) -> None:
    folder = toy_hf.save_checkpoint(tmp_path / "theirs", name)
    made = join(tmp_path, encoder=folder, heads=HEADS)
    assert isinstance(made.model.encoder, PretrainedCTCEncoder)
    assert made.model.config.encoder is None
    made.save(tmp_path / "m")
    made.save(tmp_path / "m")  # in the place of itself
    assert sorted(os.listdir(tmp_path)) == ["decoder", "encoder", "m", "theirs"]
    loaded = load_speech_lm(tmp_path / "m")
    assert is_frozen(loaded.model)
    assert made.reader is not None
    assert loaded.reader is not None
    assert loaded.reader.pieces == made.reader.pieces
    sounds = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9000, 5000)]
    before = made.model.hear(*made.reader.inputs(sounds), exits=(5,))
    after = loaded.model.hear(*loaded.reader.inputs(sounds), exits=(5,))
    assert torch.equal(before.exits[5], after.exits[5])
    assert all(map(torch.equal, before.audio, after.audio))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"projector", "decoder", "heads"}
    double = load_speech_lm(tmp_path / "m", dtype=torch.float64).model.state_dict()
    assert {x.dtype for x in double.values() if x.is_floating_point()} == {torch.float64}
    with pytest.raises(ConfigError, match=r"new_ctc_head is not supported for .*theirs, a transf"):
        join(tmp_path, encoder=folder, ctc_exit=5, new_ctc_head=True)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CTC head has 11 tokens, blank 0; .* the decoder's 61"):
        join(tmp_path, ctc_exit=3)
    with pytest.raises(ConfigError, match="ctc_exit is 4; the encoder has the exits 2, 3, 5"):
        join(tmp_path, ctc_exit=4, new_ctc_head=True)
    with pytest.raises(ConfigError, match="draft_vocab is 62; the decoder has 61 tokens"):
        join(tmp_path, heads=HeadsConfig(draft_vocab=62))
    with pytest.raises(CheckpointError, match="type 'llama', not 'offramp-ctc'"):
        join(tmp_path, encoder=tmp_path / "decoder")
    with pytest.raises(CheckpointError, match="holds a speech recogniser"):
        join(tmp_path, decoder=tmp_path / "encoder")
    join(tmp_path).save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="type 'offramp-speech-lm', not 'offramp-ctc'"):
        join(tmp_path, encoder=tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"holds a speech recogniser.*offramp transcribe"):
        load_config(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        join(tmp_path, decoder=tmp_path / "nowhere")


# -- damage --------------------------------------------------------------------------------------


def config(**changes: Any) -> Damage:
    """The value "gone" takes a setting away; a dict changes a part's."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for name, value in changes.items():
            values[name] = values[name] | value if isinstance(value, dict) else value
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))

    return change


def without(part: str) -> Damage:
    def remove(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.startswith(part)]:
            del stored[name]

    return tensors(remove)


DAMAGE: dict[str, tuple[Damage, str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "weights cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 99),
        "truncated or corrupt",
    ),
    "an encoder": (config(model_type="offramp-ctc"), "'offramp-ctc', not 'offramp-speech-lm'"),
    "qwen": (config(model_type="qwen2_audio"), "of transformers, which transcribes and is not tr"),
    "ultravox": (config(model_type="ultravox"), "'ultravox', which needs the code in its folder"),
    "no projector in the config": (config(projector="gone"), "SpeechLMConfig lacks projector"),
    "a setting unknown": (config(depth=3), "SpeechLMConfig has no setting depth"),
    "a setting of a part unknown": (config(projector={"depth": 3}), "Projec.* no setting depth"),
    "another stack": (config(projector={"stack": 4}), "projector.up.weight has shape"),
    "another hidden layer": (config(projector={"d_hidden": 9}), "projector.up.weight has shape"),
    "a projector for another decoder": (
        tensors(lambda t: t.update({"projector.down.weight": torch.zeros(16, 24)})),
        r"projector.down.weight has shape \[16, 24\], config.json says \[32, 24\]",
    ),
    "no projector": (without("projector"), "lacks the tensor projector.norm.weight"),
    "not a number": (
        tensors(lambda t: t["projector.up.weight"].fill_(torch.nan)),
        "projector.up.weight holds numbers that are not finite",
    ),
    "no heads": (without("heads"), "lacks the tensor heads.expansion.weight"),
    "heads without a config": (config(heads=None), "holds 1 tensors that .*first: heads.expansion"),
    "more heads": (config(heads={"count": 5}), "heads.expansion.weight has shape"),
    "a ctc of other tokens": (config(encoder={"vocab_size": 40, "blank_id": 40 - 1}), "CTC head"),
    "another decoder's tokenizer": (
        lambda f: toy_speech_lm.tokenizer([f"w{i}" for i in range(60)]).save(f / "tokenizer.json"),
        "the tokenizer has 62 tokens and the decoder 61; .* not of one checkpoint",
    ),
    "no folder of the encoder": (config(encoder=None), "cannot load .*encoder"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "m"
    toy_speech_lm.checkpoint(heads=HEADS, ctc_exit=3).save(folder)
    return folder


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_in_one_line(
    damage: Damage, says: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "m"))
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_speech_lm(folder)
    assert "\n" not in str(refused.value)
