"""One command line, run in this process."""

from __future__ import annotations

import pytest

from offramp.cli import main


def offramp(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    try:
        main([str(word) for word in words])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    shown = capsys.readouterr()
    return status, shown.out, shown.err
