"""Files that are never half-written (a temporary name first, then a rename), and tables in JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from offramp.errors import InputError, OfframpError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes `path`'s place, else it goes.

    Works for a file and for a folder (an existing folder is swapped out, then removed). What
    killed processes left beside `path` is cleared away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose a folder you may write to"
        ) from error
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)  # the new one is in its place, come what may
        else:
            temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write {path}: {reason}; choose a place you may write to"
        ) from error
    finally:
        _remove(temporary)


def json_text(values: Mapping[str, Any]) -> str:
    """For people too; JSON knows no NaN."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def write_table(path: Path, values: Mapping[str, Any]) -> None:
    """`values` as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(values), encoding="utf-8")


def read_table(path: Path, wrong: type[OfframpError], remedy: str) -> dict[str, Any]:
    """What `write_table` wrote; `wrong`, with the `remedy`: it is missing or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise wrong(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(values, dict):
        raise wrong(f"{path} is no JSON object; {remedy}")
    return values


def check_writable_folder(folder: Path) -> None:
    """InputError, before the work, unless `folder` can be written to, or made; it is not made."""
    place = folder
    while not os.path.exists(place) and place != place.parent:  # for Path it may be an error
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(
            f"cannot write to {folder}: {place} is no folder you may write to; choose a folder "
            "you may write to"
        )


def _clear_leftovers(path: Path) -> None:
    """Remove what dead processes left; an old folder whose successor never came goes back.

    Our own number counts as dead: in a container all processes have the same.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.(tmp|old)")
    for leftover in list(path.parent.iterdir()):
        match = pattern.fullmatch(leftover.name)
        if match is None or (int(match[1]) != os.getpid() and _is_alive(int(match[1]))):
            continue
        if match[2] == "old" and not path.exists():
            leftover.rename(path)
        else:
            _remove(leftover)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would end the process there; rather leave a file too many
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
