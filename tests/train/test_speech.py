"""Batches of speech as a function of the step, and a whole speech recipe on toy recordings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from offramp.audio.io import read_audio
from offramp.config import EncoderConfig
from offramp.data.augment_audio import AudioAugmentation
from offramp.data.manifest import Utterance, write_manifest
from offramp.data.synthetic import Sentence
from offramp.errors import ConfigError, DataError
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import load_encoder, save_encoder
from offramp.tokenizer import BLANK, TextTokenizer, train_ctc_bpe
from offramp.train import speech, speech_data
from offramp.train.ctc import CTCTraining, SpeechBatch
from offramp.train.loop import Evaluated, StepDone, TrainConfig
from offramp.train.speech import SpeechRecipe
from offramp.train.speech_data import MixedSpeech, Recordings, SpeechItem, at_least, pack
from offramp.train.trainee import Continued, LogMelTrainingReader, ours_from

TEXTS = ("a cat sat", "the dog ran off", "we see the sea", "it's a test", "go", "no more of it")
TOKENIZER = train_ctc_bpe(TEXTS, 40)
ENCODER = EncoderConfig(16, 2, 2, 32, 3, 40, exits=(1, 2), shared_head=True, feedback=True)


def write_set(folder: Path, count: int, split: str, first: int = 0) -> list[Utterance]:
    """Tones of 0.6 to 1.7 s with texts."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(first, first + count):
        seconds = 0.6 + 0.1 * (i % 12)
        times = np.arange(int(16_000 * seconds)) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * times)
        soundfile.write(folder / f"{i}.wav", wave, 16_000)
        text = TEXTS[i % len(TEXTS)]
        made.append(Utterance(folder / f"{i}.wav", seconds, "s", split, text))
    return made


@pytest.fixture
def utterances(tmp_path: Path) -> list[Utterance]:
    return write_set(tmp_path / "set", 23, "train")


def mixed(
    utterances: list[Utterance], seed: int = 0, augment: bool = True, num_shards: int = 1
) -> MixedSpeech:
    augmentation = AudioAugmentation() if augment else None
    reader = LogMelTrainingReader(ENCODER, TOKENIZER)
    return MixedSpeech([Recordings(utterances)], reader, 6.0, seed, augmentation, num_shards)


def same(a: SpeechBatch, b: SpeechBatch) -> bool:
    return (
        torch.equal(a.features, b.features)
        and torch.equal(a.lengths, b.lengths)
        and list(a.targets) == list(b.targets)
        and (a.audio_seconds, a.total_targets) == (b.audio_seconds, b.total_targets)
    )


def test_a_batch_is_a_function_of_seed_and_step(utterances: list[Utterance]) -> None:
    steps = (0, 3, 9, 14)
    once = mixed(utterances)
    forwards = {step: once.batch(step, 0, 1) for step in steps}
    for step in reversed(steps):
        assert same(mixed(utterances).batch(step, 0, 1), forwards[step])
    assert not same(mixed(utterances, seed=1).batch(0, 0, 1), forwards[0])


def test_a_recording_is_augmented_anew_in_every_step(utterances: list[Utterance]) -> None:
    one = mixed(utterances[:1])
    heard = [one.batch(step, 0, 1).features for step in range(4)]
    for a, b in itertools.combinations(heard, 2):
        assert a.shape != b.shape or not torch.equal(a, b)


