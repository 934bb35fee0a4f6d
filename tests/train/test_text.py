"""Text recipes over a corpus of a few lines: what a run resumes from, keeps and refuses."""

from __future__ import annotations

import dataclasses
import math
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
import toy_encoder
from offramp.config_speech_lm import ProjectorConfig
from offramp.data.synthetic import book_sentences, transcript_sentences
from offramp.decoding.exit_policies import edit_distance
from offramp.errors import CheckpointError, ConfigError, InputError
from offramp.models import hub
from offramp.models.ctc_checkpoint import save_encoder
from offramp.models.decoder_lm import DecoderLM
from offramp.tokenizer import BOS, EOS, TextTokenizer, train_ctc_bpe
from offramp.train.encoder_tokens import encoder_tokens
from offramp.train.layerskip import LayerSkipConfig
from offramp.train.loop import Evaluated, StepDone, TrainConfig
from offramp.train.speech_lm_recipe import NewDecoder, new_decoder
from offramp.train.text import TextRecipe, TextTask, misheard, sentence_pairs

NOVEL = "".join(
    f"The {a} opened the {b}, and the {c} closed the door.\n\n"
    for a, b, c in permutations(("count", "window", "garden", "box"), 3)
)
TRANSCRIPTS = "id\ttext\n1-1-0\tTHE DOOR WAS SHUT\n2-1-0\tWE HEARD NOBODY\n"
PARSES = "utterance\tsemantic_parse\n" + "".join(
    f"wake me at {n}\t[IN:CREATE_ALARM wake me [SL:DATE_TIME at {n} ] ]\n" for n in range(12)
)
STEPS = TrainConfig(steps=2, lr=1e-3, warmup_steps=0)
SHAPE = toy.config(vocab_size=280, num_layers=2, tied_embeddings=True, bos_id=0, eos_ids=(1,))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpora's folder: one novel, two transcripts, twelve parses."""
    root = tmp_path / "data"
    for file in ("gutenberg_books/train/a.txt", "gutenberg_books/dev/b.txt"):
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(NOVEL)
    for file in ("top_v1/train.tsv", "top_v1/dev.tsv", "topv2_english/train.tsv"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(PARSES)
    (root / "librispeech_transcripts_text").mkdir()
    (root / "librispeech_transcripts_text" / "dev_clean.tsv").write_text(TRANSCRIPTS)
    monkeypatch.setenv("OFFRAMP_DATA", str(root))
    return root


def recipe(**changes: Any) -> TextRecipe:
    made = TextRecipe("toy", SHAPE, "books", 4, STEPS, seq_len=16, autocast="none")
    return dataclasses.replace(made, **changes)


def refused(made: TextRecipe, out: Path, says: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=says) as error:
        list(made.run(out))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("corpus", ["books", "top", "sentences"])
def test_a_run_trains_evaluates_every_exit_and_writes_a_checkpoint(
    corpus: str, data: Path, tmp_path: Path
) -> None:
    made = recipe(corpus=corpus, layerskip=LayerSkipConfig(0.2, "exp", 0.5))
    events = list(made.run(tmp_path / "out"))
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2]
    figures = next(e.metrics for e in events if isinstance(e, Evaluated))
    names = {"books": ("bpb",), "top": ("nll",), "sentences": ("nll", "bpc")}[corpus]
    assert figures.keys() == {f"{name}@{i}" for name in names for i in (1, 2)}
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
    ("corpus", "file"),
    [
        ("books", "gutenberg_books/train/a.txt"),
        ("top", "top_v1/train.tsv"),
        ("sentences", "gutenberg_books/train/a.txt"),
        ("sentences", "librispeech_transcripts_text/dev_clean.tsv"),
    ],
)
def test_a_run_over_other_data_refuses_to_resume(
    corpus: str, file: str, data: Path, tmp_path: Path
) -> None:
    made = recipe(corpus=corpus, model=str(start_model(data, tmp_path)))
    list(made.run(tmp_path / "out"))
    text = (data / file).read_text()
    (data / file).write_text(
        text.replace("wake", "make", 1).replace("door", "gate", 1).replace("DOOR", "GATE")
    )
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


# -- sentences -----------------------------------------------------------------------------------


@pytest.fixture
def encoder(data: Path, tmp_path: Path) -> Path:
    """The folder of a CTC encoder that can write the sentences."""
    pieces = train_ctc_bpe((s.text for s in book_sentences("train")), 40)
    made = toy_encoder.encoder(vocab_size=pieces.vocab_size)
    save_encoder(made, tmp_path / "encoder", files={"tokenizer.json": pieces.to_json()})
    return tmp_path / "encoder"


def for_encoder(folder: Path, **changes: Any) -> TextRecipe:
    """Of a decoder that writes sentences in that encoder's tokens."""
    V = encoder_tokens(folder).vocab_size
    shape = dataclasses.replace(SHAPE, vocab_size=V, bos_id=V - 2, eos_ids=(V - 1,))
    named = {"model": shape, "corpus": "sentences", "tokens_of": str(folder)}
    return recipe(**(named | changes))


