"""Text recipes over a corpus of a few lines: what a run resumes from, keeps and refuses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.models import hub
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import Evaluated, StepDone, TrainConfig
from offramp.train.text import TextRecipe

NOVEL = "The count opened the door, and the countess closed the door.\n" * 20
PARSES = "utterance\tsemantic_parse\n" + "".join(
    f"wake me at {n}\t[IN:CREATE_ALARM wake me [SL:DATE_TIME at {n} ] ]\n" for n in range(12)
)
STEPS = TrainConfig(steps=2, lr=1e-3, warmup_steps=0)
SHAPE = toy.config(vocab_size=280, num_layers=2, tied_embeddings=True, bos_id=0, eos_ids=(1,))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpora's folder: one novel, twelve parses."""
    root = tmp_path / "data"
    for file in ("gutenberg_books/train/a.txt", "gutenberg_books/dev/b.txt"):
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(NOVEL)
    for file in ("top_v1/train.tsv", "top_v1/dev.tsv", "topv2_english/train.tsv"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(PARSES)
    monkeypatch.setenv("OFFRAMP_DATA", str(root))
    return root


def recipe(**changes: Any) -> TextRecipe:
    made = TextRecipe("toy", SHAPE, "books", 4, STEPS, seq_len=16, autocast="none")
    return dataclasses.replace(made, **changes)


def refused(made: TextRecipe, out: Path, says: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=says) as error:
        list(made.run(out))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("corpus", ["books", "top"])
def test_a_run_trains_evaluates_every_exit_and_writes_a_checkpoint(
    corpus: str, data: Path, tmp_path: Path
) -> None:
    made = recipe(corpus=corpus, layerskip=LayerSkipConfig(0.2, "exp", 0.5))
    events = list(made.run(tmp_path / "out"))
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2]
    figures = next(e.metrics for e in events if isinstance(e, Evaluated))
    unit = "bpb" if corpus == "books" else "nll"
    assert figures.keys() == {f"{unit}@1", f"{unit}@2"}
    assert hub.load_config(tmp_path / "out" / "checkpoint") == SHAPE


def test_a_finished_run_leaves_its_checkpoint_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(recipe().run(out))
    (out / "checkpoint" / "README.md").write_text("mine")
    assert list(recipe().run(out)) == []
    assert (out / "checkpoint" / "README.md").read_text() == "mine"
    shutil.rmtree(out / "checkpoint")
    list(recipe().run(out))
    assert hub.load_config(out / "checkpoint") == SHAPE


def test_the_checkpoint_of_an_earlier_run_does_not_pass_for_this_runs(
    data: Path, tmp_path: Path
) -> None:
    """As after a kill between the last state and the checkpoint."""
    out = tmp_path / "out"
    list(recipe().run(out))
    first = hub.load_decoder(out / "checkpoint").embedding.weight
    shutil.move(out / "checkpoint", tmp_path / "earlier")
    (out / "state.safetensors").unlink()
    other = recipe(train=dataclasses.replace(STEPS, seed=1))
    list(other.run(out))
    second = hub.load_decoder(out / "checkpoint").embedding.weight
    shutil.rmtree(out / "checkpoint")
    shutil.move(tmp_path / "earlier", out / "checkpoint")
    list(other.run(out))
    assert not torch.equal(first, second)
    assert torch.equal(hub.load_decoder(out / "checkpoint").embedding.weight, second)


@pytest.mark.parametrize(
    ("corpus", "file"), [("books", "gutenberg_books/train/a.txt"), ("top", "top_v1/train.tsv")]
)
def test_a_run_over_other_data_refuses_to_resume(
    corpus: str, file: str, data: Path, tmp_path: Path
) -> None:
    made = recipe(corpus=corpus, model=str(start_model(data, tmp_path)))
    list(made.run(tmp_path / "out"))
    text = (data / file).read_text()
    (data / file).write_text(text.replace("wake", "make", 1).replace("door", "floor", 1))
    refused(made, tmp_path / "out", r"cannot resume .*: training data was '\w+', is '\w+'; restore")
    (data / file).write_text(text)
    assert list(made.run(tmp_path / "out")) == []


def start_model(data: Path, tmp_path: Path) -> Path:
    """A checkpoint to start from."""
    list(recipe().run(tmp_path / "first"))
    return tmp_path / "first" / "checkpoint"


def test_a_run_from_other_weights_or_another_tokenizer_refuses_to_resume(
    data: Path, tmp_path: Path
) -> None:
    start = start_model(data, tmp_path)
    made = recipe(model=str(start))
    list(made.run(tmp_path / "out"))
    tokenizer = start / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("<|pad|>", "<|end|>"))
    refused(made, tmp_path / "out", "cannot resume .*: tokenizer was '")
    tokenizer.write_text(text)
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    refused(made, tmp_path / "out", "cannot resume .*: start weights was '")


def test_what_cannot_work_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    small = recipe(model=dataclasses.replace(SHAPE, vocab_size=100))
    refused(small, tmp_path / "a", "vocab_size is 100, and the tokenizer needs at least 2")
    long = recipe(model=str(start_model(data, tmp_path)), seq_len=129)
    refused(long, tmp_path / "b", "seq_len is 129; it must be at most .*, 128")
    (tmp_path / "c" / "checkpoint").mkdir(parents=True)
    (tmp_path / "c" / "checkpoint" / "diary.txt").touch()
    refused(recipe(), tmp_path / "c", "holds files and is no checkpoint")
    with pytest.raises(InputError, match="device is 'gpu'; give cpu"):
        list(recipe().run(tmp_path / "d", device="gpu"))
