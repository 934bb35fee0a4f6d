"""Transformers checkpoints with exits in folders: what they read, write, keep and refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.decoding.ctc import greedy, text, words
from offramp.decoding.early_exit_ctc import EarlyExitOptions, early_exit
from offramp.decoding.exit_policies import RULES, AnyOf, Budget, ExitPolicy, FixedExit
from offramp.energy.hf_cost import shape_mac_cost, shape_trail_macs
from offramp.errors import CheckpointError, ConfigError, DataError, InputError
from offramp.models.hf_checkpoint import (
    EXITS,
    PretrainedSpeech,
    is_pretrained,
    load_exits,
    load_pretrained,
    save_exits,
)
from thinned import thinned
from toy_encoder import randomize
from toy_hf import MODELS, WORDS, L, all_exits, inputs, save_checkpoint, theirs, toy

transformers = pytest.importorskip("transformers")

SECONDS = (0.21, 0.4, 0.13)
RAW, FEATURES = "wav2vec2 layer norm first", "parakeet"


def waves(seed: int = 0) -> list[Tensor]:
    """Utterances of different length and loudness, off zero."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(int(16_000 * s), generator=generator) for s in SECONDS]
    return [0.02 * (row + 1) * wave + 0.01 for row, wave in enumerate(made)]


def speech(folder: Path, name: str) -> PretrainedSpeech:
    """Of a folder that is made, with exit heads that all differ."""
    found = PretrainedSpeech.load(save_checkpoint(folder, name), untrained=True)
    randomize(found.encoder.heads, 1)
    found.encoder.requires_grad_(False)
    return found


@pytest.fixture(params=thinned(MODELS.keys(), keep=(RAW, FEATURES)))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


# -- what it reads and writes --------------------------------------------------------------------


@pytest.mark.parametrize("name", [RAW, FEATURES])
def test_inputs_are_what_the_extractor_gives_for_each_alone(name: str, tmp_path: Path) -> None:
    it, samples = speech(tmp_path / "m", name), waves()
    made, lengths = it.reader.inputs(samples)
    for row, wave in enumerate(samples):
        own = it.reader.extractor([wave.numpy()], sampling_rate=16_000, return_tensors="pt")
        alone = own[it.reader.extractor.model_input_names[0]][0]
        n = int(own["attention_mask"].sum())
        assert lengths[row] == n == it.reader.num_inputs(len(wave))
        torch.testing.assert_close(made[row, :n], alone[:n], rtol=1e-4, atol=1e-4)
        assert not made[row, n:].any()
    assert abs(float(made[0, : lengths[0]].mean())) < 1e-4, "normalised"
    short = [n for n in range(2000) if not it.reader.num_inputs(n)]
    assert short == list(range(len(short)))
    with pytest.raises(InputError, match=f"{len(short) - 1} samples give no frame"):
        it.reader.inputs([*samples, torch.zeros(len(short) - 1)])
    assert it.reader.inputs([torch.ones(len(short))])[0].isfinite().all()


def test_a_model_that_wants_samples_as_they_are_gets_them(tmp_path: Path) -> None:
    it = speech(tmp_path / "m", RAW)
    it.reader.extractor.do_normalize = False
    made, _ = it.reader.inputs(waves()[:1])
    assert torch.equal(made[0], waves()[0])


@pytest.mark.parametrize("name", [RAW, FEATURES])
def test_pieces_write_what_the_tokenizer_decodes(name: str, tmp_path: Path) -> None:
    it = speech(tmp_path / "m", name)
    assert it.reader.pieces[it.encoder.config.blank_id] == ""
    targets = it.reader.encode_batch(WORDS)
    for said, ids in zip(WORDS, targets, strict=True):
        cased = said.upper() if name == RAW else said
        assert text(ids, it.reader.pieces) == cased
        options = {"group_tokens": False, "skip_special_tokens": True}
        assert it.reader.tokenizer.decode(ids, **options).strip() == cased
    assert it.reader.encode_batch(["a-z2b"]) == it.reader.encode_batch(["ab"]), (
        "what it cannot write"
    )
    with pytest.raises(DataError, match="vocabulary cannot write 'zzz'"):
        it.reader.encode_batch(["ab", "zzz"])
    assert it.reader.encode_batch([""]) == [[]]


@pytest.mark.slow
def test_words_have_times_of_the_models_frames(tmp_path: Path) -> None:
    """A character model has a token between words; 160 samples, or 8 frames of 10 ms, a frame."""
    it = speech(tmp_path / "raw", RAW)
    assert it.reader.frame_s == pytest.approx(0.01)
    assert speech(tmp_path / "features", FEATURES).reader.frame_s == pytest.approx(0.08)
    log_probs = torch.full((1, 9, len(it.reader.pieces)), -20.0)
    for frame, token in enumerate([0, 5, 6, 0, 4, 4, 7, 0, 0]):
        log_probs[0, frame, token] = 0.0
    (found,) = greedy(log_probs, torch.tensor([9]))
    spoken = words(found, it.reader.pieces, 0.02)
    assert [(w.text, w.start_s, w.end_s) for w in spoken] == [
        ("AB", 0.02, 0.06),
        ("C", pytest.approx(0.12), pytest.approx(0.14)),
    ]


# -- early exit ----------------------------------------------------------------------------------


