"""What a measurement reads: the samples that ship with the package, or a file of one's own.

The bench always takes its prompts from the samples, so that its figures are of the same prompts
everywhere. A file is known by its ending: .tsv holds utterances and their parses, .txt is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from offramp.data import corpora
from offramp.errors import DataError, InputError
from offramp.models import hub
from offramp.tokenizer import TextTokenizer

_SAMPLES = Path(__file__).parent.parent / "samples"
TOP_SAMPLE = _SAMPLES / "top_dev_100.tsv"
BOOK_SAMPLE = _SAMPLES / "book_dev.txt"
WINDOW = 48  # tokens of a prompt that is cut from a text

Prompt = Sequence[int]


def data_files(model: str, data: Path | None) -> list[Path]:
    """`data`, or what the shipped `model` is judged by: dev splits, or samples without them."""
    if data is not None:
        if not data.is_file():
            raise DataError(f"there is no data file {data}; give a .txt or a .tsv file")
        if data.suffix not in (".txt", ".tsv"):
            raise InputError(f"the data file {data} ends in neither .txt nor .tsv; rename it")
        return [data]
    root = corpora.data_root()
    if model == "parse-tiny":
        top = root / "top_v1" / "dev.tsv"
        return [top if top.is_file() else TOP_SAMPLE]
    if model == "lm-tiny":
        return sorted((root / "gutenberg_books" / "dev").glob("*.txt")) or [BOOK_SAMPLE]
    hub.load_config(hub.resolve(model))  # no data helps a model that is not there
    raise InputError(
        f"there is no default data for {model}; give a .txt file (text) or a .tsv file "
        "(utterance and semantic_parse) with --data"
    )


def from_file(tokenizer: TextTokenizer, path: Path, count: int) -> list[Prompt]:
    """At most `count` prompts from a file that `data_files` returned."""
    if path.suffix == ".tsv":
        return from_parses(tokenizer, corpora.parses(path), count)
    return from_text(tokenizer, corpora.novel(path), count)


def from_parses(
    tokenizer: TextTokenizer, items: Sequence[corpora.Parse], count: int
) -> list[Prompt]:
    """Prompts for the parses of at most `count` items, spread evenly over `items`."""
    some = items[:: max(1, len(items) // count)][:count]
    return [*tokenizer.encode_batch([corpora.parse_prompt(p.utterance) for p in some])]


def from_text(tokenizer: TextTokenizer, text: str, count: int) -> list[Prompt]:
    """`count` windows of `WINDOW` tokens, spread evenly over `text`."""
    lead, stream = tokenizer.encode(""), tokenizer.encode(text, special=False)
    width = WINDOW - len(lead)
    last = len(stream) - width
    if last < 0:
        raise DataError(f"the text has {len(stream)} tokens; a prompt takes {width}: give more")
    return [[*lead, *stream[at : at + width]] for at in (last * i // count for i in range(count))]
