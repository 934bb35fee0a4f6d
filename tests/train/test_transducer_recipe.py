"""A whole recipe of a streaming transducer on toy recordings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy_encoder
import toy_speech
import toy_transducer
from offramp.audio.features import FeatureConfig, log_mel
from offramp.audio.io import read_audio
from offramp.data.manifest import Utterance, read_manifest, write_manifest
from offramp.errors import CheckpointError
from offramp.models.ctc_checkpoint import save_encoder
from offramp.models.transducer_checkpoint import load_transducer
from offramp.tokenizer import TextTokenizer, ctc_words
from offramp.train import speech
from offramp.train.loop import Evaluated, StepDone, TrainConfig
from offramp.train.speech import TransducerRecipe
from offramp.train.transducer import TransducerTraining

PIECES = toy_speech.tokenizer()


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ten recordings to train on, two to look at."""
    monkeypatch.setattr(speech, "ctc_tokenizer", lambda vocab_size: PIECES)
    made = []
    for i, text in enumerate(toy_speech.random_texts(12, seed=0)):
        samples = toy_speech.speak(text)
        path = toy_speech.write(tmp_path / "set" / f"{i}.wav", samples)
        split = "train" if i < 10 else "dev"
        made.append(Utterance(path, len(samples) / 16_000, "s", split, text))
    write_manifest(tmp_path / "set" / "manifest.tsv", made)
    return str(tmp_path / "set" / "manifest.tsv")


def recipe(manifest: str, steps: int = 6) -> TransducerRecipe:
    return TransducerRecipe(
        name="toy",
        model=toy_transducer.config(
            vocab_size=PIECES.vocab_size, predictor="stateless", ctc_head=True, dropout=0.1
        ),
        sets=(manifest,),
        dev_sets=(manifest,),
        training=TransducerTraining(chunks=(3, 8, 0), window=3, ramp_steps=3),
        batch_seconds=6.0,
        prefetch=False,
        train=TrainConfig(steps, 1e-3, 2, checkpoint_every=2, evaluate_every=6),
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_checkpoint(manifest: str, tmp_path: Path) -> None:
    events = list(recipe(manifest).run(tmp_path / "whole"))
    losses = [e.loss for e in events if isinstance(e, StepDone)]
    assert len(losses) == 6
    (looked,) = (e.metrics for e in events if isinstance(e, Evaluated))
    assert {"loss", "loss_ctc", "token_error_rate", "token_error_rate_ctc"} < looked.keys()
    for event in recipe(manifest).run(tmp_path / "cut"):
        if isinstance(event, StepDone) and event.step == 5:
            break  # killed: the state of step 4 is what there is
    resumed = list(recipe(manifest).run(tmp_path / "cut"))
    assert [e.loss for e in resumed if isinstance(e, StepDone)] == losses[4:]
    whole, cut = (load_transducer(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokenizer = TextTokenizer.load(tmp_path / "cut" / "checkpoint" / "tokenizer.json")
    assert tokenizer.to_json() == PIECES.to_json()


def test_the_checkpoint_has_the_statistics_of_the_training_data(
    manifest: str, tmp_path: Path
) -> None:
    plain = replace(recipe(manifest, steps=4), augmentation=None, batch_seconds=60.0)
    list(plain.run(tmp_path))
    read = [read_audio(u.path) for u in read_manifest(Path(manifest), "train")]
    frames = torch.cat([log_mel(samples, FeatureConfig(num_mels=8)) for samples in read])
    norm = load_transducer(tmp_path / "checkpoint").encoder.feature_norm
    torch.testing.assert_close(norm.mean, frames.mean(0), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        norm.inverse_std, 1 / frames.std(0, correction=0), rtol=2e-3, atol=2e-3
    )


def test_a_run_can_start_from_a_checkpoint_and_keeps_its_statistics(
    manifest: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    list(recipe(manifest, 2).run(first))
    other = replace(recipe(manifest, 2), model=str(first / "checkpoint"), augmentation=None)
    assert [e.step for e in other.run(second) if isinstance(e, StepDone)] == [1, 2]
    before, after = (load_transducer(f / "checkpoint").encoder for f in (first, second))
    assert torch.equal(before.feature_norm.mean, after.feature_norm.mean)
    assert not torch.equal(before.input.matrix.weight, after.input.matrix.weight)


@pytest.mark.slow
def test_batches_made_ahead_change_nothing(manifest: str, tmp_path: Path) -> None:
    losses = [
        [e.loss for e in some.run(tmp_path / str(some.prefetch)) if isinstance(e, StepDone)]
        for some in (recipe(manifest), replace(recipe(manifest), prefetch=True))
    ]
    assert losses[0] == losses[1]


def test_a_teacher_must_have_the_tokenizer_of_the_model(manifest: str, tmp_path: Path) -> None:
    changes = {"subsampling": 2, "pad_edges": True, "vocab_size": PIECES.vocab_size}
    taught = TransducerTraining(distill=0.5)
    for name, tokenizer in {"same": PIECES, "other": ctc_words(("do", "re"))}.items():
        folder = tmp_path / name
        files = {"tokenizer.json": tokenizer.to_json()}
        save_encoder(toy_encoder.encoder(**changes), folder, torch.float32, files)
        it = replace(recipe(manifest, steps=1), teacher=str(folder), training=taught)
        if name == "same":
            assert any(isinstance(event, StepDone) for event in it.run(tmp_path / "run"))
        else:
            with pytest.raises(CheckpointError, match="has another tokenizer than the model"):
                list(it.run(tmp_path / "no"))
            assert not (tmp_path / "no").exists()