def policies(it: PretrainedSpeech) -> dict[str, ExitPolicy]:
    """Every rule, with a threshold that parts the utterances at the first exit it scores."""
    config, cost = it.encoder.config, shape_mac_cost(it.encoder.config.shape)
    found: dict[str, ExitPolicy] = {f"exit {e}": FixedExit(e) for e in config.exits}
    options = EarlyExitOptions(config.blank_id)
    for rule, made in RULES.items():
        ran = early_exit(
            it.encoder, config.exits, *it.reader.inputs(waves()), made(math.inf), options
        )
        first = [next(t.score for t in row.trail if t.score is not None) for row in ran]
        middle = (min(first) + max(first)) / 2
        found[rule] = made(-middle if rule == "entropy" else middle)  # its score is minus that
    budget = Budget(shape_trail_macs(config.shape, it.reader.num_inputs(5_000), (2, 4)), cost)
    return {**found, "budget": budget, "any": AnyOf((budget, found["confidence"]))}


@pytest.mark.slow
def test_a_batch_leaves_where_each_utterance_leaves_alone(name: str, tmp_path: Path) -> None:
    it, samples = speech(tmp_path / "m", name), waves()
    config = it.encoder.config
    options = EarlyExitOptions(config.blank_id, shape_mac_cost(config.shape))
    left: dict[str, set[int]] = {}
    for rule, policy in policies(it).items():
        batched = early_exit(it.encoder, config.exits, *it.reader.inputs(samples), policy, options)
        for wave, found in zip(samples, batched, strict=True):
            (alone,) = early_exit(
                it.encoder, config.exits, *it.reader.inputs([wave]), policy, options
            )
            assert alone.hypothesis.tokens == found.hypothesis.tokens
            assert alone.hypothesis.frames == found.hypothesis.frames
            assert alone.hypothesis.score == pytest.approx(found.hypothesis.score, abs=1e-3)
            assert (alone.exit_layer, alone.frames) == (found.exit_layer, found.frames)
            assert alone.spent == found.spent > 0
            left.setdefault(rule, set()).add(found.exit_layer)
    for rule in ("entropy", "confidence", "budget", "any"):
        assert len(left[rule]) > 1, "some leave early, some do not"


# -- files ---------------------------------------------------------------------------------------


def test_a_saved_checkpoint_loads_with_the_same_exits(name: str, tmp_path: Path) -> None:
    """In transformers too, as the model it was."""
    encoder = toy(name, exits=(1, 4, L))
    first = PretrainedSpeech.load(save_checkpoint(tmp_path / "m", name), untrained=True)
    replace(first, encoder=encoder).save(tmp_path / "new")
    again = PretrainedSpeech.load(tmp_path / "new")
    assert again.reader.pieces == first.reader.pieces and not again.encoder.training
    assert again.encoder.config == encoder.config
    x, lengths = inputs(name)
    expected = all_exits(encoder, x, lengths)
    for exit_layer, log_probs in all_exits(again.encoder, x, lengths).items():
        torch.testing.assert_close(log_probs, expected[exit_layer], rtol=1e-5, atol=1e-5)
    own = type(encoder.base).from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(own(x[:1]).logits, encoder.base(x[:1]).logits, rtol=1e-4, atol=1e-4)
    assert is_pretrained(tmp_path / "new") and not is_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in (tmp_path / "new").iterdir()}
    assert len(modes) == 1, "as readable as the rest"
    again.save(tmp_path / "new")  # replaces it
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="holds files and is no checkpoint"):
        again.save(tmp_path / "notes")


def test_which_exits_a_folder_has(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", FEATURES)
    assert PretrainedSpeech.load(folder).encoder.config.exits == (L,)
    assert load_pretrained(folder).config.exits == (2, 4, L)
    assert load_pretrained(folder, (3, L)).config.exits == (3, L)
    PretrainedSpeech.load(folder).save(tmp_path / "last")
    assert not (tmp_path / "last" / EXITS).exists()
    PretrainedSpeech.load(folder, (3, L)).save(tmp_path / "new")
    for untrained in (True, False):
        found = PretrainedSpeech.load(tmp_path / "new", untrained=untrained)
        assert found.encoder.config.exits == (3, L)
    with pytest.raises(CheckpointError, match=r"exits is \[3, 5\], not \[2, 5\]"):
        load_pretrained(tmp_path / "new", (2, L))


def test_half_precision_checkpoints_load_in_full_precision(tmp_path: Path) -> None:
    theirs(FEATURES).half().save_pretrained(tmp_path / "m")
    assert load_pretrained(tmp_path / "m").dtype == torch.float32
    assert load_pretrained(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16


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


def test_checkpoints_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    llama = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"'llama'; allowed: wav2vec2, hubert, wavlm, parakeet"):
        load_pretrained(tmp_path / "llama")
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


@pytest.mark.parametrize("lost", ["preprocessor_config.json", "vocab.json"])
def test_how_a_checkpoint_reads_and_writes_must_be_there(lost: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", RAW)
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=r"how .* reads and writes: .*its tokenizer"):
        PretrainedSpeech.load(folder)


def test_a_model_of_another_sample_rate_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", RAW)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)
    with pytest.raises(ConfigError, match="the model reads 8000 Hz; it must be 16000"):
        PretrainedSpeech.load(folder)
