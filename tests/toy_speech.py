"""A recogniser of two 'words', trained in seconds: what it is told to write comes out.

A low buzz is "do", a high one "mi", 0.25 s each, with pauses between; they swell and fade as
syllables do, or the energy detector would take them for hum. The first exit is trained
too, so every exit writes the same.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from offramp.audio.reader import LogMelReader
from offramp.config import EncoderConfig
from offramp.data.manifest import Utterance, write_manifest
from offramp.models.ctc import CTCEncoder
from offramp.models.ctc_checkpoint import save_encoder
from offramp.tokenizer import TextTokenizer, train_ctc_bpe
from offramp.train.ctc import ctc_nll, forward_exits

HZ = {"do": 300.0, "mi": 1500.0}
TONE_S, PAUSE_S, EDGE_S = 0.25, 0.15, 0.3
CONFIG = EncoderConfig(
    d_model=32,
    num_layers=3,
    num_heads=2,
    d_ff=48,
    kernel_size=5,
    vocab_size=8,
    exits=(1, 2, 3),
    num_mels=20,
    subsampling_activation="silu",
    positions="rotary",
    conv_norm="layer",
    shared_head=True,
)


def tokenizer() -> TextTokenizer:
    return train_ctc_bpe(["do mi do", "mi do mi"], CONFIG.vocab_size)


def speak(text: str, edge_s: float = EDGE_S, rate: int = 16_000) -> Tensor:
    """Samples of the words of `text`; "" is silence."""
    parts = [torch.zeros(round(rate * edge_s))]
    swell = torch.hann_window(round(rate * TONE_S))
    for nth, word in enumerate(text.split()):
        if nth:
            parts.append(torch.zeros(round(rate * PAUSE_S)))
        phase = 2 * math.pi * HZ[word] / rate * torch.arange(len(swell))
        partials = range(1, int(8_000 / HZ[word]))
        parts.append(0.3 * swell * sum((phase * k).sin() / k for k in partials))
    return torch.cat([*parts, torch.zeros(round(rate * edge_s))])


def write(path: Path, samples: Tensor, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.numpy().astype(np.float32), rate)
    return path


def write_corpus(folder: Path, texts: list[str]) -> Path:
    """Recordings and their manifest, split `dev`."""
    made = []
    for i, text in enumerate(texts):
        samples = speak(text)
        path = write(folder / f"{i}.wav", samples)
        made.append(Utterance(path, len(samples) / 16_000, "s", "dev", text))
    write_manifest(folder / "manifest.tsv", made)
    return folder / "manifest.tsv"


def random_texts(count: int, seed: int, longest: int = 5) -> list[str]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, count)
    return [" ".join(draw.choice(["do", "mi"], length)) for length in lengths]


def trained(steps: int = 60) -> CTCEncoder:
    """An encoder that has learned the two words."""
    pieces = tokenizer()
    model = CTCEncoder(CONFIG)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    reader = LogMelReader(CONFIG)
    batches = []
    for number in range(5):
        texts = random_texts(6, number, longest=4)
        samples = [speak(text, 0.1 + 0.03 * i) for i, text in enumerate(texts)]
        batches.append((*reader.inputs(samples), pieces.encode_batch(texts)))
    for step in range(steps):
        x, lengths, targets = batches[step % len(batches)]
        log_probs, frames = forward_exits(model, x, lengths, CONFIG.exits)
        loss = ctc_nll(log_probs, frames, targets, CONFIG.blank_id).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def save(model: CTCEncoder, folder: Path) -> Path:
    save_encoder(model, folder, files={"tokenizer.json": tokenizer().to_json()})
    return folder
