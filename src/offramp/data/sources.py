"""Where the text corpora come from: `fetch(name, root)` makes `root/name` as `corpora.py` reads it.

A file is checked against the sha256 that somebody publishes for it (`Source.checksums_from` says
who). For some files nobody publishes one. Then the first download is a matter of trust: `fetch`
refuses it and shows the sha256 that it got, unless you pass `accept_unverified=True`; what you
accepted is recorded in `root/name.sha256`, and every later download must match that record.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from offramp.data import unpack
from offramp.errors import DataError, InputError
from offramp.files import replacing

TIMEOUT_S = 30.0  # per answer of the server, not for the whole file
CHUNK = 1 << 16
MAX_BYTES = 1 << 28  # of a download whose size nobody publishes


@dataclass(frozen=True)
class Remote:
    """One file to download: its addresses, and its sha256 and size in bytes if published.

    With a sha256 the addresses are mirrors, and any failure moves on to the next. Without one they
    may be variants of a text, so only "not found" moves on: a slow network never picks the text.
    """

    urls: tuple[str, ...]
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Source:
    """A corpus: the files to download, and how they become the folder that `corpora.py` reads."""

    what: str
    licence: str
    files: Mapping[str, Remote]  # the name that `unpack` knows a file by -> the file
    unpack: Callable[[Path, Path], None]  # (folder of the downloads, the new folder)
    needs: tuple[str, ...]  # the folder is complete when it holds these
    checksums_from: str | None = None


@dataclass(frozen=True)
class _Got:
    """A download: where from, and what came."""

    url: str
    sha256: str


class _NotServedError(Exception):
    """An address gave no file. `gone`: the server answered, and has no such file."""

    def __init__(self, reason: object, gone: bool = False) -> None:
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        super().__init__(" ".join(text.split()))
        self.gone = gone


def fetch(name: str, root: Path, *, accept_unverified: bool = False) -> Path:
    """Download the corpus `name` and unpack it to `root/name`, all of it or nothing.

    A complete folder is left alone. Without a published checksum the first download needs
    `accept_unverified=True`; its sha256 is kept in `root/name.sha256` and binds later ones.
    """
    if name not in SOURCES:
        raise InputError(f"no source is named {name!r}; choose one of {', '.join(SOURCES)}")
    source, folder, record = SOURCES[name], root / name, root / f"{name}.sha256"
    if _is_complete(folder, source):
        return folder
    trusted = _recorded(record)
    with replacing(folder) as new:
        downloads = new / ".downloads"
        got: dict[str, _Got] = {}
        for file, remote in source.files.items():
            got[file] = _download(remote, downloads / file, folder)
            if remote.sha256 is not None:
                _check_published(got[file], remote.sha256, source)
            elif file in trusted:
                _check_recorded(got[file], trusted[file], record)
            elif not accept_unverified:
                raise _unverified(got[file], name)
        source.unpack(downloads, new)
        shutil.rmtree(downloads)
        assert all((new / needed).is_file() for needed in source.needs), (name, source.needs)
        (new / "SOURCE.txt").write_text(_provenance(name, source, got), encoding="utf-8")
        unpublished = [f for f, remote in source.files.items() if remote.sha256 is None]
        if unpublished:
            with replacing(record) as temporary:
                lines = (f"{got[file].sha256}  {file}\n" for file in unpublished)
                temporary.write_text("".join(lines), encoding="utf-8")
    return folder


def _is_complete(folder: Path, source: Source) -> bool:
    """Whether `folder` holds the corpus; a folder that holds something else is not touched."""
    try:
        if not folder.exists():
            return False
        missing = [needed for needed in source.needs if not (folder / needed).is_file()]
    except OSError as error:
        raise InputError(
            f"cannot look into {folder}: {error.strerror}; choose a folder you may read"
        ) from error
    if missing:
        raise DataError(
            f"{folder} exists but lacks {', '.join(missing)}; it was left as it is: "
            f"move it away, then fetch {folder.name} again"
        )
    return True


def _recorded(record: Path) -> dict[str, str]:
    """File -> sha256 that an earlier fetch saw and its caller accepted."""
    try:
        lines = record.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {record}, the record of earlier downloads: {error}; mend or delete it"
        ) from error
    return {file: digest for digest, _, file in (line.partition("  ") for line in lines)}


def _unverified(got: _Got, name: str) -> DataError:
    return DataError(
        f"{got.url} has sha256 {got.sha256}, which cannot be verified, since nobody publishes one; "
        f"nothing was kept: to trust this first download, fetch {name} again with "
        "accept_unverified=True (--accept-unverified)"
    )


def _check_published(got: _Got, expected: str, source: Source) -> None:
    if got.sha256 != expected:
        raise DataError(
            f"{got.url} has sha256 {got.sha256}, not {expected} as published "
            f"({source.checksums_from}); it was changed at its origin or on the way: nothing was "
            "kept, fetch again later"
        )


def _check_recorded(got: _Got, expected: str, record: Path) -> None:
    if got.sha256 != expected:
        raise DataError(
            f"{got.url} has sha256 {got.sha256}, not {expected} as when it was first fetched; "
            f"nothing was kept: if you trust the new file, delete {record} and fetch again"
        )


def _provenance(name: str, source: Source, got: dict[str, _Got]) -> str:
    files = "".join(f"  {g.sha256}  {file}  {g.url}\n" for file, g in got.items())
    checked = source.checksums_from or "nobody publishes any; these were accepted unverified"
    return (
        f"{name}\nWhat: {source.what}\nLicence: {source.licence}\n"
        f"Checksums published by: {checked}\nDownloaded (sha256, file, address):\n{files}"
    )


def _download(remote: Remote, to: Path, folder: Path) -> _Got:
    """`remote` in the file `to`, from the first address that serves it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in remote.urls:
        try:
            return _save(url, to, remote.size)
        except _NotServedError as error:
            failures.append(f"{url} ({error})")
            if remote.sha256 is None and not error.gone:
                break
    raise DataError(
        f"cannot download {' or '.join(failures)}; nothing was kept: try again online, or fetch it "
        f"on another machine and copy its {folder.name} folder to {folder}"
    )


