"""Text to token ids and back, over a `tokenizer.json` as Hugging Face writes it.

`TextStream` turns a growing list of tokens into text piece by piece: a character may be spread
over several tokens, so a piece is held back until it is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from offramp.errors import CheckpointError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BLANK = "<|blank|>"


class TextTokenizer:
    """A tokenizer.json: `encode` adds the special tokens that the file asks for (usually BOS)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing; a checkpoint folder needs tokenizer.json to read text"
            )
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is no tokenizer: {error}; fetch it anew") from error

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=special)
        return [e.ids for e in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def pieces(self) -> list[str]:
        """The text of every token, by id, as the file spells it."""
        found = [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        return [piece or "" for piece in found]

    def to_json(self, pretty: bool = False) -> str:
        """All that determines the tokenizer, as text; pretty: as `save` writes it."""
        return self._tokenizer.to_str(pretty=pretty)

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))


def train_bpe(texts: Iterable[str], vocab_size: int, whole_tokens: Sequence[str]) -> TextTokenizer:
    """A byte-level BPE of `vocab_size`, with `whole_tokens` as entries that are never split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole_tokens),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in whole_tokens])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return TextTokenizer(tokenizer)


def train_ctc_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A character BPE for CTC: id 0 is the blank, which no text has; words start with `▁`.

    Characters that `texts` do not have cannot be written; `encode` leaves them out.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BLANK], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer)


def ctc_words(words: Sequence[str]) -> TextTokenizer:
    """One token for each of `words`, for CTC: id 0 is the blank; a text has no other words."""
    vocab = {
        BLANK: 0,
        **{f"\N{LOWER ONE EIGHTH BLOCK}{word}": i for i, word in enumerate(words, 1)},
    }
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return TextTokenizer(tokenizer)


class TextStream:
    """Text of a growing token list. `push` returns what a token adds, `flush` what is left.

    A token is decoded together with a few before it, at first with the end of the `prompt`, for
    tokenizers whose text depends on what came before (SentencePiece drops a leading space); an
    unfinished character is held back.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-8:])
        self._given = len(self._tokens)  # tokens whose text has been given out
        self._context = 0  # first token that is decoded again with the new ones

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        if text:  # a special token has none, and gives the next one no context
            self._context = self._given
        self._given = len(self._tokens)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._context = self._given = len(self._tokens)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._tokens[self._context : self._given])
        return self._tokenizer.decode(self._tokens[self._context :])[len(before) :]
