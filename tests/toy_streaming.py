"""A toy streaming recogniser: random weights, so what it writes means nothing, but much of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.audio.features import FeatureConfig, log_mel
from offramp.audio.gate import GateOptions
from offramp.decoding.endpoint import EndpointOptions
from offramp.decoding.stream_plan import StreamOptions
from offramp.models.transducer import Transducer
from offramp.models.transducer_checkpoint import save_transducer
from offramp.stream_events import Event, Final
from offramp.streaming import StreamingRecognizer
from offramp.tokenizer import TextTokenizer, train_ctc_bpe
from toy_transducer import transducer

RATE = 16_000
PIECES = ["", *("\N{LOWER ONE EIGHTH BLOCK}" + s for s in ("do", "re", "mi")), *"abcdefg"]
assert len(PIECES) == 11


def babble(seconds: float, seed: int = 0) -> Tensor:
    """Noise whose loudness and colour change every tenth of a second, as syllables do."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(round(10 * seconds)):
        noise = torch.randn(RATE // 10, generator=generator)
        loud, dull = torch.rand(2, generator=generator).tolist()
        for _ in range(round(4 * dull)):
            noise = noise + noise.roll(1)
        parts.append(10 ** (-3 * loud) * noise / noise.abs().max())
    return torch.cat(parts)


@torch.no_grad()
def model(**changes: Any) -> Transducer:
    """It writes a token in about two of five frames of babble,."""
    made = transducer(**changes)
    config = made.config
    features = log_mel(babble(6.0, 99), FeatureConfig(num_mels=config.num_mels))
    made.encoder.feature_norm.measure([features])
    encoded, _ = made.encoder(features[None], torch.tensor([len(features)]))
    start, _ = made.predictor.step(torch.tensor([config.blank_id]), made.predictor.initial_state(1))
    logits = made.joiner(encoded[0], start)
    blank = logits[:, config.blank_id].clone()
    logits[:, config.blank_id] = -torch.inf
    shift = (logits.max(dim=1).values - blank).quantile(0.6)
    head, row = (made.joiner.tokens, config.blank_id)
    if made.joiner.blank is not None:
        head, row = made.joiner.blank, 0
    head.bias[row] += shift
    return made


def recognizer(**changes: Any) -> StreamingRecognizer:
    return StreamingRecognizer(model(**changes), PIECES)


def tokenizer() -> TextTokenizer:
    return train_ctc_bpe(["do re mi do re mi fa so"], 11)


def save(folder: Path, **changes: Any) -> Path:
    save_transducer(model(**changes), folder, files={"tokenizer.json": tokenizer().to_json()})
    return folder


def finals(events: list[Event]) -> str:
    return " ".join(event.text for event in events if isinstance(event, Final))


def timeless(events: list[Event]) -> list[Event]:
    """Without what depends on how busy the machine is."""
    return [replace(event, latency_ms=0.0) for event in events]


SPOKEN = babble(1.5)
# Two stretches of sound and a silence long enough for this gate.
GATE = GateOptions(hold_s=0.3, before_s=0.06)
SPARSE = torch.cat((torch.zeros(4000), babble(0.7, 1), torch.zeros(12_800), babble(0.6, 2)))
ENDPOINTS = EndpointOptions(silence_s=0.4, trailing_silence_s=0.2, max_utterance_s=1.0)
OPTIONS: dict[str, StreamOptions] = {
    "plain": StreamOptions(),
    "no gate, no endpoints": StreamOptions(endpoint=None, gate=None),
    "beam": StreamOptions(beam_size=3, gate=GATE, endpoint=ENDPOINTS),
    "hotwords": StreamOptions(hotwords=("do re", "mi"), gate=GATE),
    "beam with hotwords": StreamOptions(beam_size=2, hotwords=("mi",), endpoint=ENDPOINTS),
    "three tokens per frame": StreamOptions(blank_skip=0.25, max_symbols=3, endpoint=ENDPOINTS),
    "blank skip": StreamOptions(blank_skip=0.25, gate=GATE, endpoint=ENDPOINTS),
}
