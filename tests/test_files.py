"""Nothing is ever half-written, and nothing is left lying about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from offramp.errors import InputError
from offramp.files import check_writable_folder, replacing


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "note.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with replacing(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert names(path.parent) == ["note.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert names(tmp_path) == ["model", "new"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (OSError(28, "No space left on device"), InputError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), InputError),
        (KeyError("a bug of ours"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda x: "" if isinstance(x, type) else type(x).__name__,
)
def test_a_failure_half_way_leaves_the_old_and_nothing_else(
    kind: str, error: BaseException, becomes: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "it"

    def write(target: Path, text: str) -> None:
        if kind == "folder":
            target.mkdir()
            target = target / "part"
        target.write_text(text)

    with replacing(path) as temporary:
        write(temporary, "old")
    with pytest.raises(becomes) as caught, replacing(path) as temporary:
        write(temporary, "half")
        raise error
    assert (path / "part" if kind == "folder" else path).read_text() == "old"
    assert names(tmp_path) == (["it", "part"] if kind == "folder" else ["it"])
    if becomes is InputError:
        assert "No space left on device" in str(caught.value)
        assert str(path) in str(caught.value)


def test_leftovers_of_a_killed_process_with_our_number_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for kind in ("tmp", "old"):
        leftover = tmp_path / f".model.{os.getpid()}.{kind}"
        leftover.mkdir()
        (leftover / "junk").touch()
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path) == ["model", "new"]


def a_dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_go_with_their_process(tmp_path: Path) -> None:
    path, dead, alive = tmp_path / "model", a_dead_process(), os.getppid()
    path.mkdir()
    for name in (f".model.{dead}.tmp", f".model.{dead}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "junk").touch()
    others = [f".model.{alive}.tmp", f".other.{dead}.tmp", ".model.tmp", f".model.{dead}.txt"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(path) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == sorted(["model", *others])


def test_an_old_folder_whose_successor_never_came_goes_back(tmp_path: Path) -> None:
    path, old = tmp_path / "model", tmp_path / f".model.{a_dead_process()}.old"
    old.mkdir()
    (old / "part").touch()
    with pytest.raises(KeyError), replacing(path):
        raise KeyError
    assert names(tmp_path) == ["model", "part"]


def test_a_swap_that_fails_half_way_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "model", Path.rename
    path.mkdir()
    (path / "part").touch()

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(InputError, match="Input/output error"), replacing(path) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["model", "part"]


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below" / "it", tmp_path / "folder"):
        refused = pytest.raises(InputError, match=f"cannot write {path}: .*; choose a")
        with refused as error, replacing(path) as temporary:
            temporary.write_text("x")
        assert "\n" not in str(error.value)
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "er"):
        check_writable_folder(folder)
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(InputError, match=f"cannot write to {folder}: .*; choose a") as error:
            check_writable_folder(folder)
        assert "\n" not in str(error.value)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "new"):
        with pytest.raises(InputError, match="no folder you may write to"):
            check_writable_folder(folder)
