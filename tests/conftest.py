"""Fixtures shared by tests of the outer layers: a checkpoint folder with a tokenizer."""

from pathlib import Path

import pytest

import toy_speech
from offramp.models.hub import save_decoder
from offramp.tokenizer import train_bpe
from toy import decoder

TEXT = "the count opened the door and the countess closed the door. " * 4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model of 5 layers with a byte-level tokenizer of 300 tokens, ending at token 1."""
    folder = tmp_path_factory.mktemp("checkpoints") / "toy"
    model = decoder(vocab_size=300, max_positions=64, tied_embeddings=True, eos_ids=(1,))
    save_decoder(model, folder, train_bpe([TEXT], 300, ()))
    return folder


@pytest.fixture(scope="session")
def recogniser_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recogniser that has learned the words "do" and "mi" (toy_speech.py)."""
    folder = tmp_path_factory.mktemp("recognisers") / "toy"
    return toy_speech.save(toy_speech.trained(), folder)
