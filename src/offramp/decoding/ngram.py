"""An n-gram language model from plain text, written as an ARPA file: no outside tool is needed.

Interpolated modified Kneser-Ney (Chen and Goodman, 1999): lower orders count in how many contexts
a word follows, not how often, and what discounting takes from the seen words goes to the unseen.
Counting is done on whole arrays, so millions of words take seconds. In every context the
probabilities of all words sum to 1, also after rare n-grams have been dropped.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp.config import check_counts
from offramp.errors import DataError, InputError
from offramp.files import replacing

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_BOS_ID = 1
_FALLBACK = (0.5, 1.0, 1.5)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NGramOptions:
    """min_count: n-grams of three words and more that were seen less often are left out.
    min_word_count: rarer words become <unk>."""

    min_count: int = 1
    min_word_count: int = 1

    def __post_init__(self) -> None:
        check_counts(1, min_count=self.min_count, min_word_count=self.min_word_count)


@dataclass(frozen=True)
class _Grams:
    """All n-grams of one order, as indices [G].

    context: the n-gram without its last word, in the order below; word: its last word; suffix:
    the n-gram without its first word, in the order below. count: how often it was seen.
    from_start: whether it begins with <s>.
    """

    context: Ints
    word: Ints
    suffix: Ints
    count: Ints
    from_start: NDArray[np.bool_]


@dataclass(frozen=True)
class _Order:
    """What the file says of one order: log10 needs no more than these. backoff: of each n-gram
    as a context. kept: what is written."""

    probability: Floats
    backoff: Floats
    kept: NDArray[np.bool_]


def train_ngram(
    texts: Iterable[str], order: int, path: Path, options: NGramOptions = NGramOptions()
) -> tuple[int, ...]:
    """Write a model of `order` (2 to 6) to `path`; returns the number of n-grams of each order.

    texts: one sentence each, words between white space, spelled as they are to be recognised.
    DataError: there is no word in them. InputError: order out of range, `path` not writable.
    """
    if not 2 <= order <= 6:
        raise InputError(f"order is {order}; it must lie between 2 and 6")
    words, tokens, offsets = _read(texts, options.min_word_count)
    grams = _count(tokens, offsets, len(words), order)
    orders = _estimate(grams, len(words), options.min_count)
    with replacing(path) as temporary:
        _write(temporary, words, grams, orders)
    return tuple(int(o.kept.sum()) for o in orders)


def _read(texts: Iterable[str], min_word_count: int) -> tuple[list[str], Ints, Ints]:
    """(words by id, ids of all sentences in a row, place of each within its sentence)."""
    sentences = [s for s in (text.split() for text in texts) if s]
    counts = Counter(itertools.chain.from_iterable(sentences))
    if reserved := sorted({UNK, BOS, EOS} & set(counts)):
        raise DataError(f"the text holds {', '.join(reserved)}, which language models reserve")
    known = sorted(w for w, n in counts.items() if n >= min_word_count)
    if not known:
        raise DataError("the text has no words to learn from; give more, or lower min_word_count")
    words = [UNK, BOS, EOS, *known]
    ids = {w: i for i, w in enumerate(words)}
    stream: list[int] = []
    places: list[int] = []
    for sentence in sentences:
        stream += [_BOS_ID, *(ids.get(w, 0) for w in sentence), 2]
        places += range(len(sentence) + 2)
    return words, np.array(stream), np.array(places)


def _count(tokens: Ints, places: Ints, vocab_size: int, order: int) -> list[_Grams]:
    """The n-grams of every order up to `order`; those of order 1 are all words, seen or not."""
    every = np.arange(vocab_size)
    count = np.bincount(tokens, minlength=vocab_size)
    grams = [_Grams(np.zeros_like(every), every, np.zeros_like(every), count, every == _BOS_ID)]
    ending = tokens  # at each place: the n-gram that ends there
    for n in range(2, order + 1):
        at = (places >= n - 1).nonzero()[0]
        # An n-gram is its context and one word: two numbers, packed into one.
        packed = ending[at - 1] * vocab_size + tokens[at]
        found, first, inverse, count = np.unique(
            packed, return_index=True, return_inverse=True, return_counts=True
        )
        context, below = found // vocab_size, grams[-1]
        suffix = ending[at[first]]
        grams.append(_Grams(context, found % vocab_size, suffix, count, below.from_start[context]))
        ending = np.full_like(tokens, -1)
        ending[at] = inverse
    return grams


def _estimate(grams: Sequence[_Grams], vocab_size: int, min_count: int) -> list[_Order]:
    probabilities: list[Floats] = []
    backoffs: list[Floats] = []
    kept: list[NDArray[np.bool_]] = []
    for n, own in enumerate(grams, start=1):
        adjusted = own.count
        if n < len(grams):
            # How many different words come before it; nothing comes before <s>.
            before = np.bincount(grams[n].suffix, minlength=len(own.word))
            adjusted = np.where(own.from_start, own.count, before)
        keep = own.count >= (min_count if n > 2 else 0)
        if n == 1:
            adjusted = np.where(own.from_start, 0, adjusted)  # <s> is never predicted
            lower = np.full(len(own.word), 1.0 / (vocab_size - 1))
            num_contexts = 1
        else:
            lower = probabilities[-1][own.suffix]
            num_contexts = len(grams[n - 2].word)
        discount = np.array([0.0, *_discounts(adjusted)])[np.minimum(adjusted, 3)]
        total = np.bincount(own.context, adjusted, num_contexts)
        taken = np.where(keep, discount, adjusted)  # a dropped n-gram gives all it has
        free = np.bincount(own.context, taken, num_contexts)
        left = np.divide(free, total, out=np.ones(num_contexts), where=total > 0)
        share = (adjusted - discount) / total[own.context]
        probabilities.append(share + left[own.context] * lower)
        kept.append(keep)
        if n > 1:
            backoffs.append(left)
    backoffs.append(np.ones(len(grams[-1].word)))
    return [_Order(*parts) for parts in zip(probabilities, backoffs, kept, strict=True)]


def _discounts(counts: Ints) -> tuple[float, ...]:
    """What is taken from counts of 1, of 2, and of 3 and more (Chen and Goodman, equation 17).

    Too little text gives impossible values; then half of each count up to 3.
    """
    n = [int((counts == k).sum()) for k in range(1, 5)]
    if all(n[:3]):
        y = n[0] / (n[0] + 2 * n[1])
        found = tuple(k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3))
        if all(0.0 < d <= k for k, d in enumerate(found, start=1)):
            return found
    return _FALLBACK


def _write(
    path: Path, words: Sequence[str], grams: Sequence[_Grams], orders: Sequence[_Order]
) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {n}={o.kept.sum()}\n" for n, o in enumerate(orders, start=1))
        spelled: list[str] = []
        for n, (own, o) in enumerate(zip(grams, orders, strict=True), start=1):
            last = [words[w] for w in own.word.tolist()]
            if n == 1:
                spelled = last
            else:
                context = own.context.tolist()
                spelled = [f"{spelled[c]} {w}" for c, w in zip(context, last, strict=True)]
            log_p = np.where((n == 1) & own.from_start, -99.0, np.log10(o.probability))
            log_backoff = np.log10(o.backoff)
            file.write(f"\n\\{n}-grams:\n")
            rows = zip(spelled, log_p.tolist(), log_backoff.tolist(), o.kept.tolist(), strict=True)
            for gram, p, backoff, keep in rows:
                if keep:
                    tail = f"\t{backoff:.7f}" if n < len(orders) else ""
                    file.write(f"{p:.7f}\t{gram}{tail}\n")
        file.write("\n\\end\\\n")


def arpa_words(path: Path) -> list[str]:
    """The words of an ARPA file, without <unk>, <s> and </s>; DataError: it is none."""
    try:
        with path.open(encoding="utf-8") as file:
            body = itertools.dropwhile(lambda line: line.strip() != "\\1-grams:", file)
            if next(body, None) is None:
                raise DataError(f"{path} has no \\1-grams: section; give an ARPA file")
            rows = itertools.takewhile(lambda line: not line.startswith("\\"), body)
            words = [fields[1] for line in rows if len(fields := line.split()) > 1]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not an ARPA file, which is text in UTF-8") from error
    return [w for w in words if w not in (UNK, BOS, EOS)]
