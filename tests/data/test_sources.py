"""Sources: a download is whole and checked or it is not there; unpacked, `corpora.py` reads it."""

from __future__ import annotations

import hashlib
import io
import re
import socket
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from offramp.data import corpora, sources, unpack
from offramp.data.sources import SOURCES, Remote, Source, fetch
from offramp.errors import DataError, InputError, OfframpError

GOOD = b"It was the best of times.\n"


@dataclass
class Server:
    """Serves `files` on a port of this machine; `broken` ones promise a byte more than they send.

    A status in place of a body is sent as an error; what was asked for is in `asked`.
    """

    base: str
    files: dict[str, bytes | int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def url(self, path: str, body: bytes | int) -> str:
        self.files[path] = body
        return self.base + path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            serving.asked.append(self.path)
            body = serving.files.get(self.path, 404)
            if isinstance(body, int):
                self.send_error(body)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (self.path in serving.broken)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        serving = Server(f"http://127.0.0.1:{http.server_address[1]}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        http.shutdown()
        thread.join()


Toy = Callable[..., Source]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Puts a source called `toy` into SOURCES: one file, `text.txt`, as it is."""

    def put(remote: Remote, **changes: object) -> Source:
        source = Source(
            what="A toy",
            licence="CC0",
            files={"text.txt": remote},
            unpack=unpack.as_they_are,
            needs=("text.txt",),
            checksums_from="this test",
        )
        source = replace(source, **changes)  # type: ignore[arg-type]
        monkeypatch.setitem(sources.SOURCES, "toy", source)
        return source

    return put


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def left(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def fails(root: Path, *says: str, kind: type[OfframpError] = DataError) -> str:
    """Fetching toy fails with one line that says all of `says`, and leaves nothing below `root`."""
    before = left(root)
    with pytest.raises(kind) as error:
        fetch("toy", root)
    message = str(error.value)
    assert "\n" not in message
    assert all(said in message for said in says), message
    assert left(root) == before
    return message


# ------------------------------------------------------------------------------- download


def test_a_good_file_is_kept_with_its_provenance(server: Server, toy: Toy, tmp_path: Path) -> None:
    url = server.url("/a.txt", GOOD)
    toy(Remote((url,), sha256(GOOD), len(GOOD)))
    folder = fetch("toy", tmp_path / "new")
    assert folder == tmp_path / "new" / "toy"
    assert (folder / "text.txt").read_bytes() == GOOD
    assert left(tmp_path / "new") == ["toy", "toy/SOURCE.txt", "toy/text.txt"]
    provenance = (folder / "SOURCE.txt").read_text()
    assert "Licence: CC0\n" in provenance
    assert f"{sha256(GOOD)}  text.txt  {url}\n" in provenance


def test_a_complete_folder_is_left_alone(server: Server, toy: Toy, tmp_path: Path) -> None:
    toy(Remote((server.url("/a.txt", GOOD),), sha256(GOOD)))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "text.txt").write_text("my own")
    assert fetch("toy", tmp_path) == tmp_path / "toy"
    assert (tmp_path / "toy" / "text.txt").read_text() == "my own"
    assert server.asked == []


def test_a_folder_of_something_else_is_left_alone(toy: Toy, tmp_path: Path) -> None:
    toy(Remote(("http://127.0.0.1/never",)))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "notes.md").write_text("mine")
    fails(tmp_path, "exists but lacks text.txt", "move it away")


def test_a_wrong_checksum_is_refused(server: Server, toy: Toy, tmp_path: Path) -> None:
    url = server.url("/a.txt", b"changed")
    toy(Remote((url,), sha256(GOOD)))
    fails(tmp_path, url, sha256(b"changed"), f"not {sha256(GOOD)} as published (this test)")


@pytest.mark.parametrize(
    ("size", "says"),
    [(len(GOOD) + 1, f"has {len(GOOD)} bytes, not {len(GOOD) + 1}"), (3, "has more than 3 bytes")],
)
def test_a_wrong_size_is_refused(
    server: Server, toy: Toy, tmp_path: Path, size: int, says: str
) -> None:
    toy(Remote((server.url("/a.txt", GOOD),), sha256(GOOD), size))
    fails(tmp_path, says, "fetch again")


def test_an_endless_file_is_cut(
    server: Server, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    toy(Remote((server.url("/a.txt", GOOD),), sha256(GOOD)))
    fails(tmp_path, "more than 10 bytes")


def test_a_truncated_file_leaves_nothing_and_the_next_fetch_is_whole(
    server: Server, toy: Toy, tmp_path: Path
) -> None:
    toy(Remote((server.url("/a.txt", GOOD),), sha256(GOOD)))
    server.broken.add("/a.txt")
    fails(tmp_path, f"broke off after {len(GOOD)} of {len(GOOD) + 1} bytes", "nothing was kept")
    server.broken.clear()
    assert (fetch("toy", tmp_path) / "text.txt").read_bytes() == GOOD


@pytest.mark.parametrize(("status", "says"), [(404, "404 Not Found"), (500, "500 Internal")])
def test_an_error_of_the_server_is_told(
    server: Server, toy: Toy, tmp_path: Path, status: int, says: str
) -> None:
    toy(Remote((server.url("/a.txt", status),), sha256(GOOD)))
    fails(tmp_path, f"{server.base}/a.txt ({says}", "try again online")


def test_a_server_that_is_down_is_told(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: a connection is refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.txt"
        toy(Remote((url,), sha256(GOOD)))
        message = fails(tmp_path, f"cannot download {url} (Connection refused)")
    assert message.endswith(f"on another machine and copy its toy folder to {tmp_path / 'toy'}")


def test_being_offline_is_told(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setenv("no_proxy", "*")
    toy(Remote(("http://corpora.example/a.txt",), sha256(GOOD)))
    fails(tmp_path, "http://corpora.example/a.txt (Temporary failure in name resolution)", "online")


def test_a_slow_server_is_not_waited_for(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.05)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        toy(Remote((f"http://127.0.0.1:{mute.getsockname()[1]}/a.txt",), sha256(GOOD)))
        fails(tmp_path, "(timed out)")


def test_with_a_checksum_any_failure_moves_on_to_the_next_mirror(
    server: Server, toy: Toy, tmp_path: Path
) -> None:
    urls = (server.url("/a", 404), server.url("/b", 503), server.url("/c", GOOD))
    toy(Remote(urls, sha256(GOOD)))
    assert fetch("toy", tmp_path).is_dir()
    assert server.asked == ["/a", "/b", "/c"]


def test_without_a_checksum_only_not_found_moves_on(
    server: Server, toy: Toy, tmp_path: Path
) -> None:
    """Which variant of a text is taken must not depend on the weather of the network."""
    urls = (server.url("/a", 404), server.url("/b", 503), server.url("/c", GOOD))
    toy(Remote(urls))
    fails(tmp_path, "/a (404 Not Found) or ", "/b (503 Service Unavailable); nothing was kept")
    assert server.asked == ["/a", "/b"]


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no source is named 'top'; choose one of .*top_v1, "):
        fetch("top", tmp_path)
    assert left(tmp_path) == []


def test_a_place_that_cannot_be_written_is_told(server: Server, toy: Toy, tmp_path: Path) -> None:
    toy(Remote((server.url("/a.txt", GOOD),), sha256(GOOD)))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*toy: .*; choose a") as error:
        fetch("toy", tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_not_taken_for_the_network(
    server: Server, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy(Remote((server.url("/a.txt", GOOD),), sha256(GOOD)))

    def full(url: str, to: Path, expected: int | None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "_save", full)
    fails(tmp_path, "No space left on device; choose a place", kind=InputError)


# ------------------------------------------------------------------------------- trust


def test_without_a_published_checksum_the_caller_must_say_so(
    server: Server, toy: Toy, tmp_path: Path
) -> None:
    url = server.url("/a.txt", GOOD)
    toy(Remote((url,)), checksums_from=None)
    fails(tmp_path, url, sha256(GOOD), "cannot be verified", "accept_unverified=True")
    folder = fetch("toy", tmp_path, accept_unverified=True)
    assert (tmp_path / "toy.sha256").read_text() == f"{sha256(GOOD)}  text.txt\n"
    assert "accepted unverified" in (folder / "SOURCE.txt").read_text()


def test_what_was_accepted_binds_later_downloads(server: Server, toy: Toy, tmp_path: Path) -> None:
    toy(Remote((server.url("/a.txt", GOOD),)))
    fetch("toy", tmp_path, accept_unverified=True).rename(tmp_path / "away")
    assert (fetch("toy", tmp_path) / "text.txt").read_bytes() == GOOD  # trusted by now
    (tmp_path / "toy").rename(tmp_path / "away again")

    server.files["/a.txt"] = b"changed"
    fails(tmp_path, sha256(b"changed"), f"not {sha256(GOOD)} as when", "delete", "toy.sha256")
    with pytest.raises(DataError, match="as when it was first fetched"):
        fetch("toy", tmp_path, accept_unverified=True)  # acceptance is for a first time only
    (tmp_path / "toy.sha256").unlink()
    assert (fetch("toy", tmp_path, accept_unverified=True) / "text.txt").read_bytes() == b"changed"


def test_a_record_that_cannot_be_read_is_told(toy: Toy, tmp_path: Path) -> None:
    toy(Remote(("http://127.0.0.1/never",)))
    (tmp_path / "toy.sha256").write_bytes(b"\xff")
    fails(tmp_path, "toy.sha256, the record of earlier downloads", "mend or delete it")


def test_nothing_is_trusted_that_does_not_unpack(server: Server, toy: Toy, tmp_path: Path) -> None:
    """A sign-in page in place of the archive must not become what later downloads must match."""
    page = Remote((server.url("/a", b"<html>Please sign in</html>"),))
    toy(page, files={"top.zip": page}, unpack=unpack.top_v1)
    with pytest.raises(DataError, match=r"top\.zip is not a whole zip archive: .*; fetch again"):
        fetch("toy", tmp_path, accept_unverified=True)
    assert left(tmp_path) == []


# ------------------------------------------------------------------------------- archives


def zipped(members: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/etc/evil", "a/../../evil", "..\\evil", "C:/evil"]
)
def test_an_archive_that_leaves_its_folder_is_refused_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"good.txt": "good", name: "evil"}))
    with pytest.raises(DataError, match=r"a\.zip holds .*evil.* not safe") as error:
        unpack.unzip(tmp_path / "a.zip", tmp_path / "to")
    assert "\n" not in str(error.value)
    assert left(tmp_path) == ["a.zip"]


def test_an_archive_with_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(DataError, match="is a link or points outside"):
        unpack.unzip(tmp_path / "a.zip", tmp_path / "to")


def test_an_archive_that_is_broken_or_huge_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = zipped({"a.txt": "a" * 1000})
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.zip is not a whole zip archive"):
        unpack.unzip(tmp_path / "cut.zip", tmp_path / "to")
    spoilt = bytearray(whole)
    spoilt[40] ^= 0xFF  # inside the compressed text
    (tmp_path / "spoilt.zip").write_bytes(spoilt)
    with pytest.raises(DataError, match=r"spoilt\.zip is not a whole zip archive"):
        unpack.unzip(tmp_path / "spoilt.zip", tmp_path / "to")
    monkeypatch.setattr(unpack, "MAX_BYTES", 999)
    (tmp_path / "huge.zip").write_bytes(whole)
    with pytest.raises(DataError, match="more than 999 bytes"):
        unpack.unzip(tmp_path / "huge.zip", tmp_path / "to")


def test_a_traversal_through_fetch_leaves_nothing(server: Server, toy: Toy, tmp_path: Path) -> None:
    archive = zipped({"top/train.tsv": "", "../../../evil.txt": "evil"})
    remote = Remote((server.url("/top.zip", archive),), sha256(archive))
    toy(remote, files={"top.zip": remote}, unpack=unpack.top_v1)
    fails(tmp_path, "'../../../evil.txt'", "not safe")


# ------------------------------------------------------------------------------- layouts

HEADER = "The Project Gutenberg EBook of A Novel\n\nPosting Date: January 10, 2009\n\n"
FOOTER = (
    "*** END OF THIS PROJECT GUTENBERG EBOOK A NOVEL ***\n\n"
    "***** This file should be named 1-8.txt *****\n\n*** START: FULL LICENSE ***\n"
)


@pytest.mark.parametrize(
    ("encoding", "start"),
    [
        ("utf-8", "*** START OF THIS PROJECT GUTENBERG EBOOK A NOVEL ***"),
        ("utf-8-sig", "***START OF THE PROJECT GUTENBERG EBOOK A NOVEL***"),
        ("latin-1", "*** START OF THE PROJECT GUTENBERG EBOOK A NOVEL,\nIN TWO VOLUMES ***"),
    ],
)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_header_and_footer_of_project_gutenberg_go(
    encoding: str, start: str, line_break: str
) -> None:
    text = HEADER + start + "\n\n\n  THE CAFÉ\n\nIt was ***.\n\nEnd of the EBook\n\n" + FOOTER
    raw = text.replace("\n", line_break).encode(encoding)
    assert unpack.strip_gutenberg(raw, "a.txt") == "THE CAFÉ\n\nIt was ***.\n\nEnd of the EBook\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("404: Not Found", r"a\.txt has no \*\*\* START OF"),
        ("*** START OF THIS PROJECT GUTENBERG EBOOK A ***\ncut", r"a\.txt has no \*\*\* END OF"),
    ],
)
def test_a_book_without_markers_is_refused(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        unpack.strip_gutenberg(text.encode(), "a.txt")


def downloaded(root: Path, files: dict[str, bytes]) -> tuple[Path, Path]:
    """A folder of downloads that holds `files`, and the new folder that is to be filled."""
    new = root / "new"
    for name, data in files.items():
        path = new / ".downloads" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return new / ".downloads", new


def unpacked(root: Path, name: str, files: dict[str, bytes]) -> Path:
    """`files` as the source `name` unpacks them, where `corpora.py` looks for them."""
    assert set(files) == set(SOURCES[name].files)
    downloads, new = downloaded(root, files)
    SOURCES[name].unpack(downloads, new)
    assert all((new / needed).is_file() for needed in SOURCES[name].needs)
    return new.rename(root / name)


def test_the_novels_are_read_as_books(tmp_path: Path) -> None:
    book = "*** START OF THIS PROJECT GUTENBERG EBOOK A ***\r\nIt\r\nwas.\r\n" + FOOTER
    unpacked(tmp_path, "gutenberg_books", {name: book.encode() for name in sources.NOVELS})
    assert len(corpora.books("train", tmp_path)) == 8
    assert corpora.books("dev", tmp_path) == {"two_cities": "It was.\n"}
    assert corpora.books("test", tmp_path) == {"dracula": "It was.\n"}


def test_top_v1_is_read_as_parses(tmp_path: Path) -> None:
    rows = "what's up?\twhat 's up ?\t[IN:GET_EVENT what 's up ? ]\na\ta\t[IN:UNSUPPORTED a ]\n"
    archive = {f"top-dataset-semantic-parsing/{s}.tsv": rows for s in ("train", "eval", "test")}
    unpacked(tmp_path, "top_v1", {"top.zip": zipped({**archive, "top/README": "CC-BY-SA"})})
    train, dev = corpora.top("train", tmp_path), corpora.top("dev", tmp_path)
    assert train == [corpora.Parse("what 's up ?", "[IN:GET_EVENT what 's up ? ]")]
    assert [p.supported for p in dev] == [True, False]


def test_topv2_is_read_as_parses(tmp_path: Path) -> None:
    header = "domain\tutterance\tsemantic_parse"
    archive = {
        f"{domain}_{split}.tsv": f"{header}\r\n{domain}\t{split}\t[IN:A ]\r\n"
        for domain in unpack.DOMAINS
        for split in ("train", "eval", "test")
    }
    archive["low_resource_splits/weather_train_10spis.tsv"] = header
    folder = unpacked(tmp_path, "topv2", {"topv2.zip": zipped(archive)})
    assert [p.utterance for p in corpora.parses(folder / "dev.tsv")] == ["eval"] * 8


def test_topv2_english_is_read_as_parses(tmp_path: Path) -> None:
    header = "en_query\tcs_query\ten_parse\tcs_parse\tdomain"
    row = "Pause my timer .\tmere timer ko roko\t{}\t[IN:PAUSE_TIMER mere timer ko roko ]\ttimer"
    parse = "[IN:PAUSE_TIMER Pause my [SL:METHOD_TIMER timer ] . ]"
    table = f"{header}\n{row.format(parse)}\n".encode()
    unpacked(tmp_path, "topv2_english", dict.fromkeys(("train.tsv", "dev.tsv", "test.tsv"), table))
    assert corpora.topv2("dev", tmp_path) == [corpora.Parse("Pause my timer .", parse)]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("en_query\tcs_query\n", r"train\.tsv line 1 has 2 columns, not 5"),
        ("a\tb\tc\td\te\n", r"train\.tsv of the download has columns \['a', .*, not en_query"),
        ("", r"has columns none, not en_query"),
    ],
)
def test_a_table_with_other_columns_is_refused(tmp_path: Path, table: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        unpack.topv2_english(*downloaded(tmp_path, {"train.tsv": table.encode()}))
    assert "\n" not in str(error.value)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 0 files called wiki\.train\.raw, not one"):
        unpack.wikitext2_raw(*downloaded(tmp_path, {"wikitext.zip": zipped({"a.txt": "a"})}))


def test_wikitext2_both_ways(tmp_path: Path) -> None:
    splits = {"train.txt": b"a <unk>\n", "dev.txt": b"b\n", "test.txt": b"c\n"}
    assert (unpacked(tmp_path, "wikitext2", splits) / "dev.txt").read_bytes() == b"b\n"
    raw = zipped({f"wikitext-2-raw/wiki.{s}.raw": f"{s}\r\n" for s in ("train", "valid", "test")})
    folder = unpacked(tmp_path, "wikitext2_raw", {"wikitext.zip": raw})
    assert (folder / "dev.txt").read_bytes() == b"valid\r\n"


def test_tinyshakespeare_is_cut_as_we_have_it(tmp_path: Path) -> None:
    size = SOURCES["tinyshakespeare"].files["input.txt"].size
    assert size is not None
    folder = unpacked(tmp_path, "tinyshakespeare", {"input.txt": bytes(size)})
    sizes = [(folder / f"{split}.txt").stat().st_size for split in ("train", "dev", "test")]
    assert sizes == [1_003_854, 55_770, 55_770]


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_well_formed(name: str) -> None:
    source = SOURCES[name]
    assert source.what and source.licence and source.needs
    published = [remote.sha256 for remote in source.files.values() if remote.sha256 is not None]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in published)
    assert bool(published) == (source.checksums_from is not None)
    for remote in source.files.values():
        assert all(url.startswith("https://") for url in remote.urls)
        for url in remote.urls:
            if "raw.githubusercontent.com" in url:
                assert re.fullmatch("[0-9a-f]{40}", url.split("/")[5]), f"not pinned: {url}"


OURS = [corpora.data_root() / name for name in ("gutenberg_books", "wikitext2")]


@pytest.mark.skipif(
    not all(folder.is_dir() for folder in OURS), reason=f"not here: {OURS}; set OFFRAMP_DATA"
)
def test_our_own_copies_are_what_the_sources_promise() -> None:
    root = corpora.data_root()
    assert fetch("gutenberg_books", root) == root / "gutenberg_books"  # complete, left alone
    published = SOURCES["wikitext2"].files["dev.txt"]
    ours = (root / "wikitext2" / "dev.txt").read_bytes()
    assert (sha256(ours), len(ours)) == (published.sha256, published.size)
