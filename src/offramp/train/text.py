"""Recipes for text: a corpus, a tower (new or from a checkpoint) and LayerSkip's settings.

A recipe file under recipes/ builds one `TextRecipe`; `offramp train` overrides its settings,
builds the task and drives `train/loop.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from offramp.config import DecoderConfig, check_counts
from offramp.data import corpora
from offramp.data.batching import PromptCompletions, TokenBatch, TokenWindows, windows
from offramp.errors import ConfigError
from offramp.models import hub
from offramp.models.decoder_lm import DecoderLM
from offramp.tokenizer import BOS, EOS, PAD, TextTokenizer, train_bpe
from offramp.train.evaluation import exit_nll
from offramp.train.layerskip import LayerSkipConfig, LayerSkipTask
from offramp.train.loop import (
    STATE_FILE,
    StepDone,
    TrainConfig,
    TrainEvent,
    is_first_process,
    process_device,
    train,
)

CORPORA = ("books", "top")


@dataclass(frozen=True)
class TextRecipe:
    """One training run of a decoder on text.

    model: the tower's shape (a tokenizer of its `vocab_size` is made), or a checkpoint (folder
    or name) to start from, whose tokenizer is kept. corpus: `books` (windows of `seq_len`
    tokens) or `top` (utterance -> parse pairs, loss on the parse). autocast: "bf16" for mixed
    precision, or "none".
    """

    name: str
    model: DecoderConfig | str
    corpus: str
    batch_size: int
    train: TrainConfig
    layerskip: LayerSkipConfig = field(default_factory=LayerSkipConfig)
    seq_len: int = 256
    autocast: str = "bf16"

    def __post_init__(self) -> None:
        if self.corpus not in CORPORA:
            raise ConfigError(f"corpus is {self.corpus!r}; allowed: {', '.join(CORPORA)}")
        if self.autocast not in ("bf16", "none"):
            raise ConfigError(f"autocast is {self.autocast!r}; allowed: bf16, none")
        check_counts(1, batch_size=self.batch_size, seq_len=self.seq_len)
        if isinstance(self.model, DecoderConfig):
            self._check_seq_len(self.model)

    def _check_seq_len(self, config: DecoderConfig) -> None:
        if self.corpus == "books" and self.seq_len > config.max_positions:
            raise ConfigError(
                f"seq_len is {self.seq_len}; it must be at most the model's max_positions, "
                f"{config.max_positions}"
            )

    def run(self, out: Path, device: str = "cpu") -> Iterator[TrainEvent]:
        """Train or resume in `out`; at the end its `checkpoint` folder holds the model."""
        folder = out / "checkpoint"
        hub.check_target(folder)  # before the training, not after it
        tokenizer, model, start = self._start(process_device(device))
        task = TextTask(self, model, tokenizer)
        settings = asdict(self) | {
            "start weights": start,
            "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
            "training data": task.data_sha256,
        }
        trained = False
        for event in train(task, self.train, out, settings):
            trained = trained or isinstance(event, StepDone)
            yield event
        if is_first_process() and (trained or not _is_saved(folder, out / STATE_FILE)):
            hub.save_decoder(model, folder, tokenizer, dtype=torch.float16)

    def _start(self, device: torch.device) -> tuple[TextTokenizer, DecoderLM, str | None]:
        """(tokenizer, model, sha256 of the weights it starts from)."""
        if isinstance(self.model, str):
            folder = hub.resolve(self.model)
            self._check_seq_len(hub.load_config(folder))
            model = hub.load_decoder(folder, device).requires_grad_(True).train()
            tokenizer = TextTokenizer.load(folder / "tokenizer.json")
            start = hub.weights_sha256(folder)
        else:
            tokenizer, start = tiny_tokenizer(self.model.vocab_size), None
            model = DecoderLM(self.model).to(device)
            model.init_weights(self.train.seed)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"vocab_size is {model.config.vocab_size}, and the tokenizer needs at least "
                f"{tokenizer.vocab_size}; raise the model's vocab_size"
            )
        # All that a later step could refuse, before the corpus is read.
        self.layerskip.curriculum.enabled(0, self.train.steps, model.config.num_layers)
        return tokenizer, model, start


class TextTask(LayerSkipTask):
    """LayerSkip training on a recipe's corpus, evaluated on its dev split at every exit.

    data_sha256: tells whether the training tokens are still the same.
    """

    def __init__(self, recipe: TextRecipe, model: DecoderLM, tokenizer: TextTokenizer) -> None:
        seed, size = recipe.train.seed, recipe.batch_size
        self._dev: list[TokenBatch]
        self._bytes_per_target = math.nan
        if recipe.corpus == "books":
            stream, _ = book_tokens(tokenizer, "train")
            self.data_sha256 = hashlib.sha256(stream.tobytes()).hexdigest()
            batches: TokenWindows | PromptCompletions = TokenWindows(
                stream, recipe.seq_len, size, seed
            )
            dev, num_bytes = book_tokens(tokenizer, "dev")
            self._bytes_per_target = num_bytes / len(dev)
            self._dev = windows(dev, recipe.seq_len, size, limit=40_000)
        else:
            pad = _special(tokenizer, PAD)
            pairs = parse_pairs(tokenizer, corpora.top("train") + corpora.topv2("train"))
            self.data_sha256 = hashlib.sha256(repr(pairs).encode()).hexdigest()
            batches = PromptCompletions(pairs, size, pad, seed)
            held = parse_pairs(tokenizer, [p for p in corpora.top("dev") if p.supported][:512])
            some = PromptCompletions(held, size, pad, seed)
            self._dev = [some.batch(i, 0, 1) for i in range(len(held) // size)]
        super().__init__(
            model,
            batches,
            recipe.layerskip,
            recipe.train.steps,
            seed,
            torch.bfloat16 if recipe.autocast == "bf16" else None,
        )

    def evaluate(self) -> Mapping[str, float]:
        """Books: bits per byte at each exit; parses: nats per token of the parse."""
        sums, count = exit_nll(self.model, self._dev)
        if math.isnan(self._bytes_per_target):
            return {f"nll@{i}": s / count for i, s in enumerate(sums, 1)}
        num_bytes = count * self._bytes_per_target
        return {f"bpb@{i}": s / math.log(2) / num_bytes for i, s in enumerate(sums, 1)}


def _is_saved(checkpoint: Path, state: Path) -> bool:
    """Whether `checkpoint` was written after the run's last `state`, so not by an earlier run."""
    weights = checkpoint / "model.safetensors"
    return weights.exists() and weights.stat().st_mtime >= state.stat().st_mtime


