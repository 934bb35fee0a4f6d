"""Text to tokens and back without loss, whole or piece by piece."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from offramp.errors import CheckpointError
from offramp.tokenizer import BOS, EOS, PAD, TextStream, TextTokenizer, train_bpe

SIZE = 280
WHOLE = [" [IN:GET_EVENT", " [SL:DATE_TIME", " ]", " =>", "Parse:"]
TEXTS = ["A rose is a rose is a rose.", "In the morning the sun rises, and in the evening", "né"]
SAMPLES = [
    "",
    "A rose is a rose.",
    "Parse: what rises =>",
    " [IN:GET_EVENT rose [SL:DATE_TIME morning ] ]",
    "  two  spaces\n\tand\r\nbreaks ",
    "naïve café — “quoted” 東京 \N{PILE OF POO}\N{ZERO WIDTH JOINER}e\N{COMBINING ACUTE ACCENT}",
    "\x00\x7f\ufffd",
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(TEXTS, SIZE, WHOLE)


@pytest.fixture(scope="module")
def pieces() -> TextTokenizer:
    """As of Llama 2: a space is the piece's first character, unknown characters are bytes."""
    words = ["<unk>", "\u2581", "\u2581a", "\u2581rose", "s", "a", "."]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{i:02X}>" for i in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TextTokenizer(tokenizer)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_the_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_any_text_survives_the_round_trip(tokenizer: TextTokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(draw.choice([draw.randrange(128), draw.randrange(0xD800)]))
            for _ in range(draw.randrange(20))
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_has_the_size_asked_for_and_known_special_tokens(
    tokenizer: TextTokenizer,
) -> None:
    assert tokenizer.vocab_size == SIZE
    assert [tokenizer.token_id(t) for t in (BOS, EOS, PAD)] == [0, 1, 2]
    assert tokenizer.token_id("no such token") is None
    assert max(t for text in SAMPLES for t in tokenizer.encode(text)) < SIZE


def test_encoding_begins_with_bos_unless_told_otherwise(tokenizer: TextTokenizer) -> None:
    with_bos, without = tokenizer.encode("a rose"), tokenizer.encode("a rose", special=False)
    assert with_bos == [0, *without]
    assert 0 not in without
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]


def test_whole_tokens_are_never_split(tokenizer: TextTokenizer) -> None:
    for whole in WHOLE:
        assert tokenizer.encode(whole, special=False) == [tokenizer.token_id(whole)]
    ids = tokenizer.encode(" [IN:GET_EVENT rose ]", special=False)
    assert ids[0] == tokenizer.token_id(" [IN:GET_EVENT")
    assert ids[-1] == tokenizer.token_id(" ]")


def test_training_is_reproducible(tokenizer: TextTokenizer) -> None:
    again = train_bpe(TEXTS, SIZE, WHOLE)
    assert [again.encode(text) for text in SAMPLES] == [tokenizer.encode(text) for text in SAMPLES]


def test_a_saved_tokenizer_is_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert [loaded.encode(text) for text in SAMPLES] == [tokenizer.encode(text) for text in SAMPLES]
    assert loaded.vocab_size == SIZE


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is missing; a checkpoint folder needs tokenizer.json"),
        ("{", "is no tokenizer"),
        ("[]", "is no tokenizer"),
        ('{"model": {"type": "?"}}', "is no tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(
    content: str | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=says) as error:
        TextTokenizer.load(path)
    assert "\n" not in str(error.value)


# -- piece by piece ----------------------------------------------------------------------------


def streamed(tokenizer: TextTokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(t) for t in tokens), stream.flush()]


def test_pieces_make_up_the_text_of_any_tokens(tokenizer: TextTokenizer) -> None:
    """Also of bytes that are no text: a model may write anything."""
    draw = random.Random(1)
    for _ in range(300):
        tokens = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(12))]
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["tokenizer", "pieces"])
def test_a_character_of_several_tokens_comes_whole(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.encode("a 東京 roses", special=False)
    given = streamed(tokenizer, tokens)
    assert len(tokens) > len("a 東京 s")
    assert "".join(given) == "a 東京 roses"
    assert not any("\ufffd" in piece for piece in given)
    assert given[-1] == ""


def test_flush_gives_what_was_held_back(tokenizer: TextTokenizer) -> None:
    half = tokenizer.encode("東", special=False)[:2]
    *pushed, flushed = streamed(tokenizer, half)
    assert pushed == ["", ""]
    assert flushed == tokenizer.decode(half) != ""
