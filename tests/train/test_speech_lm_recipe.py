"""A whole recipe of a Speech-LM on toy recordings, from each of the models it can start from."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
import toy_encoder
import toy_speech
from offramp.audio.reader import LogMelReader
from offramp.cli import main
from offramp.config import DecoderConfig
from offramp.config_speech_lm import HeadsConfig, ProjectorConfig
from offramp.data.manifest import Utterance, write_manifest
from offramp.decoding.ctc import greedy
from offramp.errors import CheckpointError, ConfigError
from offramp.models.ctc_checkpoint import load_encoder, save_encoder
from offramp.models.hub import resolve, save_decoder
from offramp.models.speech_lm_checkpoint import SpeechLMParts, load_speech_lm
from offramp.tokenizer import BOS, EOS, ctc_words, train_bpe
from offramp.train.encoder_tokens import decoder_tokenizer, relabelled
from offramp.train.loop import Evaluated, StepDone, TrainConfig
from offramp.train.lora import LoRA
from offramp.train.mwer import MWERTraining
from offramp.train.recipes import load_recipe
from offramp.train.speech_lm import SpeechLMTraining
from offramp.train.speech_lm_recipe import (
    NewDecoder,
    NewHeads,
    SpeechLMReader,
    SpeechLMRecipe,
    new_decoder,
    with_heads,
)
from offramp.train.text import TextRecipe

RECIPES = Path(__file__).parents[2] / "recipes"
PIECES = toy_speech.tokenizer()
V = PIECES.vocab_size + 1  # without the blank, with BOS and EOS
TEXT_DECODER: dict[str, Any] = {
    "vocab_size": V,
    "bos_id": V - 2,
    "eos_ids": (V - 1,),
    "num_layers": 2,
}
DECODER = toy.config(**TEXT_DECODER)
PROJECTOR = ProjectorConfig(stack=2, d_hidden=16)
SHAPES: dict[str, dict[str, Any]] = {
    "ours": toy_encoder.OURS,
    "a head for each exit": {"pad_edges": True},
}


def save_toy_encoder(folder: Path, **changes: Any) -> str:
    changes = {"vocab_size": PIECES.vocab_size, "num_mels": 20, **changes}
    encoder = toy_encoder.encoder(**changes)
    save_encoder(encoder, folder, files={"tokenizer.json": PIECES.to_json()})
    return str(folder)


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    return save_toy_encoder(tmp_path / "encoder", **toy_encoder.OURS)


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """Ten recordings to train on, two to look at."""
    made = []
    for i, text in enumerate(toy_speech.random_texts(12, seed=0)):
        samples = toy_speech.speak(text)
        path = toy_speech.write(tmp_path / "set" / f"{i}.wav", samples)
        split = "train" if i < 10 else "dev"
        made.append(Utterance(path, len(samples) / 16_000, "s", split, text))
    write_manifest(tmp_path / "set" / "manifest.tsv", made)
    return str(tmp_path / "set" / "manifest.tsv")


def new(encoder: str, **changes: Any) -> NewDecoder:
    settings: dict[str, Any] = {"decoder": DECODER, "heads": HeadsConfig(3), "ctc_exit": 3}
    return NewDecoder(encoder, PROJECTOR, **(settings | changes))


def recipe(manifest: str, model: Any, steps: int = 4, **training: Any) -> SpeechLMRecipe:
    return SpeechLMRecipe(
        name="toy",
        model=model,
        sets=(manifest,),
        dev_sets=(manifest,),
        training=SpeechLMTraining(**training),
        batch_seconds=6.0,
        prefetch=False,
        train=TrainConfig(steps, 1e-3, 2, checkpoint_every=2, evaluate_every=steps),
    )


# -- the encoder's tokens ------------------------------------------------------------------------


def test_the_decoder_writes_the_encoders_pieces() -> None:
    made = decoder_tokenizer(PIECES, 0)
    assert made.pieces() == [*PIECES.pieces()[1:], BOS, EOS]
    for text in ("do mi do", "mi", ""):
        ids = made.encode(text)
        assert ids == [i - 1 for i in PIECES.encode(text)]
        assert made.decode([V - 2, *ids, V - 1]) == text


def test_words_can_be_its_tokens_too() -> None:
    made = decoder_tokenizer(ctc_words(("do", "mi")), 0)
    assert made.encode("mi do") == [1, 0] and made.decode([1, 0, 3]) == "mi do"


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_a_relabelled_encoder_writes_at_every_exit_what_it_wrote(changes: dict[str, Any]) -> None:
    old = toy_encoder.encoder(**{"vocab_size": PIECES.vocab_size, **changes})
    made = relabelled(old, PIECES, decoder_tokenizer(PIECES, 0)).eval()
    x, lengths = toy_encoder.features([40, 61, 23])
    before, state = toy_encoder.every_exit(old, x, lengths)
    after, _ = toy_encoder.every_exit(made, x, lengths)
    pieces = range(1, PIECES.vocab_size)
    for exit_layer, log_probs in before.items():
        found = after[exit_layer]
        assert found.shape[2] == V + 1 and made.config.blank_id == V
        torch.testing.assert_close(found[:, :, : V - 2], log_probs[:, :, pieces], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[:, :, V], log_probs[:, :, 0], atol=1e-5, rtol=0)
        assert (found[:, :, V - 2 : V] < -10).all(), "no transcript has BOS or EOS"
        written = [[i + 1 for i in h.tokens] for h in greedy(found, state.lengths, V)]
        assert written == [list(h.tokens) for h in greedy(log_probs, state.lengths, 0)]


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_checkpoint(
    manifest: str, encoder: str, tmp_path: Path
) -> None:
    wanted = recipe(manifest, new(encoder), steps=6)
    events = list(wanted.run(tmp_path / "whole"))
    losses = [e.loss for e in events if isinstance(e, StepDone)]
    assert len(losses) == 6
    for event in wanted.run(tmp_path / "cut"):
        if isinstance(event, StepDone) and event.step == 5:
            break  # killed: the state of step 4 is what there is
    resumed = list(wanted.run(tmp_path / "cut"))
    assert [e.loss for e in resumed if isinstance(e, StepDone)] == losses[4:]
    whole, cut = (load_speech_lm(tmp_path / name / "checkpoint").model for name in ("whole", "cut"))
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_new_decoder_then_heads_on_it_which_change_nothing_else(
    manifest: str, encoder: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    events = list(recipe(manifest, new(encoder, heads=None)).run(first))
    (looked,) = (e.metrics for e in events if isinstance(e, Evaluated))
    assert {"loss", "accuracy", "loss_ctc", "token_error_rate_ctc"} < looked.keys()
    assert [e.exit_losses.keys() for e in events if isinstance(e, StepDone)] == [{2, 3, 5}] * 4
    trunk = ("encoder", "projector", "decoder")
    grown = NewHeads(str(first / "checkpoint"), HeadsConfig(3))
    list(recipe(manifest, grown, ctc=0.0, freeze=trunk).run(second))
    before, after = (load_speech_lm(f / "checkpoint") for f in (first, second))
    assert before.model.heads is None and after.model.config.heads == HeadsConfig(3)
    assert after.tokenizer.pieces() == [*PIECES.pieces()[1:], BOS, EOS]
    state = after.model.state_dict()
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(state.pop(name), tensor), name
    assert state and all(tensor.any() for tensor in state.values())


@pytest.mark.slow
def test_a_run_can_start_from_a_speech_lm(manifest: str, encoder: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    list(recipe(manifest, new(encoder)).run(first))
    list(recipe(manifest, str(first / "checkpoint")).run(second))
    before, after = (load_speech_lm(f / "checkpoint").model for f in (first, second))
    assert before.config == after.config
    states = zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in states) > 20


def test_folders_can_be_joined_and_trained(manifest: str, encoder: str, tmp_path: Path) -> None:
    """A decoder of its own tokens, whose tokenizer begins every text with BOS."""
    words = train_bpe(["do mi do mi"], 300, [])
    size = words.vocab_size
    decoder = toy.decoder(vocab_size=size, bos_id=0, eos_ids=(1,), num_layers=2)
    save_decoder(decoder, tmp_path / "decoder", words)
    parts = SpeechLMParts(
        encoder, str(tmp_path / "decoder"), PROJECTOR, None, ctc_exit=5, new_ctc_head=True
    )
    list(recipe(manifest, parts, ctc=0.0, freeze=("encoder",)).run(tmp_path / "run"))
    made = load_speech_lm(tmp_path / "run" / "checkpoint")
    assert made.tokenizer.vocab_size == size and made.model.encoder.config.vocab_size == size + 1
    kept, first = load_encoder(Path(encoder)).layers, made.model.encoder.layers
    for (name, a), b in zip(kept.named_parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=f"{name} is frozen")


def test_texts_are_read_without_the_tokens_that_begin_and_end_them() -> None:
    words = train_bpe(["do mi do mi"], 300, [])
    reader = SpeechLMReader(LogMelReader(toy_encoder.config()), words)
    assert words.encode("do")[0] == 0, "BOS, by itself"
    assert reader.encode_batch(["do", ""]) == [words.encode("do")[1:], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": V + 1}, f"decoder.vocab_size is {V + 1}; for the tokens of the encoder in"),
        ({"bos_id": 0}, f"decoder.bos_id is 0; .* it must be {V - 2}"),
        ({"eos_ids": (1,)}, rf"decoder.eos_ids is \(1,\); .* it must be \({V - 1},\)"),
    ],
)
def test_decoders_for_other_tokens_are_refused_before_anything_is_written(
    manifest: str, encoder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    wanted = new(encoder, decoder=replace(DECODER, **changes))
    with pytest.raises(ConfigError, match=message):
        list(recipe(manifest, wanted).run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def text_decoder(tmp_path: Path) -> str:
    """The folder of a decoder that knows the tokens of the encoder."""
    made = toy.decoder(**TEXT_DECODER)
    save_decoder(made, tmp_path / "text", decoder_tokenizer(PIECES, 0))
    return str(tmp_path / "text")


@pytest.mark.slow
def test_a_decoder_that_learned_from_text_goes_on_from_there(
    manifest: str, encoder: str, text_decoder: str, tmp_path: Path
) -> None:
    wanted = recipe(manifest, new(encoder, decoder=text_decoder), steps=2)
    frozen = replace(wanted, training=SpeechLMTraining(freeze=("decoder",)))
    list(frozen.run(tmp_path / "frozen"))
    made = load_speech_lm(tmp_path / "frozen" / "checkpoint").model.state_dict()
    for name, tensor in toy.decoder(**TEXT_DECODER).state_dict().items():
        assert torch.equal(made[f"decoder.{name}"], tensor.half().float()), name
    list(wanted.run(tmp_path / "run"))
    save_decoder(
        toy.decoder(seed=1, **TEXT_DECODER), Path(text_decoder), decoder_tokenizer(PIECES, 0)
    )
    with pytest.raises(CheckpointError, match=r"cannot resume .*: start weights was "):
        list(wanted.run(tmp_path / "run"))


def test_a_decoder_that_learned_by_low_rank_updates_is_an_ordinary_one(
    manifest: str, encoder: str, text_decoder: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    wanted = recipe(manifest, new(encoder, decoder=text_decoder, heads=None), steps=2)
    list(replace(wanted, lora=LoRA(rank=2, alpha=4.0)).run(tmp_path / "run"))
    made = load_speech_lm(tmp_path / "run" / "checkpoint").model.decoder.state_dict()
    start = toy.decoder(**TEXT_DECODER).state_dict()
    changed = {name for name, x in start.items() if not torch.equal(made[name], x.half().float())}
    assert changed == {
        f"layers.{i}.attention.{x}.weight" for i in (0, 1) for x in ("qkv", "output")
    }


def test_low_rank_updates_that_cannot_be_are_refused_before_anything_is_written(
    manifest: str,
    encoder: str,
    text_decoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = LoRA(rank=2, alpha=4.0)
    with pytest.raises(ConfigError, match="those of a new one know nothing; give "):
        replace(recipe(manifest, new(encoder)), lora=lora)
    learned = new(encoder, decoder=text_decoder)
    with pytest.raises(ConfigError, match="freeze names the decoder, and lora is how it learns"):
        replace(recipe(manifest, learned, freeze=("decoder",)), lora=lora)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r"lora needs peft; .* 'offramp\[hf\]', or leave lora out"
    ):
        list(replace(recipe(manifest, learned), lora=lora).run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", ["words", "order"])
def test_a_decoder_of_other_tokens_is_refused_before_anything_is_written(
    manifest: str, encoder: str, text_decoder: str, tmp_path: Path, other: str
) -> None:
    tokens = Path(text_decoder) / "tokenizer.json"
    if other == "words":
        decoder_tokenizer(ctc_words(("do", "mi", "re", "fa", "so", "la", "ti")), 0).save(tokens)
    else:
        described = json.loads(tokens.read_text())
        vocab = described["model"]["vocab"]
        vocab["d"], vocab["m"] = vocab["m"], vocab["d"]
        tokens.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="writes other tokens than those of the encoder") as error:
        list(recipe(manifest, new(encoder, decoder=text_decoder)).run(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_word_errors_teach_what_plain_training_would_leave(
    manifest: str, encoder: str, tmp_path: Path
) -> None:
    """Without any cross-entropy the decoder learns from word errors alone."""
    only = {"ctc": 0.0, "head_weights": (0.0,), "freeze": ("encoder",)}
    errors = MWERTraining(**only, max_tokens=6, with_reference=True)
    model = new(encoder, heads=None)
    start = new_decoder(model, Path(encoder), 0, torch.device("cpu")).model.state_dict()
    wanted = recipe(manifest, model, steps=2)
    wanted = replace(wanted, train=replace(wanted.train, weight_decay=0.0))
    changed = {}
    for training in (SpeechLMTraining(**only), errors):
        out = tmp_path / type(training).__name__
        list(replace(wanted, training=training).run(out))
        made = load_speech_lm(out / "checkpoint").model.state_dict()
        changed[out.name] = [
            name for name in start if not torch.equal(made[name], start[name].half().float())
        ]
    assert changed["SpeechLMTraining"] == []
    assert len([name for name in changed["MWERTraining"] if name.startswith("decoder.")]) > 5
    assert not any(name.startswith("encoder.") for name in changed["MWERTraining"])


def test_a_missing_start_names_its_setting(manifest: str, encoder: str, tmp_path: Path) -> None:
    starts = {"model": "gone", "model.folder": NewHeads("gone", HeadsConfig())}
    starts["model.encoder"] = new("gone")
    starts["model.decoder"] = new(encoder, decoder="gone")
    for setting, start in starts.items():
        with pytest.raises(CheckpointError, match=f"--set {setting}=FOLDER"):
            list(recipe(manifest, start).run(tmp_path / "run"))


# -- the recipes of speech-llm-tiny --------------------------------------------------------------


def test_the_recipes_are_of_one_model_of_at_most_20_million_parameters_and_32_mb() -> None:
    names = ("decoder", "corrector", "tiny", "tiny_heads", "mwer")
    made_by = [load_recipe(RECIPES / f"speech_llm_{name}.py", {}) for name in names]
    text, corrector, first, second, last = made_by
    assert isinstance(text, TextRecipe) and isinstance(text.model, DecoderConfig)
    assert isinstance(corrector, TextRecipe)
    assert isinstance(first, SpeechLMRecipe) and isinstance(first.model, NewDecoder)
    assert isinstance(second, SpeechLMRecipe) and isinstance(second.model, NewHeads)
    assert isinstance(last, SpeechLMRecipe) and isinstance(last.training, MWERTraining)
    starts = (
        corrector.model,
        first.model.decoder,
        second.model.folder,
        last.model,
    )
    assert starts == tuple(f"runs/{made.name}/checkpoint" for made in made_by[:-1])
    assert text.tokens_of == first.model.encoder
    wanted = replace(first.model, decoder=text.model)
    start = new_decoder(wanted, resolve("asr-tiny"), 0, torch.device("cpu"))
    first.training.fitted(start.model)
    made = with_heads(start, second.model.heads).model
    for stage in (second, last):
        stage.training.fitted(made)
    count = sum(p.numel() for p in made.parameters())
    assert 10e6 < count < 20e6 and 2 * count < 32e6, "stored in half precision"
    assert made.room(100 * 20) > 250, "tokens of text behind 20 s"


# -- the how-to ----------------------------------------------------------------------------------

HOW_TO = RECIPES.parent / "docs" / "how-to" / "train-a-speech-llm.md"


@pytest.mark.slow
def test_the_how_to_runs_as_it_is_written(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own recipes, cut to two steps, and what is done with the last one's model."""
    pytest.importorskip("peft")
    pytest.importorskip("jiwer")
    monkeypatch.chdir(tmp_path)
    Path(manifest).rename("my.tsv")
    for wave in Path("set").iterdir():
        wave.rename(wave.name)
    toy_speech.write(Path("talk.flac"), toy_speech.speak("do mi"))
    words = train_bpe(["do mi do mi"], 300, [])
    decoder = toy.decoder(
        vocab_size=words.vocab_size, bos_id=0, eos_ids=(1,), num_layers=2, max_positions=256
    )
    save_decoder(decoder, Path("my-decoder"), words)
    cut = "--set steps=2 --set warmup_steps=1 --set batch_seconds=6 --set prefetch=false"
    ran = []
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", HOW_TO.read_text(), re.M | re.S):
        if kind == "python":
            Path(block.split()[1]).write_text(block)
            continue
        for line in block.splitlines():
            program, verb, *rest = shlex.split(line)
            if program != "offramp" or rest[0].startswith("recipes/"):
                assert program == "pip" or (RECIPES.parent / rest[0]).is_file()
                continue
            if verb == "train":
                rest += shlex.split(cut) + ["--set", "max_tokens=6"] * (rest[0] == "mwer.py")
            with pytest.raises(SystemExit) as ended:
                main([verb, *rest])
            assert ended.value.code == 0, line
            ran.append(verb)
    assert ran == [*["train"] * 5, "transcribe", "eval"]
    assert load_speech_lm(Path("runs/my-mwer/checkpoint")).model.config.heads == HeadsConfig(4)
