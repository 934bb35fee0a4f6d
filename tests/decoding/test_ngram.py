"""An n-gram model is a probability in every context, and KenLM reads our file as it is meant."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest

from extras import needs_kenlm
from offramp.data import corpora
from offramp.decoding.lm import LanguageModel
from offramp.decoding.ngram import NGramOptions, arpa_words, train_ngram
from offramp.errors import ConfigError, DataError, InputError

TEXTS = [
    "the cat sat on the mat",
    "the cat ate the rat",
    "a rat sat on a cat",
    "the mat",
    "on the mat sat the cat and the rat",
    "rat rat rat",
    "and",
] * 2 + ["one more time the cat ate", "a mat and a mat on a mat"]


# -- the obvious reading of an ARPA file -------------------------------------------------------


class Arpa:
    """Katz's rule, straight from the file: the n-gram if it is listed, else back off."""

    def __init__(self, path: Path) -> None:
        self.p: dict[tuple[str, ...], float] = {}
        self.backoff: dict[tuple[str, ...], float] = {}
        self.counts: dict[int, int] = {}
        order = 0
        for line in path.read_text().splitlines():
            if line.startswith("ngram "):
                n, _, count = line[6:].partition("=")
                self.counts[int(n)] = int(count)
            elif line.endswith("-grams:"):
                order = int(line[1])
            elif order and "\t" in line:
                log_p, gram, *rest = line.split("\t")
                key = tuple(gram.split())
                assert len(key) == order
                self.p[key] = float(log_p)
                self.backoff[key] = float(rest[0]) if rest else 0.0
        self.order = order
        self.words = [w for (w,) in (k for k in self.p if len(k) == 1) if w != "<s>"]

    def log10(self, context: tuple[str, ...], word: str) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        if (*context, word) in self.p:
            return self.p[*context, word]
        if not context:
            return self.p["<unk>",]
        return self.backoff.get(context, 0.0) + self.log10(context[1:], word)

    def sentence(self, words: list[str]) -> float:
        chain = ["<s>", *(w if (w,) in self.p else "<unk>" for w in words), "</s>"]
        return sum(self.log10(tuple(chain[:i]), chain[i]) for i in range(1, len(chain)))


