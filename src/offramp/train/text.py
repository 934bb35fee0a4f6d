"""Recipes for text: a corpus, a tower (new or from a checkpoint) and LayerSkip's settings.

A recipe file under recipes/ builds one `TextRecipe`; `offramp train` overrides its settings,
builds the task and drives `train/loop.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from offramp.config import DecoderConfig, check_counts, check_share
from offramp.data import corpora
from offramp.data.batching import PromptCompletions, TokenBatch, TokenBatches, TokenWindows, windows
from offramp.data.synthetic import book_sentences, transcript_sentences
from offramp.errors import ConfigError
from offramp.models import hub
from offramp.models.decoder_lm import DecoderLM
from offramp.tokenizer import BOS, EOS, PAD, TextTokenizer, train_bpe
from offramp.train.encoder_tokens import check_decoder, encoder_tokens
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

Pairs = list[tuple[list[int], list[int]]]  # (prompt, completion), each in tokens

CORPORA = ("books", "top", "sentences")
_LEFT_OUT, _REPLACED, _ADDED = 0.08, 0.15, 0.04  # of the tokens that are misheard


@dataclass(frozen=True)
class TextRecipe:
    """One training run of a decoder on text.

    model: the tower's shape (a tokenizer of its `vocab_size` is made), or a checkpoint (folder
    or name) to start from, whose tokenizer is kept. corpus: `books` (windows of `seq_len`
    tokens), `top` (utterance -> parse pairs, loss on the parse) or `sentences` (one by one, as
    transcripts are written). tokens_of: a CTC encoder of ours (folder or name) behind which the
    new tower is to write sentences, in its tokens. misheard: share of the sentences that stand
    before BOS too, with mistakes, as a Speech-LM reads what its CTC wrote (`ProjectorConfig`): the
    tower learns to write them without. autocast: "bf16" for mixed precision, or "none".
    """

    name: str
    model: DecoderConfig | str
    corpus: str
    batch_size: int
    train: TrainConfig
    layerskip: LayerSkipConfig = field(default_factory=LayerSkipConfig)
    seq_len: int = 256
    tokens_of: str | None = None
    misheard: float = 0.0
    autocast: str = "bf16"

    def __post_init__(self) -> None:
        if self.corpus not in CORPORA:
            raise ConfigError(f"corpus is {self.corpus!r}; allowed: {', '.join(CORPORA)}")
        if self.autocast not in ("bf16", "none"):
            raise ConfigError(f"autocast is {self.autocast!r}; allowed: bf16, none")
        check_counts(1, batch_size=self.batch_size, seq_len=self.seq_len)
        check_share(misheard=self.misheard)
        if self.misheard and self.corpus != "sentences":
            raise ConfigError(
                f"corpus is {self.corpus!r}, and sentences alone can be misheard; set misheard to 0"
            )
        if self.tokens_of is not None and self.corpus != "sentences":
            raise ConfigError(
                f"corpus is {self.corpus!r}, and the tokens of an encoder, {self.tokens_of}, write "
                "transcripts alone; set corpus to sentences, or leave tokens_of out"
            )
        if self.tokens_of is not None and isinstance(self.model, str):
            raise ConfigError(
                f"tokens_of is {self.tokens_of}, and model is a checkpoint, {self.model}, whose "
                "tokenizer is kept; give a new model, or leave tokens_of out"
            )
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
            tokenizer, start = self._tokenizer(self.model), None
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

    def _tokenizer(self, config: DecoderConfig) -> TextTokenizer:
        """For a new tower."""
        if self.tokens_of is None:
            return tiny_tokenizer(config.vocab_size)
        folder = hub.resolve(self.tokens_of)
        tokenizer = encoder_tokens(folder)
        check_decoder(config, tokenizer, folder)
        return tokenizer


@dataclass(frozen=True)
class Corpus:
    """What a tower learns from and is evaluated on.

    sha256: of the training tokens. units: name of a figure -> the nats per target of `dev` that
    are 1 in its unit.
    """

    batches: TokenBatches
    dev: Sequence[TokenBatch]
    sha256: str
    units: Mapping[str, float]


class TextTask(LayerSkipTask):
    """LayerSkip training on a recipe's corpus, evaluated on its dev split at every exit.

    data_sha256: tells whether the training tokens are still the same.
    """

    def __init__(self, recipe: TextRecipe, model: DecoderLM, tokenizer: TextTokenizer) -> None:
        corpus = {"books": _books, "top": _top, "sentences": _sentences}[recipe.corpus]
        found = corpus(recipe, tokenizer)
        self.data_sha256, self._dev, self._units = found.sha256, found.dev, found.units
        super().__init__(
            model,
            found.batches,
            recipe.layerskip,
            recipe.train.steps,
            recipe.train.seed,
            torch.bfloat16 if recipe.autocast == "bf16" else None,
        )

    def evaluate(self) -> Mapping[str, float]:
        """At each exit: of books bits per byte (bpb), of parses nats per token (nll), of sentences
        nats per token and bits per character (bpc), their ends among the tokens."""
        sums, count = exit_nll(self.model, self._dev)
        return {
            f"{name}@{i}": s / count / unit
            for name, unit in self._units.items()
            for i, s in enumerate(sums, 1)
        }


def _books(recipe: TextRecipe, tokenizer: TextTokenizer) -> Corpus:
    seed, size = recipe.train.seed, recipe.batch_size
    stream, _ = book_tokens(tokenizer, "train")
    dev, num_bytes = book_tokens(tokenizer, "dev")
    return Corpus(
        TokenWindows(stream, recipe.seq_len, size, seed),
        windows(dev, recipe.seq_len, size, limit=40_000),
        hashlib.sha256(stream.tobytes()).hexdigest(),
        {"bpb": math.log(2) * num_bytes / len(dev)},
    )


def _top(recipe: TextRecipe, tokenizer: TextTokenizer) -> Corpus:
    pad = _special(tokenizer, PAD)
    pairs = parse_pairs(tokenizer, corpora.top("train") + corpora.topv2("train"))
    held = parse_pairs(tokenizer, [p for p in corpora.top("dev") if p.supported][:512])
    return _pairs_corpus(recipe, pairs, held, pad, {"nll": 1.0})


def _sentences(recipe: TextRecipe, tokenizer: TextTokenizer) -> Corpus:
    texts = [s.text for s in (*book_sentences("train"), *transcript_sentences("train"))]
    dev = [s.text for s in book_sentences("dev")[:512]]
    dev = dev[: len(dev) - len(dev) % recipe.batch_size]  # in whole batches, like the training
    seed, share = recipe.train.seed, recipe.misheard
    held = misheard(sentence_pairs(tokenizer, dev), share, seed)
    num_targets = sum(len(tokens) for _, tokens in held)
    units = {"nll": 1.0, "bpc": math.log(2) * sum(map(len, dev)) / max(1, num_targets)}
    # Any token pads: it stands behind what a causal tower reads, and has no target.
    pad = _special(tokenizer, EOS)
    train = misheard(sentence_pairs(tokenizer, texts), share, seed)
    return _pairs_corpus(recipe, train, held, pad, units)


def _pairs_corpus(
    recipe: TextRecipe, train: Pairs, dev: Pairs, pad: int, units: Mapping[str, float]
) -> Corpus:
    seed, size = recipe.train.seed, recipe.batch_size
    some = PromptCompletions(dev, size, pad, seed)
    return Corpus(
        PromptCompletions(train, size, pad, seed),
        [some.batch(i, 0, 1) for i in range(len(dev) // size)],
        hashlib.sha256(repr(train).encode()).hexdigest(),
        units,
    )


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


def parse_pairs(tokenizer: TextTokenizer, items: list[corpora.Parse]) -> Pairs:
    """(prompt with BOS, parse with EOS) in tokens, for each item."""
    prompts = tokenizer.encode_batch([corpora.parse_prompt(p.utterance) for p in items])
    parses = tokenizer.encode_batch([f" {p.parse}" for p in items], special=False)
    eos = _special(tokenizer, EOS)
    return [(p, [*c, eos]) for p, c in zip(prompts, parses, strict=True)]


def sentence_pairs(tokenizer: TextTokenizer, texts: list[str]) -> Pairs:
    """(BOS, sentence with EOS) in tokens, for each text."""
    bos, eos = _special(tokenizer, BOS), _special(tokenizer, EOS)
    return [([bos], [*ids, eos]) for ids in tokenizer.encode_batch(texts, special=False)]


def misheard(pairs: Pairs, share: float, seed: int) -> Pairs:
    """`pairs` with about that share of the completions before the prompt too, with mistakes.

    Of their tokens some are left out, some replaced by others of the corpus, some follow that
    nobody said, about as often as a small recogniser errs; which is a function of `seed`.
    """
    if not share:
        return pairs
    generator = np.random.default_rng(seed)
    others = np.array([token for _, tokens in pairs for token in tokens[:-1]], np.int64)

    def heard(tokens: list[int]) -> list[int]:
        chance = generator.random(len(tokens))
        other = generator.choice(others, len(tokens)).tolist()
        made: list[int] = []
        for token, x, instead in zip(tokens, chance.tolist(), other, strict=True):
            if x < _LEFT_OUT + _REPLACED:
                made += [instead] if x >= _LEFT_OUT else []
            else:
                made += [token, instead] if x >= 1 - _ADDED else [token]
        return made

    chosen = (generator.random(len(pairs)) < share).tolist()
    return [
        ([*heard(tokens[:-1]), *prompt], tokens) if taken else (prompt, tokens)
        for (prompt, tokens), taken in zip(pairs, chosen, strict=True)
    ]


def _special(tokenizer: TextTokenizer, token: str) -> int:
    found = tokenizer.token_id(token)
    if found is None:
        raise ConfigError(
            f"the checkpoint's tokenizer has no {token} token; text recipes need one made by "
            "them: start from lm-tiny or from a model configuration"
        )
    return found
