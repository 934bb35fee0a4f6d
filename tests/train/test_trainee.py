"""What recipes train: exits on transformers models, from a recipe to a folder that decodes."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from offramp.cli import main
from offramp.data.manifest import Utterance, write_manifest
from offramp.decoding.ctc import greedy, text
from offramp.errors import CheckpointError, ConfigError
from offramp.models.hf_checkpoint import PretrainedSpeech
from offramp.train.augment import SpecAugment
from offramp.train.ctc import CTCTask, CTCTraining, SpeechBatch
from offramp.train.loop import Evaluated, StepDone, TrainConfig
from offramp.train.recipes import load_recipe
from offramp.train.speech import SpeechRecipe
from offramp.train.trainee import Pretrained
from toy_hf import MODELS, WORDS, L, inputs, save_checkpoint, toy

pytest.importorskip("transformers")

RAW, FEATURES = "wav2vec2 layer norm first", "parakeet"
TARGETS = [[1, 2], [3, 4, 3], [5]]
RECIPE = Path(__file__).parents[2] / "recipes" / "attach_exits.py"


class Fixed:
    def __init__(self, batch: SpeechBatch) -> None:
        self._batch = batch

    def batch(self, step: int, shard: int, num_shards: int) -> SpeechBatch:
        return self._batch


def write_corpus(folder: Path) -> Path:
    """Noise of 0.4 to 0.9 s with texts; every third utterance is for dev."""
    folder.mkdir()
    draw, made = np.random.default_rng(0), []
    for i in range(12):
        seconds = 0.4 + 0.05 * (i % 11)
        wave = 0.1 * draw.standard_normal(int(16_000 * seconds))
        soundfile.write(folder / f"{i}.wav", wave, 16_000)
        split = "train" if i % 3 else "dev"
        made.append(Utterance(folder / f"{i}.wav", seconds, "s", split, WORDS[i % 4]))
    write_manifest(folder / "mine.tsv", made)
    return folder / "mine.tsv"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def recipe(model: Path, manifest: Path, **changes: Any) -> SpeechRecipe:
    settings: dict[str, Any] = {
        "name": "toy",
        "encoder": Pretrained(str(model)),
        "sets": (str(manifest),),
        "dev_sets": (str(manifest),),
        "augmentation": None,
        "training": CTCTraining(distill=0.1),
        "batch_seconds": 4.0,
        "prefetch": False,
        "train": TrainConfig(6, 1e-2, 2, checkpoint_every=2, evaluate_every=6, num_shards=2),
    }
    return SpeechRecipe(**{**settings, **changes})


def run(it: SpeechRecipe, out: Path, stop: int = 0) -> list[Any]:
    events = []
    for event in it.run(out):
        events.append(event)
        if isinstance(event, StepDone) and event.step == stop:
            break  # killed
    return events


@pytest.mark.parametrize("name", [RAW, pytest.param(FEATURES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_exits(
    name: str, freeze: bool, manifest: Path, tmp_path: Path
) -> None:
    """And where only the exits are trained, the model is what it was, to the bit."""
    model = save_checkpoint(tmp_path / "model", name)
    it = recipe(model, manifest, encoder=Pretrained(str(model), (2, L), freeze))
    events = run(it, tmp_path / "whole")
    run(it, tmp_path / "cut", stop=3)
    resumed = run(it, tmp_path / "cut")
    losses = {e.step: e.loss for e in events if isinstance(e, StepDone)}
    later = {e.step: e.loss for e in resumed if isinstance(e, StepDone)}
    assert later == {step: losses[step] for step in (3, 4, 5, 6)}
    folders = (tmp_path / "whole" / "checkpoint", tmp_path / "cut" / "checkpoint")
    whole, cut = (PretrainedSpeech.load(folder).encoder for folder in folders)
    before = PretrainedSpeech.load(model, (2, L)).encoder
    assert whole.config == cut.config and whole.config.exits == (2, L)
    changed = set()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[key]), key
        if not torch.equal(value, before.state_dict()[key]):
            changed.add(key.split(".")[0])
    assert changed == ({"heads"} if freeze else {"heads", "base"})
    (look,) = [e.metrics for e in events if isinstance(e, Evaluated)]
    assert {"loss_exit_2", f"token_error_rate_exit_{L}"} <= look.keys()


@pytest.mark.slow
def test_exit_heads_learn_on_a_frozen_model() -> None:
    encoder = toy(FEATURES)
    encoder.requires_grad_(True).train().freeze_base()
    x, lengths = inputs(FEATURES)
    batch = SpeechBatch(x, lengths, TARGETS, 1.0)
    it = CTCTask(encoder, Fixed(batch), CTCTraining(), 60, seed=0, dev=[batch])
    before = it.evaluate()
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], 3e-2)
    for step in range(60):
        it.backward(step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    after = it.evaluate()
    for e in (2, 4):
        assert after[f"loss_exit_{e}"] < 0.2 * before[f"loss_exit_{e}"]
    assert after[f"loss_exit_{L}"] == before[f"loss_exit_{L}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_family_trains_in_mixed_precision(name: str) -> None:
    batch = Fixed(SpeechBatch(*inputs(name), TARGETS, 1.0))
    found = {}
    for autocast in ("none", "bf16"):
        encoder = toy(name).requires_grad_(True).train()
        encoder.base.eval()  # no dropout
        it = CTCTask(encoder, batch, CTCTraining(autocast=autocast), 6, seed=0)
        it.backward(0, 0, 1)
        grads = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        found[autocast] = torch.cat(grads)
    error = (found["none"] - found["bf16"]).norm() / found["none"].norm()
    assert 0.0 < float(error) < 0.1


@pytest.mark.slow
def test_the_recipe_takes_a_folder_and_a_manifest(manifest: Path, tmp_path: Path) -> None:
    """As `offramp train recipes/attach_exits.py --set folder=...` does; then it decodes."""
    model = save_checkpoint(tmp_path / "model", RAW)
    sets = f'["{manifest}"]'
    given = {"folder": str(model), "sets": sets, "dev_sets": sets, "steps": "4"}
    it = load_recipe(RECIPE, given | {"warmup_steps": "1", "average": "0.9"})
    list(it.run(tmp_path / "out"))
    again = load_recipe(RECIPE, given | {"folder": str(tmp_path / "out" / "checkpoint")})
    assert isinstance(again, SpeechRecipe)
    trained = again._trainee(torch.device("cpu")).encoder
    assert trained.config.exits == (2, 4, L), "trained further with the exits it has"
    speech = PretrainedSpeech.load(tmp_path / "out" / "checkpoint")
    assert speech.encoder.config.exits == (2, 4, L)
    samples, _ = soundfile.read(manifest.parent / "0.wav", dtype="float32")
    with torch.inference_mode():
        state = speech.encoder.embed(*speech.reader.inputs([torch.from_numpy(samples)]))
        state = speech.encoder.run(state, 0, 2)
        (found,) = greedy(speech.encoder.log_probs(state, 2), state.lengths)
    assert set(text(found.tokens, speech.reader.pieces)) <= set("ABCDE' ")


def test_a_folder_is_enough_to_say_what_to_train(manifest: Path, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", RAW)
    trainee = recipe(model, manifest, encoder=str(model))._trainee(torch.device("cpu"))
    assert trainee.encoder.config.exits == (2, 4, L)
    assert trainee.fingerprint()["start weights"] is not None


def test_what_does_not_fit_is_refused(manifest: Path, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", RAW)
    it = recipe(model, manifest, training=CTCTraining(augment=SpecAugment()))
    with pytest.raises(ConfigError, match="this model reads samples; set augment to None"):
        run(it, tmp_path / "out")
    with pytest.raises(ConfigError, match="exits are"):
        run(replace(it, encoder=Pretrained(str(model), (1, 9))), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model of wav2vec2, hubert"):
        run(replace(it, encoder=Pretrained(str(tmp_path / "empty"))), tmp_path / "out")


# -- the how-to ----------------------------------------------------------------------------------

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "attach-exits-asr.md"


@pytest.mark.slow
def test_the_how_to_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trainings, cut to two steps, and its program."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("my-model"), RAW)
    Path("recipes").symlink_to(RECIPE.parent)
    write_corpus(Path("corpus")).rename("my.tsv")
    for wave in Path("corpus").iterdir():
        wave.rename(wave.name)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", HOW_TO.read_text(), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(block)[1:] for kind, block in blocks if "offramp train" in block]
    assert len(commands) == 2
    for words in commands:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--set", "steps=2", "--set", "warmup_steps=1", "--set", "prefetch=false"])
        assert ended.value.code == 0
    capsys.readouterr()
    (program,) = [block for kind, block in blocks if kind == "python"]
    exec(compile(program, str(HOW_TO), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line.endswith(" MACs") for line in printed)
    assert PretrainedSpeech.load(Path("runs/all/checkpoint")).encoder.config.exits == (2, 4, L)