OPTIONS = [
    NGramOptions(),
    NGramOptions(min_count=2),
    NGramOptions(min_count=3, min_word_count=3),
    NGramOptions(min_word_count=2),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_probabilities_sum_to_one_in_every_context(
    tmp_path: Path, order: int, options: NGramOptions
) -> None:
    path = tmp_path / "lm.arpa"
    counts = train_ngram(TEXTS, order, path, options)
    model = Arpa(path)
    assert model.order == order
    assert tuple(model.counts[n] for n in range(1, order + 1)) == counts
    assert len(model.p) == sum(counts)
    seen = {k for k in model.p if len(k) < order and k[-1] != "</s>"}
    unseen = {("mat", "cat")[: order - 1], ("<unk>",)}
    for context in {(), *seen, *unseen}:
        total = sum(10 ** model.log10(context, w) for w in model.words)
        assert total == pytest.approx(1.0, abs=1e-5)


def test_kneser_ney_by_hand(tmp_path: Path) -> None:
    """Too little text for its own discounts, so they are 0.5, 1 and 1.5. Bigrams of "a b" and
    "a c": <s>a twice, ab, ac, b</s>, c</s> once. As continuations: a, b and c after one word
    each, </s> after two; 5 in all, 2.5 of which are free, for 5 words (with <unk>)."""
    train_ngram(["a b", "a c"], 2, tmp_path / "lm.arpa")
    p = {k: 10**v for k, v in Arpa(tmp_path / "lm.arpa").p.items()}
    free = (3 * 0.5 + 1.0) / 5 / 5
    assert p["b",] == pytest.approx(0.5 / 5 + free, rel=1e-5)
    assert p["</s>",] == pytest.approx(1.0 / 5 + free, rel=1e-5)
    assert p["<unk>",] == pytest.approx(free, rel=1e-5)
    assert p["a", "b"] == pytest.approx(0.5 / 2 + (0.5 + 0.5) / 2 * p["b",], rel=1e-5)
    assert p["<s>", "a"] == pytest.approx(1.0 / 2 + 1.0 / 2 * p["a",], rel=1e-5)


def test_discounts_are_those_of_chen_and_goodman(tmp_path: Path) -> None:
    """A text whose bigrams have known counts of counts: n1..n4 = 8, 4, 2, 1."""
    counts = [1] * 8 + [2] * 4 + [3] * 2 + [4]
    lines = [f"x{i} y{i}" for i, n in enumerate(counts) for _ in range(n)]
    grams: dict[tuple[str, str], int] = defaultdict(int)
    for line in lines:
        for pair in itertools.pairwise(["<s>", *line.split(), "</s>"]):
            grams[pair] += 1
    n1, n2, n3, n4 = (sum(c == k for c in grams.values()) for k in range(1, 5))
    y = n1 / (n1 + 2 * n2)
    discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    train_ngram(lines, 2, tmp_path / "lm.arpa")
    model = Arpa(tmp_path / "lm.arpa")
    for i, n in ((0, 1), (8, 2), (12, 3), (14, 4)):
        d = discounts[min(n, 3) - 1]
        assert 10 ** model.backoff[f"x{i}",] == pytest.approx(d / n, rel=1e-4)
        want = (n - d) / n + d / n * 10 ** model.p[f"y{i}",]
        assert 10 ** model.p[f"x{i}", f"y{i}"] == pytest.approx(want, rel=1e-4)


def test_longer_context_predicts_the_text_it_was_learnt_from_better(tmp_path: Path) -> None:
    scores = []
    for order in (2, 3, 4):
        train_ngram(TEXTS, order, tmp_path / "lm.arpa")
        model = Arpa(tmp_path / "lm.arpa")
        scores.append(sum(model.sentence(t.split()) for t in TEXTS))
    assert scores == sorted(scores)
    assert len(set(scores)) == 3


def test_rare_words_are_unknown(tmp_path: Path) -> None:
    train_ngram(TEXTS, 2, tmp_path / "lm.arpa", NGramOptions(min_word_count=3))
    known = arpa_words(tmp_path / "lm.arpa")
    assert sorted(known) == ["a", "and", "ate", "cat", "mat", "on", "rat", "sat", "the"]
    unknown = Arpa(tmp_path / "lm.arpa").p["<unk>",]
    train_ngram(TEXTS, 2, tmp_path / "lm.arpa")
    assert Arpa(tmp_path / "lm.arpa").p["<unk>",] < unknown, "now no word of the text is unknown"


def test_the_books_give_a_model_of_their_words(tmp_path: Path) -> None:
    try:
        novel = corpora.books("dev")
    except DataError as error:
        pytest.skip(str(error))
    (book,) = novel.values()
    lines = re.sub("[^a-z\n]+", " ", book.lower()).splitlines()[:800]
    path = tmp_path / "lm.arpa"
    train_ngram(lines, 3, path, NGramOptions(min_word_count=2))
    model = Arpa(path)
    contexts = [k for k in model.p if len(k) == 2 and k[-1] != "</s>"]
    for context in [(), ("<s>",), *contexts[:: len(contexts) // 5]]:
        assert sum(10 ** model.log10(context, w) for w in model.words) == pytest.approx(1, abs=1e-4)
    said = ["he", "was", "a", "man"]
    assert model.sentence(said) > model.sentence(said[::-1])


@pytest.mark.parametrize(
    ("texts", "order", "error", "match"),
    [
        (TEXTS, 1, InputError, "order is 1; it must lie between 2 and 6"),
        (TEXTS, 7, InputError, "order is 7"),
        (["", "  "], 2, DataError, "no words"),
        (["a <s> b"], 2, DataError, "<s>, which language models reserve"),
    ],
)
def test_texts_that_make_no_model_are_refused(
    tmp_path: Path, texts: list[str], order: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        train_ngram(texts, order, tmp_path / "lm.arpa")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="min_count is 0"):
        NGramOptions(min_count=0)


# -- KenLM -------------------------------------------------------------------------------------


@needs_kenlm
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_kenlm_reads_our_file_as_the_obvious_reader_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], order: int, options: NGramOptions
) -> None:
    train_ngram(TEXTS, order, tmp_path / "lm.arpa", options)
    slow, fast = Arpa(tmp_path / "lm.arpa"), LanguageModel(tmp_path / "lm.arpa")
    for sentence in [*TEXTS, "cat the on", "the zebra sat", ""]:
        want = slow.sentence(sentence.split()) * math.log(10)
        assert read_by(fast, sentence) == pytest.approx(want, abs=1e-4)
    assert capfd.readouterr().err == "", "KenLM's progress bar is not for our users"


def read_by(model: LanguageModel, sentence: str) -> float:
    state, total = model.start(), 0.0
    for word in sentence.split():
        state, log_p = model.score(state, word)
        total += log_p
    return total + model.finish(state)