def _save(url: str, to: Path, expected: int | None) -> _Got:
    digest, size = hashlib.sha256(), 0
    with to.open("wb") as file:
        for chunk in _chunks(url):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if size > (MAX_BYTES if expected is None else expected):
                break  # an endless answer must not fill the disk
    if expected is not None and size != expected:
        amount = f"more than {expected}" if size > expected else f"{size}"
        raise DataError(
            f"{url} has {amount} bytes, not {expected} as published; it is truncated or another "
            "file: nothing was kept, fetch again"
        )
    if size > MAX_BYTES:
        raise DataError(f"{url} has more than {MAX_BYTES} bytes; no corpus here is that large")
    return _Got(url, digest.hexdigest())


def _chunks(url: str) -> Iterator[bytes]:
    """The body at `url`. Only network errors become `_NotServedError`: disk errors are not ours."""
    try:
        with urlopen(Request(url, headers={"User-Agent": "offramp"}), timeout=TIMEOUT_S) as answer:
            promised, received = answer.length, 0
            while chunk := answer.read(CHUNK):
                received += len(chunk)
                yield chunk
            if promised is not None and received != promised:
                raise _NotServedError(f"it broke off after {received} of {promised} bytes")
    except HTTPError as error:
        error.close()
        gone = error.code in (404, 410)
        raise _NotServedError(f"{error.code} {error.reason}", gone) from error
    except URLError as error:
        raise _NotServedError(error.reason) from error
    except (OSError, HTTPException) as error:
        raise _NotServedError(error) from error


GITHUB = "https://raw.githubusercontent.com"  # with a commit in the address, a file cannot change
EXAMPLES = (
    f"{GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
    "/word_language_model/data/wikitext-2"
)
HINGLISH = (
    f"{GITHUB}/google-research-datasets/Hinglish-TOP-Dataset"
    "/fdd3998a6573130659bfa1ce4b1ebe698df2bf3a/Dataset/Human%20Annotated%20Data"
)


def _novel(repository: str, commit: str) -> Remote:
    """A book of GITenberg as UTF-8, else as ASCII, else as Latin-1.

    A repository has one or two of the three. Our own copies tell which it was for nine of the ten
    (UTF-8, but ASCII for Sherlock Holmes and Middlemarch); no list of the files was at hand.
    """
    number = repository.rpartition("_")[2]
    base = f"{GITHUB}/GITenberg/{repository}/{commit}/{number}"
    return Remote((f"{base}-0.txt", f"{base}.txt", f"{base}-8.txt"))


NOVELS = {
    "train/war_and_peace.txt": _novel(
        "War-and-Peace_2600", "fa22ab90f00f627e83d14acabe32d91602d2365d"
    ),
    "train/pride_and_prejudice.txt": _novel(
        "Pride-and-Prejudice_1342", "81db45c9c48c592f0b77f01fc59e677ad0a5634e"
    ),
    "train/moby_dick.txt": _novel(
        "Moby-Dick--Or-The-Whale_2701", "bdf1948e6cd00963730971e5624e764a35f238c3"
    ),
    "train/sherlock_holmes.txt": _novel(
        "The-Adventures-of-Sherlock-Holmes_1661",
        "7e5dd2703fbf503c004063e96ab7c61262375e5f",
    ),
    "train/great_expectations.txt": _novel(
        "Great-Expectations_1400", "889db0e100928a957f469bf834c564d04065c8e6"
    ),
    "train/middlemarch.txt": _novel("Middlemarch_145", "39add53d31f10ba5cecdcbe8c095f90b25fd4b3f"),
    "train/karamazov.txt": _novel(
        "The-Brothers-Karamazov_28054", "6a2b2e1e64fe3246e470b60459ba207e2872bd0e"
    ),
    "train/anna_karenina.txt": _novel(
        "Anna-Karenina_1399", "cb3b12d5db852936e5a3abc05ef02939c9dcfd6e"
    ),
    "dev/two_cities.txt": _novel(
        "A-Tale-of-Two-Cities_98", "0f6111bc7237af7375295ec1754c2e57e19f67f1"
    ),
    "test/dracula.txt": _novel("Dracula_345", "5216d6ea255fbf8966426a160b68251b18f16907"),
}