def test_every_sentence_is_learned_once_an_epoch_from_bos_to_eos(encoder: Path) -> None:
    made, tokens = for_encoder(encoder, batch_size=5), encoder_tokens(encoder)
    assert isinstance(made.model, type(SHAPE))
    batches = TextTask(made, DecoderLM(made.model), tokens).batches
    sentences = [s.text for s in (*book_sentences("train"), *transcript_sentences("train"))]
    bos, eos = tokens.token_id(BOS), tokens.token_id(EOS)
    seen = []
    for step in range(len(sentences) // 5):
        batch = batches.batch(step, 0, 1)
        for row, goal in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            ids = [token for token in goal if token >= 0]
            assert ids[-1] == eos and row[: len(ids)] == [bos, *ids[:-1]]
            seen.append(ids[:-1])
    assert len(sentences) == 26, "24 of the novel, both transcripts"
    texts = {tuple(tokens.encode(text)) for text in sentences}
    assert len(seen) == len({tuple(ids) for ids in seen}) == 25, "batches are whole"
    assert {tuple(ids) for ids in seen} < texts


def test_what_is_misheard_stands_before_bos_with_mistakes(encoder: Path) -> None:
    tokens = encoder_tokens(encoder)
    texts = [s.text for s in book_sentences("train")] * 20
    pairs = sentence_pairs(tokens, texts)
    assert misheard(pairs, 0.0, 1) == pairs
    made = misheard(pairs, 0.7, 1)
    assert made == misheard(pairs, 0.7, 1) != misheard(pairs, 0.7, 2)
    assert [goal for _, goal in made] == [goal for _, goal in pairs], "what is learned stays"
    bos, eos = tokens.token_id(BOS), tokens.token_id(EOS)
    assert all(prompt[-1] == bos for prompt, _ in made)
    heard = [(prompt[:-1], goal[:-1]) for prompt, goal in made if len(prompt) > 1]
    assert 0.6 * len(pairs) < len(heard) < 0.8 * len(pairs)
    wrong = sum(edit_distance(theirs, said) for theirs, said in heard)
    share = wrong / sum(len(said) for _, said in heard)
    assert 0.18 < share < 0.3 and all(eos not in theirs for theirs, _ in heard)


def test_the_figures_are_those_of_each_sentence_alone(encoder: Path) -> None:
    made, tokens = for_encoder(encoder, batch_size=7), encoder_tokens(encoder)
    assert isinstance(made.model, type(SHAPE))
    model = DecoderLM(made.model)
    toy.randomize(model, 0)
    found = TextTask(made, model, tokens).evaluate()
    texts = [s.text for s in book_sentences("dev")][:21]  # of 24, in batches of 7
    ids = [tokens.encode(text) for text in texts]
    for exit_layer in (1, 2):
        bits = -sum(log_probability(model, row, exit_layer) for row in ids) / math.log(2)
        num_tokens, num_chars = sum(len(row) + 1 for row in ids), sum(map(len, texts))
        assert found[f"nll@{exit_layer}"] == pytest.approx(bits * math.log(2) / num_tokens)
        assert found[f"bpc@{exit_layer}"] == pytest.approx(bits / num_chars)


@torch.no_grad()
def log_probability(model: DecoderLM, ids: list[int], exit_layer: int) -> float:
    """Of the text from BOS to EOS, in nats."""
    V = model.config.vocab_size
    row = torch.tensor([[V - 2, *ids]])
    h = model.embed(row)
    for i in range(exit_layer):
        h = model.layer(i, h, model.view(row.shape[1]))
    steps = model.logits(h, exit_layer)[0].log_softmax(-1)
    return float(steps[range(len(ids) + 1), [*ids, V - 1]].sum())


def test_what_was_learned_from_sentences_goes_behind_the_encoder(
    encoder: Path, tmp_path: Path
) -> None:
    list(for_encoder(encoder).run(tmp_path / "out"))
    folder = tmp_path / "out" / "checkpoint"
    tokens = TextTokenizer.load(folder / "tokenizer.json")
    assert tokens.to_json() == encoder_tokens(encoder).to_json()
    wanted = NewDecoder(str(encoder), ProjectorConfig(2, 16), str(folder))
    made = new_decoder(wanted, encoder, 0, torch.device("cpu"))
    learned = hub.load_decoder(folder).state_dict()
    for name, tensor in made.model.decoder.state_dict().items():
        assert torch.equal(tensor, learned[name]), name


def test_tokens_of_an_encoder_are_refused_where_they_do_not_fit(
    encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"corpus is 'books', .* tokens of an encoder, .*; set"):
        for_encoder(encoder, corpus="books")
    with pytest.raises(ConfigError, match=r"model is a checkpoint, lm-tiny, .*; give a new model"):
        for_encoder(encoder, model="lm-tiny")
    refused(
        for_encoder(encoder, model=SHAPE), tmp_path / "a", "decoder.vocab_size is 280; .* be 41"
    )
    refused(for_encoder(encoder, tokens_of="gone"), tmp_path / "b", "there is no checkpoint gone; ")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
