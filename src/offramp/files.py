"""Writing files so that nothing is ever half-written: a temporary name first, then a rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from offramp.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes `path`'s place, else it goes.

    Works for a file and for a folder (an existing folder is swapped out, then removed).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of a killed process: in a container they all have the same number
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose a folder you may write to"
        ) from error
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            _remove(old)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write {path}: {reason}; choose a place you may write to"
        ) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
