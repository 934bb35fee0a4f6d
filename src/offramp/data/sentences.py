"""The sentences of a text file, spelled as a recogniser writes them: what language models learn.

Books and transcripts both will do. Sentences that a voice may read otherwise than they are
written (digits, signs, words in capitals) are left out, as they are from synthetic speech.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from offramp.data.corpora import unwrap
from offramp.data.manifest import read_text
from offramp.data.speech import normalize_text
from offramp.data.synthetic import split_sentences

_EMPTY_LINE = re.compile(r"\n\s*\n")


def file_sentences(path: Path) -> Iterator[str]:
    """Normalised by `normalize_text`, as references are; DataError: missing, or not UTF-8.

    Empty lines part the paragraphs, whose hard line breaks are undone. In a file without any,
    such as a list of transcripts, every line is a paragraph.
    """
    text = read_text(path).strip()
    paragraphs = unwrap(text) if _EMPTY_LINE.search(text) else text
    for sentence in split_sentences(paragraphs, min_chars=1, max_chars=sys.maxsize):
        yield normalize_text(sentence.text)