def test_the_other_recordings_of_a_batch_are_its_babble(
    utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def apply(self: object, samples: Tensor, seed: int, index: int, others: list[Tensor]) -> Tensor:
        asked.append((samples, others))
        return samples

    monkeypatch.setattr(AudioAugmentation, "apply", apply)
    made = mixed(utterances[:3])
    made.batch(0, 0, 1)
    first, second, third = (samples for samples, _ in asked)
    expected = [[second, third], [third, first], [first, second]]
    for (_, others), wanted in zip(asked, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(others, wanted, strict=True))


def test_what_overshoots_when_resampled_is_clipped(tmp_path: Path) -> None:
    square = np.sign(np.sin(2 * np.pi * 100 * np.arange(8000) / 8000 + 0.01))
    soundfile.write(tmp_path / "square.wav", square, 8000)
    wanted = read_audio(tmp_path / "square.wav")
    assert wanted.abs().max() > 1.01, "it overshoots"
    (item,) = Recordings([Utterance(tmp_path / "square.wav", 1.0, "s", "train", "go")]).epoch(0)
    assert torch.allclose(item.samples(), wanted.clamp(-1, 1), atol=1e-4)


def test_an_epoch_has_every_recording_once(utterances: list[Utterance]) -> None:
    batches = mixed(utterances, augment=False)
    seen: list[tuple[int, ...]] = []
    for step in range(100):
        seen += [tuple(t) for t in batches.batch(step, 0, 1).targets]
        if len(seen) == len(utterances):
            break
    expected = [tuple(TOKENIZER.encode(u.text)) for u in utterances]
    assert sorted(seen) == sorted(expected)
    first = {tuple(map(tuple, mixed(utterances).batch(s, 0, 1).targets)) for s in range(step + 1)}
    second = {
        tuple(map(tuple, mixed(utterances).batch(s, 0, 1).targets))
        for s in range(step + 1, 2 * step + 2)
    }
    assert first != second, "another epoch has other batches"


def test_shards_are_the_batch(utterances: list[Utterance]) -> None:
    whole = mixed(utterances, num_shards=2).batch(2, 0, 1)
    shards = [mixed(utterances, num_shards=2).batch(2, i, 2) for i in range(2)]
    assert sorted(t for s in shards for t in s.targets) == sorted(whole.targets)
    assert {s.total_targets for s in shards} == {sum(map(len, whole.targets))}
    assert sum(s.audio_seconds for s in shards) == pytest.approx(whole.audio_seconds)


def test_every_batch_splits_into_its_shards(utterances: list[Utterance]) -> None:
    """Also what is left over of an epoch, and utterances too long to share a batch."""
    long = [replace(u, seconds=5.0 + i) for i, u in enumerate(utterances)]
    for some, num_shards in ((utterances, 4), (long, 2), (long, 5), (long, 23)):
        batches = mixed(some, num_shards=num_shards)
        plan = batches._plan(0)
        assert all(len(batch) >= num_shards for batch in plan)
        assert sorted(item.seconds for batch in plan for item in batch) == sorted(
            u.seconds for u in some
        )
        if len(some) // num_shards > 1:
            assert len(plan) > 1
    with pytest.raises(DataError, match="23 utterances do not split into 24 shards"):
        mixed(utterances, num_shards=24).batch(0, 0, 24)


@pytest.mark.parametrize("sizes", [[1], [9], [1, 1, 1], [1, 5, 1], [7, 1, 1, 1], [2, 2, 2, 5]])
@pytest.mark.parametrize("least", [1, 2, 3, 7])
def test_batches_take_what_they_lack_from_shorter_utterances(sizes: list[int], least: int) -> None:
    found = at_least(sizes, least)
    assert sum(found) == sum(sizes)
    assert len(found) == 1 or min(found) >= least
    if min(sizes) >= least:
        assert found == sizes
    for size, before in zip(found[:0:-1], sizes[::-1], strict=False):
        assert size <= max(least, before), "a batch of long utterances grows beyond need"


def test_sentences_that_take_too_long_are_not_spoken(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Sentence("spoken", text) for text in ("a b", "x" * 57, "y" * 55)]
    monkeypatch.setattr(speech_data, "_train_sentences", lambda root: said)
    made = []
    monkeypatch.setattr(speech_data, "Synthetic", lambda sentences, *_: made.append(sentences))
    replace(toy_recipe(), sets=(), synthetic_sentences=9, max_seconds=4.0).sources(0)
    assert made == [[said[0], said[2]]]  # 14 characters take a second
    with pytest.raises(DataError, match=r"max_seconds, 0\.1"):
        replace(toy_recipe(), sets=(), synthetic_sentences=9, max_seconds=0.1).sources(0)


def test_batches_are_as_long_as_they_may_be() -> None:
    rng = np.random.default_rng(0)
    items = [SpeechItem("", s, lambda: torch.zeros(1)) for s in sorted(rng.uniform(1, 9, 60))]
    batches = pack(items, 20.0)
    assert [i for b in batches for i in b] == items
    for batch in batches:
        assert len(batch) * batch[-1].seconds <= 20.0 or len(batch) == 1
    for batch, after in itertools.pairwise(batches):
        assert (len(batch) + 1) * after[0].seconds > 20.0, "one more would have fitted"


def test_pieces_have_a_blank_that_no_text_has() -> None:
    assert TOKENIZER.token_id(BLANK) == 0
    for text in TEXTS:
        ids = TOKENIZER.encode(text)
        assert 0 not in ids and TOKENIZER.decode(ids) == text
    pieces = TOKENIZER.pieces()
    assert len(pieces) == TOKENIZER.vocab_size
    assert "".join(pieces[i] for i in TOKENIZER.encode("go")) == "\N{LOWER ONE EIGHTH BLOCK}go"


def toy_recipe(steps: int = 6) -> SpeechRecipe:
    return SpeechRecipe(
        name="toy",
        encoder=ENCODER,
        sets=("kathleen_arctic",),
        dev_sets=("kathleen_arctic",),
        training=CTCTraining(distill=0.1),
        batch_seconds=6.0,
        prefetch=False,
        train=TrainConfig(steps, 1e-3, 2, checkpoint_every=2, evaluate_every=6),
    )


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "data" / "kathleen_arctic"
    found = write_set(root, 14, "train") + write_set(root, 3, "dev", first=14)
    write_manifest(root / "manifest.tsv", found)
    monkeypatch.setenv("OFFRAMP_DATA", str(root.parent))
    monkeypatch.setattr(speech, "ctc_tokenizer", lambda vocab_size: TOKENIZER)
    return root.parent


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    events = list(toy_recipe().run(tmp_path / "whole"))
    losses = [e.loss for e in events if isinstance(e, StepDone)]
    assert len(losses) == 6
    for event in events:
        if isinstance(event, StepDone):
            assert list(event.exit_losses) == [1, 2] and event.exit_losses[2] == event.loss
            assert event.audio_s_per_s is not None and event.audio_s_per_s > 0
    assert {"loss_exit_1", "loss_exit_2"} < set(
        next(e.metrics for e in events if isinstance(e, Evaluated))
    )
    for event in toy_recipe().run(tmp_path / "cut"):
        if isinstance(event, StepDone) and event.step == 5:
            break  # killed: the state of step 4 is what there is
    ahead = replace(toy_recipe(), prefetch=True)  # who makes the batches changes nothing
    resumed = list(ahead.run(tmp_path / "cut"))
    assert [e.loss for e in resumed if isinstance(e, StepDone)] == losses[4:]
    whole, cut = (load_encoder(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokenizer = TextTokenizer.load(tmp_path / "cut" / "checkpoint" / "tokenizer.json")
    assert tokenizer.to_json() == TOKENIZER.to_json()


def test_a_run_can_start_from_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    list(toy_recipe(2).run(tmp_path / "first"))
    again = replace(toy_recipe(2), encoder=str(tmp_path / "first" / "checkpoint"))
    assert [e.step for e in again.run(tmp_path / "second") if isinstance(e, StepDone)] == [1, 2]


def test_an_encoder_reads_as_many_mels_as_it_asks_for(corpus: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(1)
    assert isinstance(recipe.encoder, EncoderConfig)
    narrow = replace(recipe.encoder, num_mels=40)
    train = replace(recipe.train, evaluate_every=1)
    events = list(replace(recipe, encoder=narrow, train=train).run(tmp_path / "run"))
    assert any(isinstance(e, Evaluated) for e in events)
    assert load_encoder(tmp_path / "run" / "checkpoint").config.num_mels == 40


def test_a_recipe_needs_something_to_train_on() -> None:
    with pytest.raises(ConfigError, match="nothing to train on"):
        replace(toy_recipe(), sets=())


def test_a_checkpoint_is_continued_with_other_settings(tmp_path: Path) -> None:
    """And the same weights; what is not given stays as it is."""
    folder = tmp_path / "start"
    start = CTCEncoder(replace(ENCODER, dropout=0.1))
    start.init_weights(0)
    save_encoder(start, folder, torch.float32, {"tokenizer.json": TOKENIZER.to_json()})
    for wanted, changes in (
        (Continued(str(folder)), {}),
        (Continued(str(folder), dropout=0.0, pad_edges=True), {"dropout": 0.0, "pad_edges": True}),
    ):
        made = ours_from(folder, wanted, torch.device("cpu")).encoder
        assert made.config == replace(start.config, **changes)
        assert made.training and all(p.requires_grad for p in made.parameters())
        state = start.state_dict()
        assert made.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in made.state_dict().items())