def tiny_tokenizer(vocab_size: int) -> TextTokenizer:
    """The BPE that lm-tiny and parse-tiny share: novels, utterances, and whole parse labels."""
    items = corpora.top("train") + corpora.topv2("train")
    texts = [
        *corpora.books("train").values(),
        *(f" {item.utterance}" for item in items for _ in range(4)),
    ]
    whole = [f" {label}" for label in corpora.labels(items)]
    return train_bpe(texts, vocab_size, [*whole, " ]", " =>", "Parse:"])


def book_tokens(tokenizer: TextTokenizer, split: str) -> tuple[np.ndarray, int]:
    """(the split's books as one token stream, each behind BOS; bytes of text in it)."""
    texts = list(corpora.books(split).values())
    bos = _special(tokenizer, BOS)
    stream = [np.array([bos, *ids], np.int32) for ids in tokenizer.encode_batch(texts, False)]
    return np.concatenate(stream), sum(len(t.encode()) for t in texts)


def parse_pairs(
    tokenizer: TextTokenizer, items: list[corpora.Parse]
) -> list[tuple[list[int], list[int]]]:
    """(prompt with BOS, parse with EOS) in tokens, for each item."""
    prompts = tokenizer.encode_batch([corpora.parse_prompt(p.utterance) for p in items])
    parses = tokenizer.encode_batch([f" {p.parse}" for p in items], special=False)
    eos = _special(tokenizer, EOS)
    return [(p, [*c, eos]) for p, c in zip(prompts, parses, strict=True)]


def _special(tokenizer: TextTokenizer, token: str) -> int:
    found = tokenizer.token_id(token)
    if found is None:
        raise ConfigError(
            f"the checkpoint's tokenizer has no {token} token; text recipes need one made by "
            "them: start from lm-tiny or from a model configuration"
        )
    return found