SOURCES: dict[str, Source] = {
    "gutenberg_books": Source(
        what="Ten novels of Project Gutenberg, 14 MB (GITenberg repositories, pinned by commit)",
        licence="Public domain in the USA; header, footer and trademark of Project Gutenberg go",
        files=NOVELS,
        unpack=unpack.novels,
        needs=tuple(name for name in NOVELS if not name.startswith("test/")),
    ),
    "top_v1": Source(
        what="TOP (arXiv 1810.07942): navigation and event requests with bracketed parses",
        licence="CC BY-SA (its README names no version)",
        files={
            "top.zip": Remote(
                (
                    "https://download.pytorch.org/data/semanticparsingdialog.zip",
                    "https://fb.me/semanticparsingdialog",  # the address in the paper; redirects
                )
            )
        },
        unpack=unpack.top_v1,
        needs=("train.tsv", "dev.tsv"),
    ),
    "topv2": Source(
        what="TOPv2 1.1 (arXiv 2010.03546): 180,000 requests of eight domains with their parses",
        licence="CC BY-SA 4.0",
        files={
            "topv2.zip": Remote(
                (
                    "https://dl.fbaipublicfiles.com/topv2/TOPv2_Dataset.zip",
                    "https://fb.me/TOPv2Dataset",
                ),
                "e73a13eb32f67f69c630abde549fa153f288564e2703b71492f04cb59b2cae13",
            )
        },
        unpack=unpack.topv2,
        needs=("train.tsv", "dev.tsv"),
        checksums_from="one research preregistration on GitHub (HLM5 SCA-1, 2026), not its authors",
    ),
    "topv2_english": Source(
        what="The English side of Hinglish-TOP (arXiv 2211.07514): 10,896 requests of TOPv2",
        licence="Apache-2.0 as a repository; the English columns derive from TOPv2, CC BY-SA 4.0",
        files={
            "train.tsv": Remote(
                (f"{HINGLISH}/train.tsv",),
                "8bcf9a01e467a97195631f1ec9983af27ef9a752b6d8f8537764e81814102360",
            ),
            "dev.tsv": Remote(
                (f"{HINGLISH}/validation.tsv",),
                "c713c7fb367713c3a5ed65b727d3d6329dd944f1032e786b06bcaedcf3cdc332",
            ),
            "test.tsv": Remote(
                (f"{HINGLISH}/test.tsv",),
                "9f7bd4f80b15956143b4188a113981735264944ac825d6231b60cc2444533791",
            ),
        },
        unpack=unpack.topv2_english,
        needs=("train.tsv", "dev.tsv"),
        checksums_from="one project on GitHub that trains on it (Udgam), not its authors",
    ),
    "wikitext2": Source(
        what="WikiText-2, words with <unk>, as pytorch/examples has it (pinned by commit)",
        licence="CC BY-SA 3.0 (Wikipedia text)",
        files={
            "train.txt": Remote(
                (f"{EXAMPLES}/train.txt",),
                "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            ),
            "dev.txt": Remote(
                (f"{EXAMPLES}/valid.txt",),
                "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                1_121_681,
            ),
            "test.txt": Remote(
                (f"{EXAMPLES}/test.txt",),
                "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
                1_256_449,
            ),
        },
        unpack=unpack.as_they_are,
        needs=("train.txt", "dev.txt"),
        checksums_from="many projects on GitHub that pin these files; our own copy of dev.txt",
    ),
    "wikitext2_raw": Source(
        what="WikiText-2 raw: the same articles without <unk> (arXiv 1609.07843)",
        licence="CC BY-SA 3.0 (Wikipedia text)",
        files={
            "wikitext.zip": Remote(
                (
                    "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-raw-v1.zip",
                    "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
                    "https://huggingface.co/datasets/ggml-org/ci/resolve"
                    "/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
                ),
                "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
                4_721_645,
            )
        },
        unpack=unpack.wikitext2_raw,
        needs=("train.txt", "dev.txt"),
        checksums_from="huggingface/datasets, datasets/wikitext/dataset_infos.json",
    ),
    "tinyshakespeare": Source(
        what="Tiny Shakespeare: 1.1 MB of plays, cut 90 / 5 / 5 (karpathy/char-rnn, pinned)",
        licence="Public domain text; the repository has no licence file for it",
        files={
            "input.txt": Remote(
                (
                    f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
                    "/data/tinyshakespeare/input.txt",
                ),
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                1_115_394,
            )
        },
        unpack=unpack.tinyshakespeare,
        needs=("train.txt", "dev.txt"),
        checksums_from="huggingface/datasets, datasets/tiny_shakespeare/dataset_infos.json",
    ),
}
