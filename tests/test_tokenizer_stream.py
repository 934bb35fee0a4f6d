"""`TextStream` on hard cases: its pieces make up the text whatever the tokens are."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from offramp.tokenizer import BOS, EOS, TextStream, TextTokenizer, train_bpe


def bytes_tokenizer() -> TextTokenizer:
    """Byte-level, as of Llama 3."""
    return train_bpe(["the sun rises in the east and sets in the west"], 290, [" ]", "<END>"])


def pieces_tokenizer() -> TextTokenizer:
    """As of Llama 2: words carry their space, and the text's first space is not written."""
    words = ["<unk>", BOS, EOS, *(f"\u2581{w}" for w in ("the", "sun", "rises", "")), "s", "\n"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{i:02X}>" for i in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    space, first = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), first])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS)])
    return TextTokenizer(tokenizer)


TOKENIZERS = {"bytes": bytes_tokenizer, "pieces": pieces_tokenizer}


def pieces(tokenizer: TextTokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(t) for t in tokens), stream.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_add_nothing_and_change_nothing(kind: str) -> None:
    """A model may write its beginning of text in the middle, and several."""
    tokenizer = TOKENIZERS[kind]()
    the, sun = (tokenizer.encode(w, special=False) for w in ("the", " sun"))
    special = [tokenizer.token_id(t) for t in (BOS, EOS)]
    for between in ([], special[:1], special, special * 2):
        for tokens in ([*the, *between, *sun], [*between, *the, *sun], [*the, *sun, *between]):
            given = pieces(tokenizer, tokens)
            assert "".join(given) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_make_up_the_text_of_valid_characters(kind: str, seed: int) -> None:
    tokenizer, draw = TOKENIZERS[kind](), random.Random(seed)
    for _ in range(50):
        words = draw.choices(["the", " sun", " rises", "s", "\n", "é", "東", "\U0001f4a9"], k=8)
        tokens = [t for w in words for t in tokenizer.encode(w, special=False)]
        given = pieces(tokenizer, tokens)
        assert "".join(given) == tokenizer.decode(tokens)
        assert given[-1] == "", "nothing is left to flush"
        assert not any("\ufffd" in piece for piece in given)


def test_after_a_flush_the_stream_goes_on() -> None:
    tokenizer = bytes_tokenizer()
    stream = TextStream(tokenizer)
    half, whole = tokenizer.encode("東", special=False)[:2], tokenizer.encode("sun", special=False)
    assert [stream.push(t) for t in half] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert "".join(stream.push(t) for t in whole) == "sun"


def test_a_stream_continues_its_prompt():
    """SentencePiece tokenizers drop the space in front of a text's first word."""
    words = {"\u2581the": 0, "\u2581cat": 1, "<unk>": 2}
    made = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    tokenizer = TextTokenizer(made)
    assert TextStream(tokenizer).push(1) == "cat"
    assert TextStream(tokenizer, [0]).push(1) == " cat"
